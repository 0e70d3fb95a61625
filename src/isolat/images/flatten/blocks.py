"""The blocks of the file that is made: data goes to its end as it arrives; what turns out to be hidden is taken out.

Layers are read from the oldest on, once, so data is written that a later layer deletes or replaces. Its blocks are
punched out at the end of that layer, which gives the disk's room back and makes sure that not a byte of a deleted file
is in an image (fallocate(2), FALLOC_FL_PUNCH_HOLE); at the end blocks from the file's end are moved into the gaps.
"""

from __future__ import annotations

import ctypes
import errno
import os

from isolat.images.flatten.bad import Bad
from isolat.images.flatten.pax import Segments
from isolat.images.flatten.tree import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BITS = 12
BLOCK = 1 << BITS
BLOCKS_MAX = (1 << 32) - 2  # block addresses have 32 bits, and all of them set means a hole
CHUNK_BITS_MAX = 20
_BUFFER = 1 << 20
_DIRECT = 256 << 10  # pieces from here on are written without being copied together
_TRIES = 64
_MAP_COST = 8  # what an entry of a chunk map counts against bytes of chunks: the map is always read, holes never are
_PUNCH = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


class Chunks:
    """Where a sparse file's data lies: chunks of ``BLOCK << bits`` bytes.

    ``runs`` are of (first chunk, how many, first block counted from the file's own start). All else is holes.
    """

    __slots__ = ("bits", "count", "runs")

    def __init__(self, bits: int, count: int, runs: list[tuple[int, int, int]]) -> None:
        self.bits = bits
        self.count = count
        self.runs = runs


class Blocks:
    """``descriptor`` is an empty file. Raises Bad (``excess``) when more than ``most`` bytes would be written."""

    def __init__(self, descriptor: int, most: int, excess: str = "too-large") -> None:
        self.descriptor = descriptor
        self.next = 1  # the first block is the superblock's
        self.most = min(most >> BITS, BLOCKS_MAX)
        self._excess = excess
        self._buffer = memoryview(bytearray(_BUFFER))
        self._filled = 0
        self._written = BLOCK  # up to here the file is written, after it comes what is in the buffer
        self._gaps: list[tuple[int, int]] = []

    @property
    def has_gaps(self) -> bool:
        return bool(self._gaps)

    def reserve(self, blocks: int) -> int:
        start = self.next
        self.next += blocks
        if self.next > self.most:
            room = self._excess == "no-space"
            what = (
                "there is no room left on the disk for an image of more than"
                if room
                else "the image becomes larger than"
            )
            raise Bad(self._excess, f"{what} {self.most << BITS} bytes")
        return start

    # Data as it arrives

    def append(self, pieces: Iterable[memoryview], size: int) -> int:
        """Write ``size`` bytes and fill the last block up with zeros; the first block's number."""
        start = self.reserve((size + BLOCK - 1) >> BITS)
        for piece in pieces:
            self._put(piece)
        padding = -size % BLOCK
        if padding:
            self._put(memoryview(bytes(padding)))
        return start

    def _put(self, piece: memoryview) -> None:
        filled, size = self._filled, len(piece)
        if filled + size > _BUFFER:
            self.flush()
            filled = 0
        if size >= _DIRECT:
            self.flush()
            self.write(piece, self._written)
            self._written += size
        else:
            self._buffer[filled : filled + size] = piece
            self._filled = filled + size

    def flush(self) -> None:
        if self._filled:
            self.write(self._buffer[: self._filled], self._written)
            self._written += self._filled
            self._filled = 0

    def write(self, data: memoryview | bytes | bytearray, at: int) -> None:
        """pwrite(2) to the end. Raises Bad (too-large, no-space)."""
        rest = memoryview(data)
        try:
            while rest:
                done = os.pwrite(self.descriptor, rest, at)
                rest, at = rest[done:], at + done
        except OSError as error:
            raise write_failed(error) from error

    def append_sparse(
        self, take: Callable[[int], Iterator[memoryview]], segments: Segments, size: int
    ) -> tuple[int, int, Chunks]:
        """Write the data of a sparse file; its first block, how many, and where in the file they belong.

        ``take`` gives the next bytes of the data. What no piece covers inside of a chunk stays a hole of this file.
        """
        chunks = _plan(segments, size)
        blocks = _blocks_of(chunks, size)
        self.flush()
        start = self.reserve(blocks)
        places = iter(chunks.runs)
        first, count, at = next(places, (0, 0, 0))
        bits = BITS + chunks.bits
        for offset, length in segments:
            # A run ends only where a whole chunk is free of data, so a piece never leaves its run
            while offset >> bits >= first + count:
                first, count, at = next(places)
            position = ((start + at) << BITS) + offset - (first << bits)
            for piece in take(length):
                self.write(piece, position)
                position += len(piece)
        self._written = self.next << BITS
        return start, blocks, chunks

    # What is hidden

    def free(self, nodes: Iterable[Node]) -> None:
        """Punch out what these had."""
        self.flush()
        found = _merged((node.start, node.blocks) for node in nodes if node.blocks)
        for start, count in found:
            if _libc.fallocate(self.descriptor, _PUNCH, start << BITS, count << BITS) != 0:
                self._blank(start, count)
        self._gaps += found

    def _blank(self, start: int, count: int) -> None:
        """Zeros, where the file system can't make holes."""
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise write_failed(OSError(number, os.strerror(number)))
        zeros = memoryview(bytes(_BUFFER))
        for at in range(start << BITS, (start + count) << BITS, _BUFFER):
            self.write(zeros[: min(_BUFFER, ((start + count) << BITS) - at)], at)

    def compact(self, nodes: Iterable[Node]) -> None:
        """Move blocks from the end into the gaps, and let the file end after the last block that is used."""
        self.flush()
        everything = sorted((node for node in nodes if node.blocks), key=lambda node: node.start)
        used = everything.copy()
        for start, count in _merged(self._gaps):
            self._refill(used, start, count)
        self._gaps.clear()
        self.next = max((node.start + node.blocks for node in everything), default=1)
        os.ftruncate(self.descriptor, self.next << BITS)
        self._written = self.next << BITS

    def _refill(self, used: list[Node], start: int, count: int) -> None:
        """``used`` is what has not been moved yet, in the order of the file."""
        tries, index = 0, len(used) - 1
        while count and index >= 0 and tries < _TRIES and used[index].start > start:
            node = used[index]
            if node.blocks <= count:
                self._move(node, start)
                start, count = start + node.blocks, count - node.blocks
                del used[index]  # near the end: cheap
            else:
                tries += 1
            index -= 1

    def _move(self, node: Node, start: int) -> None:
        source, target, left = node.start << BITS, start << BITS, node.blocks << BITS
        while left:
            data = os.pread(self.descriptor, min(left, _BUFFER), source)
            if not data:
                break  # behind the end of the file there are holes, too
            if data.count(0) != len(data):
                self.write(data, target)
            source, target, left = source + len(data), target + len(data), left - len(data)
        _libc.fallocate(self.descriptor, _PUNCH, node.start << BITS, node.blocks << BITS)
        node.start = start


def write_failed(error: OSError) -> Bad:
    if error.errno == errno.EFBIG:
        return Bad("too-large", "the image becomes larger than what may be written")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Bad("no-space", "there is no room left for the image")
    return Bad("write-failed", f"the image could not be written: {os.strerror(error.errno or 0)}")


def _merged(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, count in sorted(extents):
        if found and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((start, count))
    return found


def _plan(segments: Segments, size: int) -> Chunks:
    """The size of chunk with which data and map together are smallest. One chunk holds all of a file without data."""
    best, cost = _runs(segments, size, CHUNK_BITS_MAX), 0
    cost = _cost(best, size)
    for bits in range(CHUNK_BITS_MAX):
        if _count(size, bits) * _MAP_COST >= cost:
            continue
        found = _runs(segments, size, bits)
        if _cost(found, size) <= cost:
            best, cost = found, _cost(found, size)
    return best


def _cost(chunks: Chunks, size: int) -> int:
    return (_blocks_of(chunks, size) << BITS) + _MAP_COST * chunks.count


def _count(size: int, bits: int) -> int:
    return (size + (BLOCK << bits) - 1) >> (BITS + bits)


def _runs(segments: Segments, size: int, bits: int) -> Chunks:
    shift = BITS + bits
    runs: list[tuple[int, int, int]] = []
    first = count = at = 0
    for offset, length in segments:
        begin, end = offset >> shift, ((offset + length - 1) >> shift) + 1
        if count and begin <= first + count:
            count = max(count, end - first)
            continue
        if count:
            runs.append((first, count, at))
            at += count << bits
        first, count = begin, end - begin
    if count:
        runs.append((first, count, at))
    return Chunks(bits, _count(size, bits), runs)


def _blocks_of(chunks: Chunks, size: int) -> int:
    """All chunks with data, the file's last one only as far as the file goes."""
    if not chunks.runs:
        return 0
    first, count, at = chunks.runs[-1]
    if first + count < chunks.count:
        return at + (count << chunks.bits)
    return at + ((size - (first << (BITS + chunks.bits)) + BLOCK - 1) >> BITS)
