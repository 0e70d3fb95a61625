"""The archive's format both ways, against Python's own; and what a hostile machine may write into one."""

from __future__ import annotations

import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolat.volumes import base
from isolat.volumes.archive import DIRECTORY, FIFO, FILE, LINK, MARKER, SYMLINK, Damaged, Entry, Reader, Writer
from isolat.volumes.base import Known
from isolat.volumes.outgoing import Outgoing

SOUND = settings(max_examples=150, deadline=None, database=None)
LIMIT = 8 << 20

parts = st.binary(min_size=1, max_size=30).filter(lambda part: not {0, 47} & set(part) and part not in (b".", b".."))
names = st.lists(parts, min_size=1, max_size=12).map(b"/".join)
numbers = st.integers(0, 0xFFFFFFFE)
entries = st.builds(
    Entry,
    kind=st.sampled_from([FILE, LINK, SYMLINK, DIRECTORY, FIFO]),
    path=names,
    target=st.one_of(st.just(b""), names),
    mtime_ns=st.integers(0, 2**40 * 10**9 // 10**6),
    mode=st.integers(0, 0o7777),
    uid=numbers,
    gid=numbers,
    same=st.booleans(),
)


def _memory(data: bytes = b"") -> int:
    fd = os.memfd_create("archive")
    os.write(fd, data)
    return fd


@contextmanager
def _written(found: list[Entry], contents: bytes = b"") -> Iterator[int]:
    fd, source = _memory(), _memory(contents)
    try:
        writer = Writer(fd, LIMIT)
        for entry in found:
            writer.add(entry, source)
        writer.finish()
        os.ftruncate(fd, max(os.fstat(fd).st_size, writer.offset))
        yield fd
    finally:
        os.close(fd)
        os.close(source)


@SOUND
@given(st.lists(entries, max_size=8))
def test_what_is_written_is_read(found: list[Entry]) -> None:
    with _written(found) as fd:
        assert [entry for entry, _ in Reader(fd)] == found


@SOUND
@given(st.lists(entries.filter(lambda entry: entry.kind in (FILE, SYMLINK, DIRECTORY)), max_size=5), st.binary())
def test_python_reads_it(found: list[Entry], contents: bytes) -> None:
    for entry in found:
        entry.same, entry.target = False, b"target" if entry.kind == SYMLINK else b""
        entry.size = len(contents) if entry.kind == FILE else 0
    with _written(found, contents) as fd, tarfile.open(f"/proc/self/fd/{fd}", "r:") as tar:
        members = tar.getmembers()
        assert [os.fsencode(member.name) for member in members] == [entry.path for entry in found]
        for member, entry in zip(members, found, strict=True):
            assert (member.mode, member.uid, member.gid) == (entry.mode, entry.uid, entry.gid)
            data = tar.extractfile(member) if entry.kind == FILE else None
            assert data is None or data.read() == contents


@SOUND
@given(st.lists(entries, min_size=1, max_size=3), st.data())
def test_a_damaged_archive_is_told_and_nothing_else(found: list[Entry], data: st.DataObject) -> None:
    with _written(found) as fd:
        bad = bytearray(os.pread(fd, 1 << 20, 0))
    for _ in range(data.draw(st.integers(1, 5))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    for at in range(0, len(bad) - 511, 512):
        if bad[at + 257 : at + 262] == b"ustar":
            block = bad[at : at + 148] + b" " * 8 + bad[at + 156 : at + 512]
            bad[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    fd = _memory(bytes(bad[: data.draw(st.integers(0, len(bad)))]))
    try:
        for entry, offset in Reader(fd):
            assert entry.size + offset <= len(bad)
            assert 0 <= entry.uid < 0xFFFFFFFF
    except Damaged:
        pass
    finally:
        os.close(fd)


# what a hostile machine writes

odd_parts = st.sampled_from([b"..", b".", b"", b"out", b"in", b"d", b"file", b"x" * 300, b"\xff\n", b"secret"])
odd_names = st.lists(odd_parts, min_size=0, max_size=4).map(lambda some: b"/".join([b"0", *some])) | st.sampled_from(
    [b"/etc/passwd", b"", b"0", b"1/file", b"../secret", b"0/../../secret", b"0/out/secret", b"volumes.tar"]
)
odd_entries = st.builds(
    Entry,
    kind=st.sampled_from([FILE, FILE, LINK, SYMLINK, DIRECTORY, FIFO, b"3", b"4", b"S", b"L"]),
    path=odd_names,
    target=odd_names | st.sampled_from([b"/", b"..", b"../outside", b"out/secret"]),
    size=st.just(4) | st.just(0),
    mode=st.integers(0, 0o7777),
    same=st.booleans(),
)


def _volume(at: Path) -> tuple[Path, Path]:
    outside, volume = at / "outside", at / "volume"
    for directory in (outside, volume, volume / "d"):
        directory.mkdir()
    (outside / "secret").write_text("secret")
    (volume / "file").write_text("file")
    (volume / "out").symlink_to(outside)
    (volume / "in").symlink_to("d")
    return outside, volume


def _state(at: Path) -> list[object]:
    found: list[object] = []
    for path in sorted((at, *at.iterdir())):
        here = path.lstat()
        found.append((path.name, here.st_ino, here.st_mode, here.st_uid, here.st_nlink, here.st_mtime_ns))
    return [*found, (at / "secret").read_text()]


@SOUND
@given(st.lists(odd_entries, max_size=12), st.lists(odd_names, max_size=4))
def test_nothing_outside_of_the_volume_is_touched(found: list[Entry], known: list[bytes]) -> None:
    for entry in found:
        entry.size = 0 if entry.kind != FILE or entry.same else entry.size
    with tempfile.TemporaryDirectory() as directory:
        outside, volume = _volume(Path(directory))
        before = _state(outside)
        told: list[bytes] = []
        there = os.open(volume, os.O_PATH)
        # A base is ours and sound, but it may have the names of what a machine then puts there.
        was = {name: Known(FILE, 4) for name in known if name.startswith(b"0/")}
        with _written([Entry(FILE, MARKER), *found], b"evil") as fd:
            out = Outgoing(fd, was, {b"0": there}, os.geteuid() == 0, b".new", lambda path, _: told.append(path))
            out.carry_out()
        os.close(there)
        assert _state(outside) == before
        assert sorted(path.name for path in Path(directory).iterdir()) == ["outside", "volume"]
        for path in volume.rglob("*"):
            mode = path.lstat().st_mode
            assert not mode & 0o6000 or stat.S_ISLNK(mode)
            assert stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO)
            assert path.name != ".new"


def test_an_archive_without_its_first_block_changes_nothing(tmp_path: Path) -> None:
    _, volume = _volume(tmp_path)
    there = os.open(volume, os.O_PATH)
    for first in ([], [Entry(DIRECTORY, b"0")]):
        with _written([*first, Entry(FILE, b"0/new")]) as fd, pytest.raises(Damaged):
            Outgoing(fd, {b"0/file": Known(FILE, 4)}, {b"0": there}, False, b".new", lambda *_: None).carry_out()
    os.close(there)
    assert (volume / "file").exists()
    assert not (volume / "new").exists()


def test_the_base_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [(b"0/\xff\n", Known(SYMLINK, 0, 5, 0o777, b"\xfe")), (b"0", Known(DIRECTORY, mode=0o755))]
    with (tmp_path / "base").open("w+b") as file:
        base.write(file.fileno(), {"0": (5, 1 << 40)}, rows)
        assert base.read(file.fileno()) == ({"0": (5, 1 << 40)}, dict(rows))
