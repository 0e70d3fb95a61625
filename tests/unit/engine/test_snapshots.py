"""What is kept of a machine, without one: whole or nothing, private, and what is damaged is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.engine import snapshots
from isolat.engine.handle import Handle
from isolat.engine.paths import StateRoot
from isolat.engine.snapshots import Snapshots, Unfinished, load_memory
from isolat.errors import Conflict, NotFound, StoreError, UsageError
from isolat.layers.base import Copy, Frame, State
from isolat.qemu import memory

MIB = 1 << 20
HANDLE = Handle(
    id="0123456789abcdef", name="parent", image="debian", digest="d" * 64, spec={"image": "debian"},
    frames=(Frame("microvm", (), True, "guest/main", options=(("copy_key", "k"), ("tsc_khz", 7))),),
    state=State.RUNNING, created_ns=1, boot_id="b", uid_index=0,
)  # fmt: skip


@pytest.fixture
def kept(tmp_path: Path) -> Snapshots:
    return Snapshots(StateRoot(tmp_path))


def fill(files: Unfinished) -> None:
    os.write(files.state, b"state")
    os.write(files.disk, b"disk")


def make(kept: Snapshots, name: str) -> None:
    with kept.making(name, HANDLE) as files:
        fill(files)


def test_one_is_found_again_with_what_it_is_of(kept: Snapshots, tmp_path: Path) -> None:
    make(kept, "one")
    make(kept, "two")
    (one, two) = kept.all()
    assert (one.name, two.name) == ("one", "two")
    assert one.id != two.id
    found = kept.find("one")
    assert found.handle == HANDLE
    fd = found.open("state")
    assert os.read(fd, 100) == b"state"
    os.close(fd)
    assert kept.digests() == {HANDLE.digest}
    assert found.used_bytes > 0
    directory = tmp_path / "snapshots"
    assert {path.stat().st_mode & 0o077 for path in (directory, *directory.rglob("*"))} == {0}


def test_one_that_fails_is_nowhere(kept: Snapshots, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), kept.making("one", HANDLE) as files:
        fill(files)
        raise ZeroDivisionError
    assert list((tmp_path / "snapshots").iterdir()) == []
    with pytest.raises(StoreError, match="can't be written"), kept.making("one", HANDLE):
        raise OSError(28, "No space left on device")
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_what_a_killed_daemon_left_is_removed(kept: Snapshots, tmp_path: Path) -> None:
    kept.start()
    make(kept, "one")
    left = tmp_path / "snapshots" / f"{snapshots._UNFINISHED}x"
    left.mkdir()
    (left / "memory").touch()
    assert [one.name for one in kept.all()] == ["one"]
    kept.start()
    assert not left.exists()
    assert [one.name for one in kept.all()] == ["one"]


def test_names(kept: Snapshots) -> None:
    make(kept, "one")
    with pytest.raises(Conflict):
        make(kept, "one")
    for name in ("", "a", ".x", "../x", "a/b", "a b", "-rf", "x" * 129, "a\n"):
        with pytest.raises(UsageError):
            make(kept, name)
        for ask in (kept.find, kept.remove):
            with pytest.raises(NotFound):
                ask(name)
    kept.remove("one")
    assert kept.all() == []
    with pytest.raises(NotFound):
        kept.remove("one")


def test_a_name_taken_meanwhile_is_not_replaced(kept: Snapshots) -> None:
    with pytest.raises(Conflict), kept.making("one", HANDLE) as files:
        fill(files)
        make(kept, "one")
        first = kept.find("one").id
    assert kept.find("one").id == first
    assert len(kept.all()) == 1


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"handle": {}}, {"id": None, "created_ns": "x"}, {"handle": None}]
)  # fmt: skip
def test_a_damaged_one_is_told_and_hides_no_other(kept: Snapshots, tmp_path: Path, change: dict[str, object]) -> None:
    make(kept, "one")
    make(kept, "two")
    record = tmp_path / "snapshots/one/snapshot.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    with pytest.raises(StoreError, match="snapshot rm one"):
        try:
            kept.find("one")
        except StoreError as error:
            raise StoreError(f"{error.message} {error.hint}") from error
    assert [one.name for one in kept.all()] == ["two"]
    kept.remove("one")


def test_the_memory_is_what_it_began_with_and_the_difference(kept: Snapshots) -> None:
    size, page = 16 * MIB, memory.PAGE
    ram, delta = (os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for name in ("ram", "delta"))
    os.ftruncate(ram, size)
    os.pwrite(ram, b"began" * 1000, 2 * MIB)
    os.ftruncate(delta, size)
    runs = [(2 * MIB, page), (5 * MIB, 3 * page)]
    for start, length in runs:
        os.pwrite(delta, b"x" * length, start)
    memory.write_table(delta, size, runs)
    with kept.making("one", HANDLE) as files:
        files.keep_memory(Copy(files.state, delta, files.disk, ram), Deadline(10))
    wanted = bytearray(os.pread(ram, size, 0))
    for start, length in runs:
        wanted[start : start + length] = b"x" * length
    found = load_memory(kept.find("one"), Deadline(10))
    assert os.pread(found, size + 1, 0) == wanted
    with pytest.raises(PermissionError):
        os.pwrite(found, b"y", 0)
    assert kept.find("one").used_bytes < 2 * MIB
    for fd in (ram, delta, found):
        os.close(fd)
