"""The first of the two confined processes: opens the compression of each layer and checks the blob's own digest.

It is a process of its own because decompressors are C that reads a stranger's bytes. One that is taken over can hand on
whatever it likes, and that is no more than a layer may hold anyway: it goes through the same reader, and its sum is
compared with the image's (``diff_id``). It also keeps a second processor busy.

What it hands on, through a pipe, for each layer: stretches of at most ``STRETCH`` bytes, each after its length in four
bytes; length 0 ends the layer.
"""

from __future__ import annotations

import hashlib
import os
import struct

from isolat.images.flatten.bad import Bad

TYPE_CHECKING = False
if TYPE_CHECKING:  # what these import takes as long as all the rest
    from collections.abc import Callable, Generator, Iterator
    from typing import Any, Protocol

    class _Opens(Protocol):
        """One member being opened: what comes out is bounded, what stays inside comes out when asked with nothing."""

        @property
        def eof(self) -> bool: ...
        @property
        def unused_data(self) -> bytes: ...
        @property
        def hungry(self) -> bool: ...

        def decompress(self, data: bytes, most: int, /) -> bytes: ...


STRETCH = 256 << 10
LENGTH = struct.Struct("<I")
_READ = 256 << 10
_WINDOW_MAX = 128 << 20  # what zstd itself takes by default
_GZIP, _ZSTD, _ZSTD_SKIPPABLE = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
_OTHERS = ((b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"PK\x03\x04", "zip"), (b"\x04\x22\x4d\x18", "lz4"))


def kind_of(start: bytes) -> str:
    """gzip, zstd or tar, by the first bytes. Raises Bad (bad-compression) for what no layer may be."""
    if start[:2] == _GZIP:
        return "gzip"
    if start[:4] == _ZSTD or (start[1:4] == _ZSTD_SKIPPABLE and start[:1] and 0x50 <= start[0] <= 0x5F):
        return "zstd"
    for magic, name in _OTHERS:
        if start.startswith(magic):
            raise Bad("bad-compression", f"the layer is {name}; layers are tar, tar+gzip or tar+zstd")
    return "tar"


class Openers:
    """The decompressors that these layers need, imported before the process is locked."""

    def __init__(self, kinds: set[str]) -> None:
        self._gzip = _gzip() if "gzip" in kinds else None
        self._zstd = _zstd() if "zstd" in kinds else None

    def open(self, kind: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The uncompressed bytes. Raises Bad (bad-compression, truncated)."""
        if kind == "tar":
            return pieces
        if kind == "gzip":
            assert self._gzip is not None
            return members(self._gzip, pieces)
        assert self._zstd is not None
        return _frames(self._zstd, pieces)


def _gzip() -> Callable[[], _Opens]:
    """igzip is twice as quick as zlib; where it isn't installed zlib does."""
    try:
        from isal import igzip_lib

        return lambda: Member(igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP))
    except ImportError:
        import zlib

        return lambda: _Zlib(zlib.decompressobj(31))


def _zstd() -> Callable[[Any], Any]:
    try:
        import zstandard
    except ImportError:
        raise Bad("no-zstd", "the Python package zstandard is not installed") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)
    return lambda source: decompressor.stream_reader(source, read_size=_READ, read_across_frames=True)


class Member:
    """The manners of igzip, bz2 and lzma: what is not used is kept; asked with nothing it goes on."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    @property
    def hungry(self) -> bool:
        return bool(self._inner.needs_input)

    def decompress(self, data: bytes, most: int, /) -> bytes:
        return bytes(self._inner.decompress(data, most))


class _Zlib:
    """zlib, with igzip's manners."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._full = False

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    @property
    def hungry(self) -> bool:
        return not self._full and not self._inner.unconsumed_tail

    def decompress(self, data: bytes, most: int, /) -> bytes:
        found = bytes(self._inner.decompress(self._inner.unconsumed_tail + data, most))
        self._full = len(found) == most
        return found


def members(make: Callable[[], _Opens], pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Members one after the other (RFC 1952, 2.2; so do bzip2 and xz)."""
    data, stream = b"", make()
    fresh = True
    while True:
        if not data and stream.hungry:
            data = next(pieces, b"")
            if not data:
                if fresh:
                    return
                raise Bad("truncated", "the compressed data ends too early")
        fresh = False
        try:
            found = stream.decompress(data, STRETCH)
        except Exception as error:
            raise Bad("bad-compression", f"the compressed data is damaged: {error}") from error
        data = b""
        if found:
            yield found
        if stream.eof:
            data, stream, fresh = stream.unused_data, make(), True


class _Pieces:
    """What zstandard reads from; ``whole``: what has been read ends with a frame."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""
        self._ends = _Ends()

    def read(self, size: int = -1) -> bytes:
        found = self._rest
        if not found and (found := next(self._pieces, b"")):
            self._ends.take(found)
        if 0 <= size < len(found):
            found, self._rest = found[:size], found[size:]
        else:
            self._rest = b""
        return found

    @property
    def whole(self) -> bool:
        return not self._rest and self._ends.whole


class _Ends:
    """Where frames end, by their headers alone (RFC 8878, 3.1.1 and 3.1.2).

    zstandard's reader says nothing of a last frame that is cut off, and its other ways to decompress have no bound.
    """

    def __init__(self) -> None:
        self._steps = _steps()
        self._head = b""
        self._turn(next(self._steps))

    def _turn(self, step: int) -> None:
        self._wanted, self._passing, self.whole = (max(0, step), max(0, -step), step == _MAGIC_BYTES)

    def take(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._passing:
                step = min(self._passing, len(data) - at)
                self._passing -= step
            else:
                step = min(self._wanted - len(self._head), len(data) - at)
                self._head += data[at : at + step]
                self.whole = False
            at += step
            if not self._passing and len(self._head) == self._wanted:
                head, self._head = self._head, b""
                self._turn(self._steps.send(head))


_MAGIC_BYTES = 4  # asked for between frames only: nothing else is as long
_BLOCK_HEAD = 3
_RLE = 1
_KEY_BYTES, _SIZE_BYTES = (0, 1, 2, 4), (0, 2, 4, 8)


def _steps() -> Generator[int, bytes, None]:
    """What stands in frames, one after the other: how many bytes are wanted, or, negative, are passed over."""
    while True:
        magic = yield _MAGIC_BYTES
        if magic[1:] == _ZSTD_SKIPPABLE:
            low = yield 2
            high = yield 2
            yield from _over(int.from_bytes(low + high, "little"))
            continue
        if magic != _ZSTD:
            raise Bad("bad-compression", "something that is no frame follows the zstd data")
        (told,) = yield 1
        single = told >> 5 & 1
        sizes = _SIZE_BYTES[told >> 6] or single
        yield from _over(1 - single + _KEY_BYTES[told & 3] + sizes)
        last = 0
        while not last:
            block = int.from_bytes((yield _BLOCK_HEAD), "little")
            last = block & 1
            yield from _over(1 if block >> 1 & 3 == _RLE else block >> 3)
        yield from _over(4 if told >> 2 & 1 else 0)


def _over(size: int) -> Iterator[int]:
    if size:
        yield -size


def _frames(make: Callable[[Any], Any], pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Zstandard frames one after the other, skippable ones too (RFC 8878, 3.1)."""
    source = _Pieces(pieces)
    reader = make(source)
    while True:
        try:
            found = reader.read(STRETCH)
        except Bad:
            raise
        except Exception as error:
            raise Bad("bad-compression", f"the zstd data is damaged: {error}") from error
        if not found:
            break
        yield found
    if not source.whole:
        raise Bad("truncated", "the compressed data ends too early")


class Blob:
    """One layer as it came: read once, from its start to its end, its sum taken on the way."""

    def __init__(self, descriptor: int, digest: str, told: Callable[[int], None]) -> None:
        self._descriptor = descriptor
        self._expected = digest.partition(":")[2]
        self._sum = hashlib.sha256()
        self._told = told
        self._at = 0
        self.kind = kind_of(os.pread(descriptor, 8, 0))

    def pieces(self) -> Iterator[bytes]:
        while piece := os.pread(self._descriptor, _READ, self._at):
            self._at += len(piece)
            self._sum.update(piece)
            self._told(len(piece))
            yield piece

    def finish(self) -> None:
        """Read what nobody wanted, and compare. Raises Bad (digest-mismatch)."""
        for _ in self.pieces():
            pass
        found = self._sum.hexdigest()
        if found != self._expected:
            raise Bad("digest-mismatch", f"the blob has the digest sha256:{found}")


def hand_on(blob: Blob, openers: Openers, out: int, allowed: int) -> int:
    """One layer into the pipe ``out``; how many bytes it was. Raises Bad, and BrokenPipeError when nobody reads on.

    Whatever fails: a blob that is not what its digest says is the reason that is told.
    """
    total = 0
    try:
        for stretch in openers.open(blob.kind, blob.pieces()):
            total += len(stretch)
            if total > allowed:
                raise Bad("too-large", "the layers are larger than is allowed when they are uncompressed")
            _write(out, LENGTH.pack(len(stretch)), stretch)
    except (Bad, BrokenPipeError):
        blob.finish()
        raise
    blob.finish()
    _write(out, LENGTH.pack(0), b"")
    return total


def _write(out: int, head: bytes, data: bytes) -> None:
    done = os.writev(out, (head, data))
    if done == len(head) + len(data):
        return
    rest = memoryview(head + data)[done:]
    while rest:
        rest = rest[os.write(out, rest) :]
