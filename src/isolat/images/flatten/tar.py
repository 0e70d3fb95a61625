"""A layer's archive, entry by entry: everything that tar has ever been, out of a stranger's hands.

Why not the standard library's tarfile: it is several times as slow, it seeks, it forgives what must not be forgiven
here, and it keeps every entry. What is read: V7, ustar with prefix, star, GNU (long names and links ``L``/``K``, old
sparse ``S``), PAX (``x``; global headers ``g`` are skipped, as by Docker and containerd) with sparse files of the
formats 0.0, 0.1 and 1.0. Sources: pax(1); GNU tar's manual, "Standard Format" and "Storing Sparse Files"; where the two
leave a choice it is the one of Go's archive/tar, with which all other engines read layers.

Every entry has sane numbers and lengths; names and link targets are bytes that nobody has looked at yet: merge.py does.
"""

from __future__ import annotations

import struct
import zlib

from isolat.images.flatten.bad import Bad
from isolat.images.flatten.numbers import decimal, moment, number
from isolat.images.flatten.pax import OFFSET_MAX, SEGMENTS_MAX, Records, Segments, checked, segments, xattrs
from isolat.images.flatten.source import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FILE, LINK, SYMLINK, CHAR, BLOCK, DIRECTORY, FIFO = "file", "link", "symlink", "char", "block", "directory", "fifo"
ID_MAX = (1 << 32) - 1
MAJOR_MAX, MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1  # dev_t of the kernel (linux/kdev_t.h)

_BLOCK_BYTES = 512
_ZEROS = bytes(_BLOCK_BYTES)
_SPECIAL_MAX = 1 << 20  # bytes of one extended header; Go has the same bound
_MAP_BLOCKS_MAX = SEGMENTS_MAX * 42 // _BLOCK_BYTES
_ADLER = 65521

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_SPARSE_AT, _SPARSE_MORE_AT, _REAL_SIZE_AT = 386, 482, 483
_MORE_PIECES, _MORE_MORE_AT = 21, 504
_POSIX, _GNU = b"ustar\x0000", b"ustar  \0"
_STAR_AT, _STAR, _STAR_PREFIX = 508, b"tar\0", slice(345, 476)

_KINDS = {
    b"0": FILE, b"\0": FILE, b"7": FILE, b"S": FILE,
    b"1": LINK, b"2": SYMLINK, b"3": CHAR, b"4": BLOCK, b"5": DIRECTORY, b"6": FIFO,
}  # fmt: skip
_CACHE_MAX = 10_000


class Entry:
    """One member. ``size`` is the file's; ``stored`` how much of it lies in the archive (less where it has holes)."""

    __slots__ = (
        "gid", "kind", "link", "major", "minor", "mode", "mtime_ns", "mtime_s", "name", "segments", "size", "stored",
        "uid", "xattrs",
    )  # fmt: skip

    name: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    stored: int
    mtime_s: int
    mtime_ns: int
    link: bytes
    major: int
    minor: int
    xattrs: bytes
    segments: Segments | None


class Bounds:
    """How much of what one archive may claim; ``entries_left`` goes on counting over all layers."""

    __slots__ = ("entries_left", "file_bytes", "xattr_bytes")

    def __init__(self, entries: int, file_bytes: int, xattr_bytes: int) -> None:
        self.entries_left = entries
        self.file_bytes = file_bytes
        self.xattr_bytes = xattr_bytes


class Reader:
    """The entries of one archive. What of an entry's data nobody takes is skipped."""

    def __init__(self, source: Source, bounds: Bounds) -> None:
        self._source = source
        self._bounds = bounds
        self._left = 0  # of the entry's data
        self._padding = 0
        self._cache: dict[bytes, int] = {}
        self.name = b""  # of the entry at hand, for whoever has to tell of an error

    def data(self, size: int) -> Iterator[memoryview]:
        """The next ``size`` bytes of the entry's data."""
        if size > self._left:
            raise Bad("truncated", "more data is asked for than the entry has")
        self._left -= size
        return self._source.pieces(size)

    def __iter__(self) -> Iterator[Entry]:
        while (block := self._next_header()) is not None:
            records, long_name, long_link = None, b"", b""
            while (kind := block[156:157]) in (b"x", b"g", b"L", b"K"):
                content = self._special(block)
                if kind == b"x":
                    records = Records(content)
                elif kind == b"L":
                    long_name = content.partition(b"\0")[0]
                elif kind == b"K":
                    long_link = content.partition(b"\0")[0]
                following = self._next_header()
                if following is None:
                    raise Bad("truncated", "the archive ends after an extended header")
                block = following
            yield self._entry(block, records, long_name, long_link)
        self._source.drain()

    def _next_header(self) -> bytes | None:
        """The next block that is no padding, its sum checked; None at the end."""
        self._source.skip(self._left + self._padding)
        self._left = self._padding = 0
        block = self._source.block(_BLOCK_BYTES)
        if not block:
            return None
        if block[0] == 0 and block == _ZEROS:
            if self._source.block(_BLOCK_BYTES) not in (b"", _ZEROS):
                raise Bad("bad-header", "something follows half of the archive's end")
            return None
        self._bounds.entries_left -= 1
        if self._bounds.entries_left < 0:
            raise Bad("too-many-entries", "the layers have more entries than are allowed")
        _check_sum(block)
        return block

    def _special(self, block: bytes) -> bytes:
        size = self._number(block[124:136], "size", _SPECIAL_MAX)
        content = self._source.exactly(size)
        self._source.skip(-size % _BLOCK_BYTES)
        return content

    def _number(self, field: bytes, what: str, most: int, least: int = 0) -> int:
        value = self._cache.get(field)
        if value is None:
            try:
                value = number(field)
            except ValueError:
                raise Bad("bad-header", f"the {what} is no number: {field!r}", self.name) from None
            if len(self._cache) >= _CACHE_MAX:
                self._cache.clear()
            self._cache[field] = value
        if not least <= value <= most:
            word = "bad-header" if what != "size" else "too-large" if value > most else "bad-size"
            raise Bad(word, f"the {what} is {value}; it must be {least} to {most}", self.name)
        return value

    def _entry(self, block: bytes, records: Records | None, long_name: bytes, long_link: bytes) -> Entry:
        name, mode, uid, gid, size, mtime, _, kind, link, magic, major, minor, prefix = _HEADER.unpack(block)
        entry = Entry()
        self.name = entry.name = long_name or _joined(block, name, magic, prefix)
        found = _KINDS.get(kind)
        if found is None:
            raise Bad("bad-header", f"there is no entry of the type {kind!r}", self.name)
        entry.kind = found
        entry.mode = self._number(mode, "mode", OFFSET_MAX) & 0o7777
        entry.uid = self._number(uid, "uid", ID_MAX) if not records or b"uid" not in records.values else 0
        entry.gid = self._number(gid, "gid", ID_MAX) if not records or b"gid" not in records.values else 0
        entry.mtime_s, entry.mtime_ns = self._number(mtime, "mtime", OFFSET_MAX, -OFFSET_MAX), 0
        entry.link = long_link or link.partition(b"\0")[0]
        entry.xattrs, entry.segments = b"", None
        entry.major = entry.minor = 0
        if found in (CHAR, BLOCK):
            entry.major = self._number(major, "major number", MAJOR_MAX)
            entry.minor = self._number(minor, "minor number", MINOR_MAX)
        # A link's size is that of what it leads to, a directory's is old tars' reckoning: no data follows either
        entry.size = entry.stored = self._number(size, "size", self._bounds.file_bytes) if found is FILE else 0
        if records is not None:
            self._overlay(entry, records, long_name, long_link)
        self._left, self._padding = entry.stored, -entry.stored % _BLOCK_BYTES
        if kind == b"S":
            self._old_sparse(entry, block)
        elif kind == b"\0" and entry.name.endswith(b"/"):
            entry.kind = DIRECTORY
        if records is not None and found is FILE:
            self._sparse(entry, records)
        return entry

    def _overlay(self, entry: Entry, records: Records, long_name: bytes, long_link: bytes) -> None:
        """What an extended header says instead of the header."""
        values = records.values
        if values.get(b"path") and not long_name:
            self.name = entry.name = values[b"path"]
        if values.get(b"linkpath") and not long_link:
            entry.link = values[b"linkpath"]
        if values.get(b"uid"):
            entry.uid = decimal(values[b"uid"], ID_MAX)
        if values.get(b"gid"):
            entry.gid = decimal(values[b"gid"], ID_MAX)
        if values.get(b"mtime"):
            entry.mtime_s, entry.mtime_ns = moment(values[b"mtime"])
        if values.get(b"size") and entry.kind is FILE:
            entry.size = entry.stored = decimal(values[b"size"], OFFSET_MAX)
            self._check_size(entry)
        entry.xattrs = xattrs(values, self._bounds.xattr_bytes)

    def _check_size(self, entry: Entry) -> None:
        if entry.size > self._bounds.file_bytes:
            raise Bad("too-large", f"a file of {entry.size} bytes; at most {self._bounds.file_bytes} are allowed")

    def _sparse(self, entry: Entry, records: Records) -> None:
        """GNU tar's sparse files in PAX: 0.0 and 0.1 have the map in the records, 1.0 has it before the data."""
        values = records.values
        if values.get(b"GNU.sparse.name"):
            self.name = entry.name = values[b"GNU.sparse.name"]
        size = values.get(b"GNU.sparse.realsize") or values.get(b"GNU.sparse.size")
        if not size:
            return
        entry.size = decimal(size, OFFSET_MAX)
        self._check_size(entry)
        if values.get(b"GNU.sparse.major") == b"1":
            entry.segments = segments(self._leading_map(), entry.size)
            entry.stored = self._left
        elif b"GNU.sparse.map" in values:
            text = values[b"GNU.sparse.map"]
            entry.segments = segments(text.split(b",") if text else (), entry.size)
        else:
            entry.segments = segments(records.map, entry.size)
        self._check_map(entry)

    def _leading_map(self) -> list[bytes]:
        """The decimal numbers, each on its line, that fill whole blocks before the data: how many pairs, the pairs."""
        text, wanted = b"", 1
        lines: list[bytes] = []
        for _ in range(_MAP_BLOCKS_MAX):
            if self._left < _BLOCK_BYTES:
                raise Bad("truncated", "a sparse map without its end", self.name)
            *more, text = (text + b"".join(self.data(_BLOCK_BYTES))).split(b"\n")
            lines += more
            if lines:
                wanted = 1 + 2 * decimal(lines[0], SEGMENTS_MAX)
            if len(lines) >= wanted:
                return lines[1:wanted]
        raise Bad("too-large", f"a sparse map of more than {SEGMENTS_MAX} pieces", self.name)

    def _old_sparse(self, entry: Entry, block: bytes) -> None:
        """GNU tar's own sparse type: four pieces in the header, further ones in blocks that follow."""
        found = self._pieces(block, _SPARSE_AT, 4)
        entry.size = self._number(block[_REAL_SIZE_AT : _REAL_SIZE_AT + 12], "size", self._bounds.file_bytes)
        more = block[_SPARSE_MORE_AT]
        while more:
            block = self._source.block(_BLOCK_BYTES)
            if not block:
                raise Bad("truncated", "the archive ends in the middle of a sparse map", self.name)
            found += self._pieces(block, 0, _MORE_PIECES)
            if len(found) > SEGMENTS_MAX:
                raise Bad("too-large", f"a sparse map of more than {SEGMENTS_MAX} pieces", self.name)
            more = block[_MORE_MORE_AT]
        entry.segments = checked(found, entry.size)
        self._check_map(entry)

    def _pieces(self, block: bytes, at: int, most: int) -> Segments:
        found = []
        for start in range(at, at + 24 * most, 24):
            offset, length = block[start : start + 12], block[start + 12 : start + 24]
            if not offset.strip(b"\0") or not length.strip(b"\0"):
                break
            found.append((self._number(offset, "offset", OFFSET_MAX), self._number(length, "length", OFFSET_MAX)))
        return found

    def _check_map(self, entry: Entry) -> None:
        assert entry.segments is not None
        if sum(length for _, length in entry.segments) != entry.stored:
            raise Bad("bad-size", "a sparse map that does not fit the data", self.name)


def _joined(block: bytes, name: bytes, magic: bytes, prefix: bytes) -> bytes:
    name = name.partition(b"\0")[0]
    if magic == _POSIX and prefix[0]:
        if block[_STAR_AT:] == _STAR:
            prefix = block[_STAR_PREFIX]
        prefix = prefix.partition(b"\0")[0]
        return prefix + b"/" + name if prefix else name
    return name


def _check_sum(block: bytes) -> None:
    """The sum of all bytes, those of the sum itself as blanks. Adler-32's low half is that sum, 20 times as quick."""
    field = block[148:156]
    try:
        stored = number(field)
    except ValueError:
        raise Bad("bad-header", "the archive has a header without a sum") from None
    blanked = 256 - sum(field)
    if ((zlib.adler32(block) & 0xFFFF) - 1 + blanked - stored) % _ADLER == 0:
        return
    # Some old tars added the bytes up as signed ones
    if sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]) + 256 == stored:
        return
    raise Bad("bad-header", "the archive has a header whose sum is wrong")
