"""The daemon's and the keeper's protocols from the client's side, as plainly as docs/api.md and docs/protocol.md say.

Nothing of the product's own client is used, so that a defect there cannot hide one in the daemon.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isolat.errors import from_json
from isolat.wire import api
from isolat.wire import kinds as k
from isolat.wire.codec import Decoder, Frame, pack, pack_data, pack_eof

STEP_S = 0.05


class Cut(Exception):
    """The peer has closed the connection before its answer was whole."""


class TooSlow(AssertionError):
    """What a test waited for did not come in time."""


def connect(path: Path, seconds: float = 60) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(seconds)
    at = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{at}/{path.name}")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(at)
    return sock


class Conversation:
    """One request to the daemon, with its answer as it comes."""

    def __init__(
        self, path: Path, verb: str, args: Mapping[str, Any], fds: Sequence[int] = (), seconds: float = 60
    ) -> None:
        self._sock = connect(path, seconds)
        self._receiver = api.Receiver(self._sock)
        self.rows: list[dict[str, Any]] = []
        try:
            api.send(self._sock, api.request(verb, args), fds)
        except BaseException:
            self.close()
            raise

    def next(self) -> tuple[dict[str, Any], list[int]]:
        """The next message. Raises Cut when the daemon has gone, TimeoutError when nothing comes."""
        try:
            return self._receiver.receive()
        except (EOFError, ConnectionError) as error:
            raise Cut("the daemon closed the connection") from error

    def stream(self) -> tuple[dict[str, Any], Stream]:
        """The introduction to the keeper. Raises the error of the tree that came instead."""
        while True:
            message, fds = self.next()
            if "stream" in message:
                found: dict[str, Any] = message["stream"]
                return found, Stream(socket.socket(fileno=fds[0]), str(found.get("key", "")))
            self._take(message)

    def end(self) -> tuple[dict[str, Any], list[int]]:
        """The final answer and its descriptors. Raises the error of the tree that came instead."""
        while True:
            message, fds = self.next()
            if "ok" in message:
                self.close()
                ok: dict[str, Any] = message["ok"]
                return ok, fds
            if "stream" in message:
                for fd in fds:
                    os.close(fd)
                continue
            self._take(message)

    def _take(self, message: Mapping[str, Any]) -> None:
        if "error" in message:
            self.close()
            raise from_json(message["error"])
        if "row" in message:
            self.rows.append(message["row"])

    def close(self) -> None:
        self._receiver.close_descriptors()
        self._sock.close()


class Stream:
    """A client of a keeper: everything that comes is recorded."""

    def __init__(self, sock: socket.socket, key: str = "") -> None:
        self.key = key
        self.out = bytearray()
        self.err = bytearray()
        self.ended_streams: set[int] = set()
        self.credit = 0
        self.exit: int | None = None  # as a shell tells it: 128+n for signal n
        self.lost = False
        self.cut = False
        self.replies: list[Frame] = []
        self.on_frame: Callable[[Frame], None] | None = None
        self._id = 0
        self._sock = sock
        self._sock.setblocking(False)
        self._decoder = Decoder()

    def close(self) -> None:
        self._sock.close()

    # reading

    def pump(self, seconds: float = STEP_S) -> bool:
        """Take what is there, waiting so long for the first of it. False when there was nothing."""
        if self.cut or not select.select([self._sock], [], [], seconds)[0]:
            return False
        try:
            data = self._sock.recv(256 << 10)
        except BlockingIOError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            self.cut = True
        for frame in self._decoder.feed(data):
            self._take(frame)
        return True

    def _take(self, frame: Frame) -> None:
        if frame.kind == k.DATA:
            (self.out if frame.body[0] == k.STDOUT else self.err).extend(frame.body[1:])
        elif frame.kind == k.EOF:
            self.ended_streams.add(frame.body[0])
        elif frame.kind == k.CREDIT:
            self.credit += int.from_bytes(frame.body, "little")
        elif frame.kind == k.EXITED:
            signal = frame.int(k.T_SIGNAL)
            self.exit = 128 + signal if signal else frame.int(k.T_CODE)
        elif frame.kind == k.LOST:
            self.lost = True
        else:
            self.replies.append(frame)
        if self.on_frame:
            self.on_frame(frame)

    def until(self, true: Callable[[], bool], seconds: float = 20, what: str = "it") -> None:
        """Pump until ``true``. Raises TooSlow with what has come so far."""
        end = time.monotonic() + seconds
        while not true():
            self.pump()
            if self.cut and not true():
                raise Cut(
                    f"cut while waiting for {what}: out {bytes(self.out[-500:])!r}, err {bytes(self.err[-500:])!r}"
                )
            if time.monotonic() > end:
                raise TooSlow(
                    f"no {what} in {seconds} s: out {bytes(self.out[-500:])!r}, err {bytes(self.err[-500:])!r}"
                )

    def until_out(self, text: bytes, seconds: float = 20) -> None:
        self.until(lambda: text in self.out, seconds, repr(text))

    def ended(self, seconds: float = 30) -> int:
        """The exit code, once everything before it has been read."""
        self.until(lambda: self.exit is not None, seconds, "end")
        assert self.exit is not None
        return self.exit

    # writing

    def _send(self, data: bytes) -> None:
        """Send all of it, reading meanwhile: two full pipes must not wait for each other."""
        view = memoryview(data)
        end = time.monotonic() + 60
        while view:
            readable, writable, _ = select.select([self._sock], [self._sock], [], 1)
            if writable:
                try:
                    view = view[self._sock.send(view) :]
                except BlockingIOError:
                    pass
                except ConnectionError as error:
                    raise Cut("cut while writing") from error
            if readable:
                self.pump(0)
            if self.cut or time.monotonic() > end:
                raise Cut("cut while writing")

    def write(self, data: bytes, seconds: float = 60) -> None:
        at = 0
        while at < len(data):
            self.until(lambda: self.credit > 0, seconds, "credit for stdin")
            size = min(len(data) - at, self.credit, k.MAX_DATA_BYTES)
            self.credit -= size
            self._send(pack_data(k.STDIN, data[at : at + size]))
            at += size

    def close_stdin(self) -> None:
        self._send(pack_eof(k.STDIN))

    def signal(self, number: int, scope: int = k.SCOPE_PROCESS) -> None:
        self._id += 1
        self._send(pack(k.SIGNAL, self._id, [(k.T_SIGNAL, number), (k.T_SCOPE, scope)]))

    def resize(self, rows: int, cols: int) -> None:
        self._id += 1
        self._send(pack(k.RESIZE, self._id, [(k.T_ROWS, rows), (k.T_COLS, cols)]))

    def send_raw(self, data: bytes) -> None:
        self._send(data)
