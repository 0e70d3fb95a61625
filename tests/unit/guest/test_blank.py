"""Empty disks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from isolat.errors import StoreError, Unsupported, UsageError
from isolat.guest import blank

MIB = 1 << 20
needs_mkfs = pytest.mark.skipif(not shutil.which("mkfs.ext4", path="/usr/sbin:/sbin"), reason="no mkfs.ext4")


@needs_mkfs
def test_a_disk_is_made_once_and_costs_next_to_nothing(tmp_path: Path) -> None:
    made = blank.blank(tmp_path / "disks", 1024 * MIB + 5)
    assert made.stat().st_size == 1024 * MIB
    assert made.stat().st_blocks * 512 < MIB
    with made.open("rb") as file:
        assert file.read(1082)[1080:] == b"\x53\xef"  # ext4's magic number
    before = made.stat().st_ino
    assert blank.blank(tmp_path / "disks", 1024 * MIB).stat().st_ino == before
    assert [path.name for path in (tmp_path / "disks").iterdir()] == [made.name]


@needs_mkfs
def test_two_makers_make_the_same_bytes(tmp_path: Path) -> None:
    one, two = (blank.blank(tmp_path / name, 16 * MIB) for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()


def test_a_tiny_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="16 MiB"):
        blank.blank(tmp_path, MIB)


def test_without_mkfs_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, **_: None)
    with pytest.raises(Unsupported) as caught:
        blank.blank(tmp_path, 16 * MIB)
    assert caught.value.hint == "apt-get install e2fsprogs"


def holed(path: Path, data: dict[int, bytes], size: int) -> Path:
    with path.open("wb") as file:
        for at, piece in data.items():
            file.seek(at)
            file.write(piece)
        file.truncate(size)
    return path


@pytest.mark.parametrize(
    "data",
    [{}, {0: b"start"}, {5 * MIB: b"middle" * 9000}, {0: b"a" * MIB, 8 * MIB - 3: b"end"}],
    ids=["nothing", "start", "middle", "both ends"],
)
@pytest.mark.parametrize("by", ["clone", "ranges", "bytes"])
def test_a_copy_has_the_same_bytes_and_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[int, bytes], by: str
) -> None:
    source = holed(tmp_path / "source", data, 8 * MIB)
    if by != "clone":
        monkeypatch.setattr(blank, "_clone", lambda source, target: False)
    if by == "bytes":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(18, "another disk")))
    blank.copy_sparse(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert (tmp_path / "target").stat().st_blocks <= source.stat().st_blocks + 16


def test_a_copy_never_replaces(tmp_path: Path) -> None:
    source = holed(tmp_path / "source", {0: b"x"}, MIB)
    (tmp_path / "target").write_text("mine")
    with pytest.raises(FileExistsError):
        blank.copy_sparse(source, tmp_path / "target")
    assert (tmp_path / "target").read_text() == "mine"


def test_a_failed_copy_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = holed(tmp_path / "source", {0: b"x"}, MIB)
    monkeypatch.setattr(blank, "_clone", lambda source, target: False)
    monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(StoreError, match="full"):
        blank.copy_sparse(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
