"""The pump between a caller and one process inside: bytes, signals, the terminal.

It speaks the client's part of docs/protocol.md with a keeper, so it goes on when the daemon dies. It keeps nothing
back: what comes is written straight through, and while the caller's output blocks nothing more is read, which is what
slows the process down. Input is read only when the keeper has given credit for it.

The few numbers of the protocol that it needs are repeated here (a test compares them), because ``wire.kinds`` imports
``typing``, which would cost every command more than its whole request does.
"""

from __future__ import annotations

import _socket
import errno
import posix
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SIGNAL, RESIZE, ERROR, DATA, EOF, CREDIT, EXITED, LOST = 4, 5, 33, 48, 49, 50, 51, 52
T_KEY, T_ROWS, T_COLS, T_SIGNAL, T_SCOPE, T_CODE, T_MESSAGE, T_TAIL = 1, 8, 9, 10, 11, 14, 17, 18
HEADER_BYTES, MAX_BODY_BYTES, MAX_DATA_BYTES = 12, 1 << 20, 64 << 10
SCOPE_PROCESS, SCOPE_GROUP = 0, 1

_READ_BYTES = 256 << 10
_JOIN_ABOVE = 16  # more pieces than this are cheaper to join than to hand to writev
_SIGPIPE, _SIGKILL = 13, 9
_PIPE_GRACE_S = 2.0
_CTRL_P, _DETACH = b"\x10", b"\x10\x11"


class Ending:
    """How it ended. ``kind``: exited, detached, lost, failed (it never ran), pipe (our output's reader went away),
    output (our output could not be written), timeout."""

    __slots__ = ("code", "kind", "message", "signal")

    def __init__(self, kind: str, code: int = 0, signal: int = 0, message: str = "") -> None:
        self.kind = kind
        self.code = code
        self.signal = signal
        self.message = message


def pack(kind: int, fields: bytes, id: int = 0) -> bytes:
    return len(fields).to_bytes(4, "little") + bytes((kind, 0, 0, 0)) + id.to_bytes(4, "little") + fields


def field_int(tag: int, value: int) -> bytes:
    return bytes((tag,)) + b"\x08\0\0\0" + value.to_bytes(8, "little", signed=True)


def field_text(tag: int, value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    return bytes((tag,)) + len(data).to_bytes(4, "little") + data


def parse_fields(body: bytes) -> dict[int, bytes]:
    """The first value of each tag; what overruns the body is left out."""
    found: dict[int, bytes] = {}
    at = 0
    while len(body) - at >= 5:
        start = at + 5
        end = start + int.from_bytes(body[at + 1 : start], "little")
        if end > len(body):
            break
        found.setdefault(body[at], body[start:end])
        at = end
    return found


class Pump:
    """One connection to a keeper, pumped until its process has ended.

    ``source`` is the descriptor that standard input is read from, bytes to be given as standard input, or None:
    then nothing is read. ``targets`` are the descriptors of standard output and standard error; with
    ``on_output`` output goes there instead. ``detach_keys``: ctrl-p ctrl-q in the input ends the pump.
    """

    def __init__(
        self,
        sock: _socket.socket,
        *,
        key: str = "",
        source: int | bytes | None = None,
        targets: tuple[int, int] = (1, 2),
        on_output: Callable[[int, bytes], None] | None = None,
        detach_keys: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        self.sock = sock
        self.ending: Ending | None = None
        self._key = key
        self._fd = sock.fileno()
        self._source = source if isinstance(source, int) else -1
        self._open = self._source >= 0
        self._given = memoryview(source) if isinstance(source, bytes) else None
        self._targets = {1: targets[0], 2: targets[1]}
        self._on_output = on_output
        self._detach_keys = detach_keys
        self._held = False  # a ctrl-p that may begin the detach keys
        self._credit = 0
        self._out = bytearray()  # what the socket could not take yet
        self._sending = False
        self._requests = 0
        self._at_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._at_kind = "timeout"
        self._read_buffer = bytearray(_READ_BYTES)
        self._head = bytearray()  # an incomplete frame that is not DATA, or an incomplete header
        self._stream = 0  # of the DATA frame that is being received
        self._left = 0  # bytes of it to come
        self._wake = -1

    # what the caller asks for

    def signal(self, number: int, scope: int = SCOPE_PROCESS) -> None:
        """Send a signal inside. May be called from a signal handler."""
        self._requests += 1
        fields = field_text(T_KEY, self._key) + field_int(T_SIGNAL, number) + field_int(T_SCOPE, scope)
        self._send(pack(SIGNAL, fields, self._requests))

    def resize(self, rows: int, cols: int) -> None:
        self._requests += 1
        fields = field_text(T_KEY, self._key) + field_int(T_ROWS, rows) + field_int(T_COLS, cols)
        self._send(pack(RESIZE, fields, self._requests))

    def run(self, wake: int = -1) -> Ending:
        """Pump until it has ended. ``wake`` is a descriptor that becomes readable when a signal was handled."""
        poll = select.poll()
        self._wake = wake
        if wake >= 0:
            poll.register(wake, select.POLLIN)
        asked = reading = False
        poll.register(self._fd, select.POLLIN)
        while self.ending is None:
            if bool(self._out) != asked:
                asked = bool(self._out)
                poll.modify(self._fd, select.POLLIN | select.POLLOUT if asked else select.POLLIN)
            if self._wants_input() != reading:
                reading = not reading
                poll.register(self._source, select.POLLIN) if reading else poll.unregister(self._source)
            for fd, events in poll.poll(self._left_ms()):
                self._ready(fd, events)
            self._check_time()
        return self.ending

    def _ready(self, fd: int, events: int) -> None:
        if self.ending is not None:
            return
        if fd == self._fd:
            if events & select.POLLOUT:
                self._flush()
            if events & ~select.POLLOUT:
                self._receive()
        elif fd == self._wake:
            posix.read(fd, 512)
        elif fd == self._source:
            self._read_source()

    def _left_ms(self) -> int | None:
        if self._at_s is None:
            return None
        return max(0, int((self._at_s - time.monotonic()) * 1000) + 1)

    def _check_time(self) -> None:
        if self.ending is not None or self._at_s is None or time.monotonic() < self._at_s:
            return
        self.ending = Ending(self._at_kind, 128 + (_SIGPIPE if self._at_kind == "pipe" else _SIGKILL))

    # to the keeper

    def _send(self, data: bytes) -> None:
        self._out += data
        self._flush()

    def _flush(self) -> None:
        """Send what can be sent now. A signal handler that comes in between only adds to what is to be sent."""
        if self._sending:
            return
        self._sending = True
        try:
            while self._out:
                sent = self.sock.send(bytes(self._out), _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:  # the peer has gone: receiving tells how it ended
            self._out.clear()
        finally:
            self._sending = False

    def _wants_input(self) -> bool:
        return self._open and self._credit > self._held and not self._out

    def _read_source(self) -> None:
        try:
            data = posix.read(self._source, min(self._credit - self._held, MAX_DATA_BYTES))
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in {errno.EIO, errno.EBADF}:  # a terminal that hung up; a descriptor that was closed
                _complain(f"cannot read standard input: {posix.strerror(error.errno or 0)}")
            data = b""
        if not data:
            self._open = False
            self._send(pack(EOF, b"\0"))
            return
        if self._detach_keys:
            data = self._without_detach_keys(data)
        if data:
            self._credit -= len(data)
            self._send(pack(DATA, b"\0" + data))

    def _without_detach_keys(self, data: bytes) -> bytes:
        if self._held:
            data = _CTRL_P + data
            self._held = False
        before, found, _ = data.partition(_DETACH)
        if found:
            self.ending = Ending("detached")
            return before
        if data.endswith(_CTRL_P):
            self._held = True
            return data[:-1]
        return data

    def _give(self) -> None:
        """Send bytes that were given as standard input, as far as there is credit."""
        while self._given is not None and (self._credit or not self._given):
            piece = self._given[: min(self._credit, MAX_DATA_BYTES)]
            self._given = self._given[len(piece) :] if len(piece) < len(self._given) else None
            self._credit -= len(piece)
            if piece:
                self._send(pack(DATA, b"\0" + bytes(piece)))
            if self._given is None:
                self._send(pack(EOF, b"\0"))

    # from the keeper

    def _receive(self) -> None:
        try:
            count = self.sock.recv_into(self._read_buffer, 0, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self.ending = Ending("lost", message="the connection to its keeper broke")
            return
        self._decode(memoryview(self._read_buffer)[:count])

    def _decode(self, data: memoryview) -> None:
        """Take frames apart. DATA is passed on piece by piece, before its frame is whole."""
        pieces: list[memoryview] = []
        stream, at, end = self._stream, 0, len(data)
        while at < end and self.ending is None:
            if self._left:
                if stream != self._stream:
                    self._deliver(stream, pieces)
                    pieces, stream = [], self._stream
                taken = min(self._left, end - at)
                pieces.append(data[at : at + taken])
                self._left -= taken
                at += taken
                continue
            wanted = self._wanted()
            self._head += data[at : at + wanted]
            at += wanted
            if not self._wanted():
                if self._head[4] != DATA and pieces:
                    self._deliver(stream, pieces)
                    pieces = []
                self._frame()
        self._deliver(stream, pieces)

    def _wanted(self) -> int:
        """Bytes that the frame in ``_head`` still needs: a DATA frame's header takes its stream with it."""
        if len(self._head) < HEADER_BYTES:
            return HEADER_BYTES - len(self._head)
        length = int.from_bytes(self._head[:4], "little")
        if length > MAX_BODY_BYTES:
            self.ending = Ending("lost", message="its keeper sent what the protocol does not allow")
            return 0
        return HEADER_BYTES + (min(length, 1) if self._head[4] == DATA else length) - len(self._head)

    def _frame(self) -> None:
        kind, body = self._head[4], bytes(self._head[HEADER_BYTES:])
        if kind == DATA:
            self._stream = body[0] if body else 1
            self._left = max(0, int.from_bytes(self._head[:4], "little") - 1)
        elif kind == CREDIT:
            self._credit += int.from_bytes(body[:4], "little")
            self._give()
        elif kind == EXITED:
            found = parse_fields(body)
            number = _int(found.get(T_SIGNAL, b""))
            self.ending = Ending("exited", _int(found.get(T_CODE, b"")) or (128 + number if number else 0), number)
        elif kind == LOST:
            self.ending = Ending("lost", message="the machine that it ran in died")
        elif kind == ERROR and self._head[8:12] == b"\0\0\0\0":
            found = parse_fields(body)
            text = found.get(T_MESSAGE, b"it could not be started").decode("utf-8", "replace")
            self.ending = Ending("failed", _int(found.get(T_CODE, b"")), message=text)
        self._head.clear()

    def _deliver(self, stream: int, pieces: list[memoryview]) -> None:
        if not pieces or stream not in self._targets:
            return
        if self._on_output is not None:
            self._on_output(stream, b"".join(pieces))
            return
        fd = self._targets[stream]
        if fd < 0:
            return
        try:
            _write_all(fd, pieces if len(pieces) <= _JOIN_ABOVE else [memoryview(b"".join(pieces))])
        except OSError as error:
            self._broken(stream, fd, error)

    def _broken(self, stream: int, fd: int, error: OSError) -> None:
        """Our output cannot be written: as in a pipeline of a shell, the process inside gets SIGPIPE.

        What it writes from then on is dropped; if it goes on nevertheless, it is left alone after a moment.
        """
        self._targets[stream] = -1
        if error.errno == errno.EBADF:  # the caller closed it before: it does not want to see anything
            return
        self._open = False
        self._given = None
        if error.errno == errno.EPIPE:
            self._at_kind = "pipe"
        else:
            self._at_kind = "output"
            if fd != 2:
                _complain(f"cannot write to descriptor {fd}: {posix.strerror(error.errno or 0)}")
        self._at_s = time.monotonic() + _PIPE_GRACE_S
        self.signal(_SIGPIPE, SCOPE_GROUP)

    @property
    def broken(self) -> str:
        """``pipe`` or ``output`` when our output could not be written, else empty."""
        return "" if self._at_kind == "timeout" else self._at_kind


def _int(value: bytes) -> int:
    return int.from_bytes(value, "little", signed=True)


def _write_all(fd: int, pieces: list[memoryview]) -> None:
    """Write everything, blocking; a descriptor that others made non-blocking is waited for."""
    while pieces:
        try:
            written = posix.writev(fd, pieces)
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()
            continue
        while pieces and written >= len(pieces[0]):
            written -= len(pieces[0])
            pieces = pieces[1:]
        if written:
            pieces = [pieces[0][written:], *pieces[1:]]


def _complain(message: str) -> None:
    try:
        posix.write(2, f"isolat: {message}\n".encode("utf-8", "replace"))
    except OSError:
        pass
