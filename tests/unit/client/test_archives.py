"""Where archives are written to, and with which rights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isolat.client import archives
from isolat.errors import StoreError, UsageError


def write(path: str, data: bytes = b"data") -> None:
    with archives.target(path) as descriptor:
        os.write(descriptor, data)


def test_a_new_file_is_the_callers_alone(tmp_path: Path) -> None:
    write(f"{tmp_path}/new")
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o600])
def test_one_that_was_there_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(str(path))
    assert path.read_bytes() == b"data" and path.stat().st_mode & 0o7777 == mode


@pytest.mark.root
def test_root_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")
    os.chown(path, 1000, 1001)
    write(str(path))
    assert (path.stat().st_uid, path.stat().st_gid) == (1000, 1001)


def test_what_fails_leaves_nothing_and_keeps_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(KeyError), archives.target(f"{tmp_path}/old"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_no_name_is_no_file() -> None:
    with pytest.raises(UsageError, match="is empty"), archives.target(""):
        pass
    with pytest.raises(UsageError, match="is empty"), archives.source(""):
        pass


@pytest.mark.parametrize("follows", [StoreError("whoever reads it has closed it", stage="closed"), BrokenPipeError(32)])
def test_a_full_device_is_told_as_such(follows: Exception) -> None:
    """Not as what follows from it: that the pipe to it is closed."""
    with (
        pytest.raises(StoreError, match="/dev/full can't be written: No space left"),
        archives.target("/dev/full") as fd,
    ):
        os.write(fd, b"x")
        raise follows
