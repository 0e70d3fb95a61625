"""Archives of volumes: POSIX.1-2017's pax interchange format, the part of it that native/tar.c reads and writes.

What comes from a machine is hostile. A reader gives names as they are; whoever uses them makes sure of where they lead.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
MARKER = b"isolat-out"  # the first entry of an archive that a machine has finished
NAME_MAX = 4095
_HEADER_NAMES = 100
_PAX_MAX = 4 * (NAME_MAX + 1)
_NO_ID = 0xFFFFFFFF  # chown(2): leave it
_SAME = b"ISOLAT.same"  # a record: not changed since it came in
_COPY_BYTES = 16 << 20

FILE, LINK, SYMLINK, DIRECTORY, FIFO = b"0", b"1", b"2", b"5", b"6"


class Damaged(Exception):
    """What was read is no archive, or not a whole one."""


@dataclass(slots=True)
class Entry:
    kind: bytes
    path: bytes
    target: bytes = b""  # of a symbolic link; of a further name, the first one's path
    size: int = 0
    mtime_ns: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0
    same: bool = False


# writing


class Writer:
    """Writes to a descriptor from its beginning. What is over the limit is counted, but not written any more."""

    def __init__(self, fd: int, limit_bytes: int) -> None:
        self._fd = fd
        self._limit = limit_bytes
        self.offset = 0  # how long the archive is, or would be

    @property
    def fits(self) -> bool:
        return self.offset <= self._limit

    def add(self, entry: Entry, source: int = -1) -> None:
        """``source``: an open file whose first ``entry.size`` bytes follow; where it is shorter, zeros."""
        records = b"".join(_records(entry))
        head = _header(b"x", b"pax", b"", 0o600, len(records)) + _padded(records)
        self._put(head + _header(entry.kind, entry.path, entry.target, entry.mode, entry.size))
        if entry.size:
            self._copy(source, entry.size)

    def finish(self) -> None:
        self._put(bytes(2 * BLOCK))

    def _put(self, data: bytes) -> None:
        if self.offset + len(data) <= self._limit:
            _write_at(self._fd, data, self.offset)
        self.offset += len(data)

    def _copy(self, source: int, size: int) -> None:
        """Only data: a file's holes are holes of the archive."""
        start = self.offset
        self.offset += -(-size // BLOCK) * BLOCK
        if self.fits:
            copy_data(source, 0, self._fd, start, size)


def copy_data(source: int, at: int, target: int, to: int, size: int) -> None:
    """``size`` bytes from ``at`` on to ``to`` on, without what is a hole or no longer there."""
    for begin, end in _data(source, at, size):
        if _copy_range(source, at, target, to, begin, end) < end:
            return


def data_bytes(source: int, at: int, size: int) -> int:
    """How many of the ``size`` bytes from ``at`` on are no hole."""
    return sum(end - begin for begin, end in _data(source, at, size))


def _data(source: int, at: int, size: int) -> Iterator[tuple[int, int]]:
    """Beginning and end of what is no hole, counted from ``at``."""
    done = 0
    while done < size:
        try:
            begin = os.lseek(source, at + done, os.SEEK_DATA) - at
            end = min(os.lseek(source, at + begin, os.SEEK_HOLE) - at, size)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        if begin < size:
            yield begin, end
        done = max(end, begin)


def _copy_range(source: int, at: int, target: int, to: int, begin: int, end: int) -> int:
    while begin < end:
        count = min(end - begin, _COPY_BYTES)
        try:
            done = os.copy_file_range(source, target, count, at + begin, to + begin)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
            data = os.pread(source, min(count, 1 << 20), at + begin)
            _write_at(target, data, to + begin)
            done = len(data)
        if not done:
            return end
        begin += done
    return end


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def _records(entry: Entry) -> Iterator[bytes]:
    yield _record(b"path", entry.path)
    if entry.target:
        yield _record(b"linkpath", entry.target)
    yield _record(b"mtime", b"%s%d.%09d" % (b"-" if entry.mtime_ns < 0 else b"", *divmod(abs(entry.mtime_ns), 10**9)))
    yield _record(b"uid", b"%d" % entry.uid)
    yield _record(b"gid", b"%d" % entry.gid)
    if entry.size:
        yield _record(b"size", b"%d" % entry.size)
    if entry.same:
        yield _record(_SAME, b"1")


def _record(key: bytes, value: bytes) -> bytes:
    """``LENGTH KEY=VALUE`` and a new line; the length counts its own digits."""
    bare = len(key) + len(value) + 3
    length = bare + len(str(bare))
    length += len(str(length)) - len(str(bare))
    return b"%d %s=%s\n" % (length, key, value)


def _header(kind: bytes, path: bytes, target: bytes, mode: int, size: int) -> bytes:
    names = path[:_HEADER_NAMES].ljust(_HEADER_NAMES, b"\0"), target[:_HEADER_NAMES].ljust(_HEADER_NAMES, b"\0")
    numbers = b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode & 0o7777, 0, 0, size & 0o77777777777, 0)
    rest = kind + names[1] + b"ustar\00000"
    block = (names[0] + numbers + b" " * 8 + rest).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


# reading


class Reader:
    """Reads a descriptor with ``pread``, so it can be read again. Everything raises Damaged."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = os.fstat(fd).st_size

    def finished(self) -> bool:
        """Whether a machine has written all of it."""
        try:
            first, _ = next(iter(self))
        except (Damaged, StopIteration):
            return False
        return (first.kind, first.path) == (FILE, MARKER)

    def __iter__(self) -> Iterator[tuple[Entry, int]]:
        """Each entry, with the offset of its data."""
        offset = 0
        while True:
            entry, offset = self._entry(offset)
            if entry is None:
                return
            data, offset = offset, offset + -(-entry.size // BLOCK) * BLOCK
            if offset > self._size:
                raise Damaged("it ends within a file")
            yield entry, data

    def _block(self, offset: int) -> bytes:
        block = os.pread(self._fd, BLOCK, offset)
        if len(block) != BLOCK:
            raise Damaged("it ends too early")
        return block

    def _entry(self, offset: int) -> tuple[Entry | None, int]:
        records: dict[bytes, bytes] = {}
        while True:
            block = self._block(offset)
            offset += BLOCK
            if not any(block):
                return None, offset
            _check(block)
            kind = block[156:157]
            if kind not in (b"x", b"g"):
                return _entry_of(block, records), offset
            size = _octal(block[124:136])
            if size > _PAX_MAX:
                raise Damaged("a header is too long")
            text = os.pread(self._fd, size, offset)
            if len(text) != size:
                raise Damaged("it ends within a header")
            if kind == b"x":
                records.update(_parse(text))
            offset += -(-size // BLOCK) * BLOCK


def _check(block: bytes) -> None:
    blank = block[:148] + b" " * 8 + block[156:]
    if block[257:262] != b"ustar" or _octal(block[148:156]) != sum(blank):
        raise Damaged("a header is damaged")


def _octal(field: bytes) -> int:
    text = field.split(b"\0", 1)[0].strip(b" ")
    if not text:
        return 0
    if text.strip(b"01234567"):
        raise Damaged("a number is none")
    return int(text, 8)


def _parse(text: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    while text:
        digits, space, _ = text.partition(b" ")
        length = _decimal(digits, 8) if space else 0
        record = text[len(digits) + 1 : length]
        key, equals, value = record[:-1].partition(b"=")
        if length > len(text) or not equals or record[-1:] != b"\n":
            raise Damaged("a record is malformed")
        found[key] = value
        text = text[length:]
    return found


def _decimal(text: bytes, most: int = 20) -> int:
    """No more digits than any number of ours has: Python would take very long for very many."""
    if not 0 < len(text) <= most or text.strip(b"0123456789"):
        raise Damaged("a number is none")
    return int(text)


def _mtime_ns(text: bytes) -> int:
    whole, _, fraction = text.partition(b".")
    sign = -1 if whole[:1] == b"-" else 1
    rest = _decimal(fraction[:9].ljust(9, b"0")) if fraction else 0
    return sign * (_decimal(whole.lstrip(b"-"), 12) * 10**9 + rest)


def _entry_of(block: bytes, records: dict[bytes, bytes]) -> Entry:
    kind = block[156:157]
    kind = FILE if kind in (b"\0", b"7") else kind
    prefix, name = (part.split(b"\0", 1)[0] for part in (block[345:500], block[:100]))
    path = records.get(b"path", prefix + b"/" + name if prefix else name)
    target = records.get(b"linkpath", block[157:257].split(b"\0", 1)[0])
    if b"\0" in path + target or max(len(path), len(target)) > NAME_MAX:
        raise Damaged("a name is none")
    size = _decimal(records[b"size"]) if b"size" in records else _octal(block[124:136])
    same = _SAME in records
    uid = _decimal(records[b"uid"], 10) if b"uid" in records else _octal(block[108:116])
    gid = _decimal(records[b"gid"], 10) if b"gid" in records else _octal(block[116:124])
    if max(uid, gid) >= _NO_ID:
        raise Damaged("an owner is none")
    return Entry(
        kind=kind,
        path=path,
        target=target,
        size=size if kind == FILE and not same else 0,
        mtime_ns=_mtime_ns(records[b"mtime"]) if b"mtime" in records else _octal(block[136:148]) * 10**9,
        mode=_octal(block[100:108]) & 0o7777,
        uid=uid,
        gid=gid,
        same=same,
    )
