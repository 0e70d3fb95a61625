"""One connection to a keeper: requests with their replies, and the events that come by themselves.

Any thread may ask; one reactor thread reads every keeper's socket, because a thousand environments must not cost a
thousand threads. A link that breaks is told to everybody who waits on it, once, as ``Lost``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from isolat.deadline import Deadline
from isolat.errors import (
    CommandNotFound,
    DeadlineExceeded,
    IsolatError,
    Lost,
    NotExecutable,
    NotFound,
    ProtocolError,
    StartFailed,
)
from isolat.places.base import Exit
from isolat.wire import kinds as k
from isolat.wire.codec import Decoder, Fields, Frame, pack

_READ_BYTES = 256 << 10
_SEND_LIMIT_S = 30


class Reactor:
    """The one thread that waits for readable sockets and calls back. A callback must not block."""

    def __init__(self, name: str = "reactor") -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_r, selectors.EVENT_READ, None)
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def add(self, sock: socket.socket, ready: Callable[[], None]) -> None:
        with self._lock:
            self._selector.register(sock, selectors.EVENT_READ, ready)

    def remove(self, sock: socket.socket) -> None:
        with self._lock, contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def stop(self) -> None:
        self._stopped = True
        with contextlib.suppress(OSError):
            os.write(self._wake_w, b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    def _loop(self) -> None:
        while not self._stopped:
            for key, _ in self._selector.select():
                if key.data is None:
                    os.read(self._wake_r, 64)
                else:
                    key.data()
        self._selector.close()
        os.close(self._wake_r)
        os.close(self._wake_w)


@dataclass
class Asked:
    """A request under way."""

    kind: int
    id: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    frame: Frame | None = None
    descriptors: list[int] = field(default_factory=list)


class Link:
    """A controller's connection to one keeper."""

    def __init__(self, sock: socket.socket, reactor: Reactor, name: str) -> None:
        self.name = name
        self.on_exited: Callable[[str, Exit], None] | None = None
        self.on_closed: Callable[[], None] | None = None
        self._sock = sock
        self._reactor = reactor
        self._decoder = Decoder()
        self._send_lock = threading.Lock()
        self._state = threading.Condition()
        self._pending: dict[int, Asked] = {}
        self._exits: dict[str, Exit] = {}
        self._next_id = 1
        self._descriptors: list[int] = []
        self.closed = False
        self.pid = 0
        self.flags = k.FIRST_FLAGS  # of SPAWN, which it knows
        self.process: subprocess.Popen[bytes] | None = None  # the keeper, where it is our child
        seconds = _SEND_LIMIT_S.to_bytes(8, "little") + bytes(8)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        reactor.add(sock, self._readable)

    # asking

    def request(
        self, kind: int, fields: Fields, d: Deadline, descriptors: Sequence[int] = ()
    ) -> tuple[Frame, list[int]]:
        """Send a request and wait for its reply. Raises what the keeper's ERROR says, or Lost."""
        return self.result(self.ask(kind, fields, descriptors), d)

    def ask(self, kind: int, fields: Fields, descriptors: Sequence[int] = ()) -> Asked:
        """Send a request. Its reply is waited for with ``result``, which has to be called for each."""
        pending = Asked(kind)
        with self._state:
            if self.closed:
                raise self._lost()
            id = self._next_id
            self._next_id = (self._next_id % 0x7FFFFFFF) + 1
            self._pending[id] = pending
        pending.id = id
        try:
            self._send(pack(kind, id, fields, len(descriptors)), descriptors)
        except BaseException:
            self._drop(pending)
            raise
        return pending

    def result(self, pending: Asked, d: Deadline) -> tuple[Frame, list[int]]:
        """The reply to what was asked."""
        try:
            if not pending.done.wait(d.left_s()):
                name = k.KIND_NAMES[pending.kind]
                raise DeadlineExceeded(f"{self.name}: {name} did not end in time", stage=name.lower())
        finally:
            self._drop(pending)
        if pending.frame is None:
            raise self._lost()
        if pending.frame.kind == k.ERROR:
            raise error_of(pending.frame, self.name)
        return pending.frame, pending.descriptors

    def _drop(self, pending: Asked) -> None:
        with self._state:
            self._pending.pop(pending.id, None)

    def _send(self, data: bytes, descriptors: Sequence[int]) -> None:
        try:
            with self._send_lock:
                if descriptors:
                    sent = socket.send_fds(self._sock, [data], list(descriptors))
                    data = data[sent:]
                if data:
                    self._sock.sendall(data)
        except OSError as error:
            self._close()
            raise self._lost() from error

    def wait_exit(self, name: str, d: Deadline) -> Exit:
        """Until the process of this full name has ended. Raises Lost or DeadlineExceeded."""
        with self._state:
            ready = self._state.wait_for(lambda: name in self._exits or self.closed, d.left_s())
            if name in self._exits:
                return self._exits[name]
            if ready:
                raise self._lost()
        raise DeadlineExceeded(f"{self.name}: {name} did not end in time", stage="wait")

    def exit_of(self, name: str) -> Exit | None:
        return self._exits.get(name)

    def record_exit(self, name: str, exit: Exit) -> None:
        with self._state:
            self._exits.setdefault(name, exit)
            self._state.notify_all()

    def forget(self, name: str) -> None:
        with self._state:
            self._exits.pop(name, None)

    def close(self) -> None:
        self._close()

    def _lost(self) -> Lost:
        return Lost(
            f"the keeper of {self.name} is gone",
            hint="`isolat inspect` shows what is known of its end; `isolat rm` removes it",
        )

    # being told (reactor thread)

    def _readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(
                self._sock, _READ_BYTES, 16, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self._close()
            return
        self._descriptors += fds
        if not data:
            self._close()
            return
        try:
            for frame in self._decoder.feed(data):
                self._take(frame)
        except ProtocolError:
            self._close()

    def _take(self, frame: Frame) -> None:
        mine, self._descriptors = self._descriptors[: frame.nfds], self._descriptors[frame.nfds :]
        if frame.kind in (k.OK, k.ERROR):
            with self._state:
                pending = self._pending.get(frame.id)
            if pending is not None:
                pending.frame, pending.descriptors = frame, mine
                pending.done.set()
                return
        elif frame.kind == k.EXITED:
            name, exit = frame.text(k.T_KEY), exit_of(frame)
            self.record_exit(name, exit)
            if self.on_exited is not None:
                self.on_exited(name, exit)
        for fd in mine:
            os.close(fd)

    def _close(self) -> None:
        with self._state:
            if self.closed:
                return
            self.closed = True
            pending = list(self._pending.values())
            self._state.notify_all()
        self._reactor.remove(self._sock)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors = []
        for waiter in pending:
            waiter.done.set()
        if self.on_closed is not None:
            self.on_closed()


def exit_of(frame: Frame) -> Exit:
    times = frame.ints(k.T_TIME)
    signal = frame.int(k.T_SIGNAL)
    code = frame.int(k.T_CODE)
    return Exit(
        code=128 + signal if signal else code,
        signal=signal,
        started_ns=times[0] if times else 0,
        ended_ns=times[1] if len(times) > 1 else 0,
        oom=frame.text(k.T_OPTIONS) == "oom",
        with_guest=frame.text(k.T_STAGE) == "guest",
    )


def error_of(frame: Frame, name: str) -> IsolatError:
    """The exception that an ERROR frame stands for."""
    stage, number, code = frame.text(k.T_STAGE), frame.int(k.T_ERRNO), frame.int(k.T_CODE)
    message = frame.text(k.T_MESSAGE) or (os.strerror(number) if number else "failed")
    tail = frame.text(k.T_TAIL)
    details = tuple(line for line in tail.splitlines() if line.strip())[-20:]
    if code == 127:
        return CommandNotFound(message, stage=stage, errno=number)
    if code == 126:
        return NotExecutable(message, stage=stage, errno=number)
    if stage == "key" and number == errno.ENOENT:
        return NotFound(f"{name}: {message}", stage=stage, errno=number)
    said = message if message.startswith(f"{stage}: ") else f"{stage}: {message}"
    return StartFailed(f"{name}: {said}", stage=stage, errno=number, details=details)
