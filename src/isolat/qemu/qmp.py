"""QEMU's machine protocol over a connected socket: one command at a time, its reply, and the events in between.

Synchronous and without threads: one operation at a time holds a machine, and it holds this. Not safe for two threads.

There is one way to open a conversation, whoever came before. A daemon that was killed may have left half a command in
QEMU's parser, half a reply in the socket, replies nobody read and negotiated capabilities; a new QEMU has a greeting
to send. So the byte 0xFF goes first, which resets QEMU's parser (docs/interop/qmp-spec, "Client-side recovery"), then
``qmp_capabilities`` with an id that no one else uses, and everything before the reply with that id is dropped.

QEMU is not trusted: a machine's guest may have taken it over. Lines, events and the number of lines per command are
bounded, and descriptors that it sends are not received.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, StartFailed

LINE_BYTES_MAX = 1 << 20  # QEMU's longest answer that anything here asks for has some tens of KiB
EVENTS_MAX = 64
_LINES_PER_COMMAND = 4096
_READ_BYTES = 64 << 10
_RESET = b"\xff"
_STAGE = "qmp"

Arguments = Mapping[str, Any]
Event = dict[str, Any]


class QmpRefused(StartFailed):
    """QEMU answered a command with an error. ``qemu_class`` is its class, mostly GenericError."""

    def __init__(self, command: str, words: str, qemu_class: str) -> None:
        super().__init__(f"QEMU refused {command}: {words}", stage=_STAGE)
        self.qemu_class = qemu_class


class Qmp:
    """The daemon's end of a machine's monitor. The connected stream socket belongs to this from now on."""

    def __init__(self, sock: socket.socket) -> None:
        self.events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._sock = sock
        self._buffer = bytearray()
        self._name = secrets.token_hex(4)  # of this conversation: an id of an earlier one is never mistaken for ours
        self._next = 0

    @classmethod
    def connect(cls, sock: socket.socket, d: Deadline) -> Qmp:
        """Open the conversation: with a QEMU that just starts, and with one that others have spoken with.

        Raises StartFailed (stage ``qmp``) when QEMU is gone, DeadlineExceeded; the socket is closed then.
        """
        qmp = cls(sock)
        try:
            qmp._negotiate(d)
        except BaseException:
            qmp.close()
            raise
        return qmp

    @staticmethod
    def tell(sock: socket.socket, commands: Sequence[tuple[str, Arguments]], d: Deadline) -> None:
        """Say these to a QEMU that just starts, and don't wait for an answer: they fit into the socket.

        Raises StartFailed when it is gone, DeadlineExceeded.
        """
        said = [_request(name, arguments, "") for name, arguments in (("qmp_capabilities", {}), *commands)]
        Qmp(sock)._send(b"".join(said), commands[0][0], d, ())

    def _negotiate(self, d: Deadline) -> None:
        try:
            self._run("qmp_capabilities", {}, d, (), prefix=_RESET)
        except QmpRefused as error:
            if error.qemu_class != "CommandNotFound":  # how QEMU says that this was done before
                raise
        self.events.clear()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def execute(self, command: str, arguments: Arguments, d: Deadline, fds: Sequence[int] = ()) -> Any:
        """Run one command and give what it returns. ``fds`` go with it (``getfd``, ``add-fd``) and stay the caller's.

        Raises QmpRefused with QEMU's words, StartFailed when QEMU ended or speaks nonsense, DeadlineExceeded.
        """
        return self._run(command, arguments, d, fds)

    def _run(self, command: str, arguments: Arguments, d: Deadline, fds: Sequence[int], prefix: bytes = b"") -> Any:
        self._next += 1
        id = f"{self._name}-{self._next}"
        self._send(prefix + _request(command, arguments, id), command, d, fds)
        for _ in range(_LINES_PER_COMMAND):
            message = self._message(command, d, lenient=bool(prefix))
            if "event" in message:
                self.events.append(message)
            elif message.get("id") == id:
                return _result(command, message)
        raise StartFailed(f"QEMU talks without answering {command}", stage=_STAGE)

    def wait_event(self, name: str, predicate: Callable[[dict[str, Any]], bool], d: Deadline) -> dict[str, Any]:
        """The data of the first event ``name`` for which ``predicate`` (given its data) holds; it and all before it go.

        Raises like ``execute``.
        """
        for _ in range(_LINES_PER_COMMAND):
            while self.events:
                event = self.events.popleft()
                data = event.get("data")
                data = data if isinstance(data, dict) else {}
                if event.get("event") == name and predicate(data):
                    return data
            message = self._message(name, d, lenient=False)
            if "event" in message:
                self.events.append(message)
        raise StartFailed(f"QEMU talks without the event {name}", stage=_STAGE)

    # bytes

    def _send(self, data: bytes, what: str, d: Deadline, fds: Sequence[int]) -> None:
        """All of it, descriptors with the first byte: QEMU keeps the last that came until a command takes them."""
        try:
            self._arm(what, d)
            sent = socket.send_fds(self._sock, [data], list(fds)) if fds else self._sock.send(data)
            while sent < len(data):
                self._arm(what, d)
                sent += self._sock.send(data[sent:])
        except TimeoutError as error:
            raise DeadlineExceeded(f"QEMU did not take {what} in time", stage=_STAGE) from error
        except OSError as error:
            raise _gone(what, error) from error

    def _arm(self, what: str, d: Deadline) -> None:
        """Let the next call on the socket take at most what is left."""
        left = d.left_s()
        if left is not None and left <= 0:
            raise DeadlineExceeded(f"QEMU: {what} did not end in time", stage=_STAGE)
        self._sock.settimeout(left)

    def _message(self, what: str, d: Deadline, *, lenient: bool) -> dict[str, Any]:
        """The next JSON object. ``lenient``: what is none (the rest of an old reply) is passed over."""
        while True:
            line = self._line(what, d)
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if isinstance(message, dict):
                return message
            if not lenient:
                raise StartFailed(f"QEMU sent what is no message of its protocol: {bytes(line[:80])!r}", stage=_STAGE)

    def _line(self, what: str, d: Deadline) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > LINE_BYTES_MAX:
                raise StartFailed("QEMU sent a line without an end", stage=_STAGE)
            self._buffer += self._receive(what, d)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _receive(self, what: str, d: Deadline) -> bytes:
        try:
            self._arm(what, d)
            data = self._sock.recv(_READ_BYTES)  # without a place for descriptors: the kernel drops what comes
        except TimeoutError as error:
            raise DeadlineExceeded(f"QEMU: {what} did not end in time", stage=_STAGE) from error
        except OSError as error:
            raise _gone(what, error) from error
        if not data:
            raise _gone(what)
        return data


def _request(command: str, arguments: Arguments, id: str) -> bytes:
    request = {"execute": command, "id": id, **({"arguments": dict(arguments)} if arguments else {})}
    return json.dumps(request).encode() + b"\n"


def _result(command: str, message: Mapping[str, Any]) -> Any:
    if "return" in message:
        return message["return"]
    error = message.get("error")
    error = error if isinstance(error, dict) else {}
    raise QmpRefused(command, str(error.get("desc", "no reason given"))[:1024], str(error.get("class", "")))


def _gone(what: str, error: OSError | None = None) -> StartFailed:
    number = error.errno or 0 if error is not None else 0
    return StartFailed(f"QEMU ended during {what}", stage=_STAGE, errno=number)
