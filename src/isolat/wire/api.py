"""The messages between a command and the daemon (docs/api.md): a length, JSON, and descriptors.

Both ends import this module. ``pack`` and ``Assembler`` do no I/O; ``send`` and ``Receiver`` are the
blocking helpers around them. A command's hot path passes through here, so ``_socket`` is used as it is, and
descriptors are packed with ``int.to_bytes`` instead of ``array``.
"""

from __future__ import annotations

import _socket
import sys

from isolat.wire import fastjson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from isolat.errors import ProtocolError

VERSION = 1
MAX_MESSAGE_BYTES = 16 << 20
MAX_DESCRIPTORS = 250  # the kernel takes 253 with one message
_HEADER_BYTES = 4
_READ_BYTES = 256 << 10
_INT_BYTES = 4
_ANCILLARY_BYTES = _socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES)


def _error(message: str) -> ProtocolError:
    from isolat.errors import ProtocolError  # not before it is needed: the error tree imports typing

    return ProtocolError(message)


def _too_long(length: int) -> ProtocolError:
    return _error(f"a message of {length} bytes is longer than the {MAX_MESSAGE_BYTES} allowed")


def request(verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The form of every request."""
    return {"v": VERSION, "verb": verb, "args": dict(args)}


def pack(message: Mapping[str, Any]) -> bytes:
    """A whole message. Raises ProtocolError when it has no JSON form or is too long."""
    try:
        body = fastjson.dumps(message).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise _error(f"a message cannot be sent: {error}") from None
    if len(body) > MAX_MESSAGE_BYTES:
        raise _too_long(len(body))
    return len(body).to_bytes(_HEADER_BYTES, "little") + body


def parse_request(message: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The verb and arguments of a request. Raises ProtocolError on another version or form."""
    version, verb, args = message.get("v"), message.get("verb"), message.get("args", {})
    if version != VERSION or isinstance(version, bool):
        raise _error(f"a request has version {version!r}; this daemon speaks {VERSION}")
    if not isinstance(verb, str) or not isinstance(args, dict):
        raise _error("a request needs a verb (text) and args (an object)")
    return verb, args


class Assembler:
    """Received bytes to messages.

    Feed it at most ``wanted`` bytes at a time: descriptors come with a message's first byte, so a read must
    never reach beyond a message's end.
    """

    __slots__ = ("_body", "_head", "wanted")

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._head = b""
        self._body: bytearray | None = None  # None while the header is being read
        self.wanted = _HEADER_BYTES

    @property
    def idle(self) -> bool:
        """True between two messages: here an end of the connection is a clean one."""
        return self._body is None and not self._head

    def feed(self, data: bytes) -> dict[str, Any] | None:
        """The message that ``data`` completes, or None. Raises ProtocolError on what is malformed."""
        self.wanted -= len(data)
        if self._body is not None:
            self._body += data
        else:
            self._head += data
            if self.wanted:
                return None
            self.wanted = int.from_bytes(self._head, "little")
            if self.wanted > MAX_MESSAGE_BYTES:
                raise _too_long(self.wanted)
            self._body = bytearray()
        if self.wanted:
            return None
        body = bytes(self._body)
        self._reset()
        return _parse(body)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        message = fastjson.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _error(f"a message is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise _error("a message is not a JSON object")
    return message


def send(sock: _socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Send a whole message with its descriptors, which stay open here. Raises ProtocolError, OSError."""
    if len(fds) > MAX_DESCRIPTORS:
        raise _error(f"{len(fds)} descriptors are more than the {MAX_DESCRIPTORS} a message can carry")
    data = pack(message)
    if fds:
        packed = b"".join(fd.to_bytes(_INT_BYTES, sys.byteorder) for fd in fds)
        sent = sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)])
        data = data[sent:]
    if data:  # an empty send fails where the peer has already answered and closed
        sock.sendall(data)


class Receiver:
    """Receives messages from a blocking socket. One for the life of a connection."""

    __slots__ = ("_assembler", "_fds", "_sock")

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self._assembler = Assembler()
        self._fds: list[int] = []

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next message and its descriptors, which are the caller's from then on.

        Raises EOFError when the peer has closed between two messages; ProtocolError on a malformed, oversized
        or cut message; TimeoutError where the socket has a time-out, after which the rest may still be
        received; OSError. No descriptor stays open after another error.
        """
        try:
            while True:
                message = self._assembler.feed(self._read())
                if message is not None:
                    fds, self._fds = self._fds, []
                    return message, fds
        except TimeoutError:
            raise
        except BaseException:
            self.close_descriptors()
            raise

    def _read(self) -> bytes:
        at_start = self._assembler.idle
        data, ancillary, flags, _ = self._sock.recvmsg(
            min(self._assembler.wanted, _READ_BYTES), _ANCILLARY_BYTES, _socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, packed in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                self._fds += _unpack_descriptors(packed)
        if flags & _socket.MSG_CTRUNC:
            raise _error("a message carries more descriptors than can be received")
        if self._fds and ancillary and not at_start:
            raise _error("descriptors came in the middle of a message")
        if not data:
            if at_start:
                raise EOFError("the connection was closed")
            raise _error("the connection was closed in the middle of a message")
        return data

    def close_descriptors(self) -> None:
        """Close what was received with a message that never became whole."""
        import posix

        fds, self._fds = self._fds, []
        for fd in fds:
            try:
                posix.close(fd)
            except OSError:
                pass


def _unpack_descriptors(packed: bytes) -> list[int]:
    whole = len(packed) - len(packed) % _INT_BYTES
    return [int.from_bytes(packed[at : at + _INT_BYTES], sys.byteorder) for at in range(0, whole, _INT_BYTES)]
