"""A keeper in the test: the other end of a stream, speaking through the real codec."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from isolat.wire import codec
from isolat.wire import kinds as k


class Keeper:
    """Collects what a client sends in a thread; the test says what it answers."""

    def __init__(self, credit: int = 256 << 10) -> None:
        self.client, self._sock = socket.socketpair()
        self.stdin = bytearray()
        self.keep_stdin = True
        self.stdin_bytes = 0
        self.eof = threading.Event()
        self.gone = threading.Event()
        self.requests: list[codec.Frame] = []
        self.overrun = False
        self._credit = 0
        self._heard = threading.Condition()
        self._lock = threading.Lock()
        self.on_signal: Callable[[int], None] | None = None
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        if credit:
            self.give_credit(credit)

    def give_credit(self, count: int) -> None:
        self._credit += count
        self.send(codec.pack_raw(k.CREDIT, count.to_bytes(4, "little")))

    def send(self, data: bytes) -> None:
        with self._lock:
            self._sock.sendall(data)

    def write(self, stream: int, data: bytes) -> None:
        for at in range(0, len(data), k.MAX_DATA_BYTES):
            self.send(codec.pack_data(stream, data[at : at + k.MAX_DATA_BYTES]))

    def exit(self, code: int = 0, signal: int = 0) -> None:
        fields: codec.Fields = [
            (k.T_KEY, "guest/main"),
            (k.T_CODE, code),
            (k.T_SIGNAL, signal),
            (k.T_TIME, 1),
            (k.T_TIME, 2),
        ]
        self.send(codec.pack_eof(1) + codec.pack_eof(2) + codec.pack(k.EXITED, 0, fields))
        with contextlib.suppress(OSError):  # the client has read it all, ended, and closed both ends
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()
        self.client.close()

    def cut(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)

    def wait_for(self, what: Callable[[], bool], seconds: float = 10) -> None:
        with self._heard:
            assert self._heard.wait_for(what, seconds), (bytes(self.stdin[:200]), self.requests)

    def signals(self) -> list[tuple[int, int]]:
        """Number and scope of every signal that came."""
        return [(f.int(k.T_SIGNAL), f.int(k.T_SCOPE)) for f in self.requests if f.kind == k.SIGNAL]

    def sizes(self) -> list[tuple[int, int]]:
        return [(f.int(k.T_ROWS), f.int(k.T_COLS)) for f in self.requests if f.kind == k.RESIZE]

    def _listen(self) -> None:
        decoder = codec.Decoder()
        while True:
            try:
                data = self._sock.recv(256 << 10)
            except OSError:
                data = b""
            if not data:
                self.gone.set()
                return
            for frame in decoder.feed(data):
                with self._heard:
                    try:
                        self._take(frame)
                    except BrokenPipeError:  # the client has gone meanwhile
                        pass
                    self._heard.notify_all()

    def _take(self, frame: codec.Frame) -> None:
        if frame.kind == k.DATA:
            count = len(frame.body) - 1
            self._credit -= count
            self.overrun = self.overrun or self._credit < 0 or count > k.MAX_DATA_BYTES
            self.stdin_bytes += count
            if self.keep_stdin:
                self.stdin += frame.body[1:]
            if self.stdin_bytes:
                self.give_credit(count)
        elif frame.kind == k.EOF:
            self.eof.set()
        else:
            self.requests.append(frame)
            if frame.kind == k.SIGNAL and self.on_signal:
                self.on_signal(frame.int(k.T_SIGNAL))
