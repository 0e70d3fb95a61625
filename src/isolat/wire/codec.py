"""Frames to bytes and back, without any I/O (docs/protocol.md).

The command's hot path imports this module, so it uses neither ``struct`` nor ``enum`` nor ``dataclasses``:
``int.to_bytes`` is as quick and costs no import.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from isolat.errors import ProtocolError
from isolat.wire import kinds as k

Value = int | bytes | str | list[tuple[int, "Value"]]
Fields = list[tuple[int, Value]]
_Int = int  # Frame has methods with these names
_Bytes = bytes


class Frame:
    """One frame. ``fields`` is empty for the raw kinds, whose bytes are in ``body``."""

    __slots__ = ("_fields", "body", "id", "kind", "nfds")

    def __init__(self, kind: int, id: int, body: bytes, nfds: int = 0) -> None:
        self.kind = kind
        self.id = id
        self.body = body
        self.nfds = nfds
        self._fields: dict[int, list[bytes]] | None = None

    @property
    def fields(self) -> dict[int, list[bytes]]:
        if self._fields is None:
            self._fields = parse_fields(self.body)
        return self._fields

    def all(self, tag: _Int) -> list[_Bytes]:
        return self.fields.get(tag, [])

    def bytes(self, tag: int, default: bytes = b"") -> bytes:
        found = self.fields.get(tag)
        return found[0] if found else default

    def text(self, tag: int, default: str = "") -> str:
        found = self.fields.get(tag)
        return found[0].decode("utf-8", "replace") if found else default

    def int(self, tag: int, default: int = 0) -> int:
        found = self.fields.get(tag)
        return read_int(found[0]) if found else default

    def ints(self, tag: _Int) -> list[_Int]:
        return [read_int(value) for value in self.all(tag)]

    def nested(self, tag: _Int) -> list[Frame]:
        """The nested fields of this tag, each as a frame of kind 0 to read with the same methods."""
        return [Frame(0, 0, value) for value in self.all(tag)]

    def __repr__(self) -> str:
        name = k.KIND_NAMES.get(self.kind, str(self.kind))
        return f"<Frame {name} id={self.id} body={len(self.body)} nfds={self.nfds}>"


def read_int(value: bytes) -> int:
    if len(value) != 8:
        raise ProtocolError(f"an integer field has {len(value)} bytes instead of 8")
    return int.from_bytes(value, "little", signed=True)


def parse_fields(body: bytes) -> dict[int, list[bytes]]:
    """Every field of a body by its tag, in order. Raises ProtocolError where a field overruns the body."""
    fields: dict[int, list[bytes]] = {}
    at, end = 0, len(body)
    while at < end:
        if end - at < 5:
            raise ProtocolError("a field's header overruns its body")
        length = int.from_bytes(body[at + 1 : at + 5], "little")
        start = at + 5
        if length > end - start:
            raise ProtocolError("a field overruns its body")
        fields.setdefault(body[at], []).append(body[start : start + length])
        at = start + length
    return fields


def pack_fields(fields: Iterable[tuple[int, Value]]) -> bytes:
    out = bytearray()
    for tag, value in fields:
        if isinstance(value, int):
            data = value.to_bytes(8, "little", signed=True)
        elif isinstance(value, str):
            data = value.encode("utf-8", "surrogateescape")
        elif isinstance(value, bytes):
            data = value
        else:
            data = pack_fields(value)
        out.append(tag)
        out += len(data).to_bytes(4, "little")
        out += data
    return bytes(out)


def pack_raw(kind: int, body: bytes, id: int = 0, nfds: int = 0) -> bytes:
    if len(body) > k.MAX_BODY_BYTES:
        raise ProtocolError(f"a frame of {len(body)} bytes is longer than the protocol allows ({k.MAX_BODY_BYTES})")
    return len(body).to_bytes(4, "little") + bytes((kind, 0, nfds & 255, nfds >> 8)) + id.to_bytes(4, "little") + body


def pack(kind: int, id: int = 0, fields: Iterable[tuple[int, Value]] = (), nfds: int = 0) -> bytes:
    """A whole frame. Raises ProtocolError when it would be longer than the protocol allows."""
    return pack_raw(kind, pack_fields(fields), id, nfds)


def pack_data(stream: int, data: bytes) -> bytes:
    return pack_raw(k.DATA, bytes((stream,)) + data)


def pack_eof(stream: int) -> bytes:
    return pack_raw(k.EOF, bytes((stream,)))


class Decoder:
    """Turns received bytes into frames. Bounded: it never holds more than one frame and what follows it in one read."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield every frame that is complete now. Raises ProtocolError on a malformed header."""
        self._buffer += data
        at, buffer = 0, self._buffer
        try:
            while len(buffer) - at >= k.HEADER_BYTES:
                length = int.from_bytes(buffer[at : at + 4], "little")
                nfds = int.from_bytes(buffer[at + 6 : at + 8], "little")
                if length > k.MAX_BODY_BYTES or nfds > k.MAX_DESCRIPTORS or buffer[at + 5]:
                    raise ProtocolError("a frame's header is malformed")
                end = at + k.HEADER_BYTES + length
                if len(buffer) < end:
                    break
                id = int.from_bytes(buffer[at + 8 : at + 12], "little")
                frame = Frame(buffer[at + 4], id, bytes(buffer[at + k.HEADER_BYTES : end]), nfds)
                at = end
                yield frame
        finally:
            del buffer[:at]
