"""The daemon's socket: one thread a connection, one request a connection.

Whatever a client sends or does, the answer is a result or an error of the tree; a defect of ours is logged whole and
told as an InternalError.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from isolat.daemon.arguments import Arguments
from isolat.daemon.call import Call
from isolat.daemon.verbs import VERBS
from isolat.deadline import Deadline
from isolat.engine.engine import Engine
from isolat.engine.journal import log_defect
from isolat.engine.maker import Caller
from isolat.errors import InternalError, IsolatError, ProtocolError, UsageError
from isolat.wire import api

_REQUEST_S = 30.0
_SEND_S = 60
_MAX_CONNECTIONS = 4000
_FINISH_S = 1.0


class Server:
    """Accepts until told to stop, or until nothing has run for ``idle_s`` seconds."""

    def __init__(self, engine: Engine, listener: socket.socket, idle_s: float) -> None:
        self._engine = engine
        self._listener = listener
        self._idle_s = idle_s
        self._stop = threading.Event()
        self._count_lock = threading.Lock()
        self._count = 0

    def stop(self) -> None:
        self._stop.set()

    def serve(self) -> None:
        self._listener.settimeout(0.25 if self._idle_s < 10 else 1.0)
        idle_since = time.monotonic()
        while not self._stop.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                if self._count or self._engine.alive_count:
                    idle_since = time.monotonic()
                elif time.monotonic() - max(idle_since, self._engine.changed) > self._idle_s:
                    return
                continue
            except OSError:
                time.sleep(0.05)  # out of descriptors: others will be given back
                continue
            idle_since = time.monotonic()
            self._begin(sock)

    def finish(self) -> None:
        """Answer who had already come when the end was decided; who only waits for an end is not waited for."""
        self._listener.setblocking(False)
        d = Deadline(_FINISH_S)
        while not d.passed:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if not self._count:
                    return
                time.sleep(0.005)
                continue
            self._begin(sock)

    def _begin(self, sock: socket.socket) -> None:
        self._count_up(1)
        threading.Thread(target=self._connection, args=(sock,), daemon=True).start()

    def _count_up(self, n: int) -> None:
        with self._count_lock:
            self._count += n

    def _connection(self, sock: socket.socket) -> None:
        try:
            with sock:
                if self._count > _MAX_CONNECTIONS:
                    return
                sock.settimeout(_REQUEST_S)
                self._answer(sock)
        except (OSError, EOFError):
            pass  # the client has gone; there is nobody to tell
        except Exception as error:
            log_defect("a connection", error)
        finally:
            self._count_up(-1)

    def _answer(self, sock: socket.socket) -> None:
        send_lock = threading.Lock()
        closing: list[int] = []

        def send(message: dict[str, object], fds: list[int]) -> None:
            with send_lock:
                api.send(sock, message, fds)

        try:
            message, descriptors = api.Receiver(sock).receive()
        except ProtocolError as error:
            send({"error": error.to_json()}, [])
            return
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_S, 0))
        try:
            outcome = _outcome(lambda: self._carry_out(sock, message, descriptors, closing, send))
            try:
                send(outcome, closing)
            except ProtocolError as error:  # the answer is longer than a message may be
                send({"error": error.to_json()}, [])
        finally:
            for fd in (*descriptors, *closing):
                os.close(fd)

    def _carry_out(
        self,
        sock: socket.socket,
        message: dict[str, object],
        descriptors: list[int],
        closing: list[int],
        send: Callable[[dict[str, object], list[int]], None],
    ) -> dict[str, object]:
        verb, args = api.parse_request(message)
        function = VERBS.get(verb)
        if function is None:
            raise UsageError(f"unknown verb {verb!r:.80}", hint=f"one of {', '.join(VERBS)}")
        call = Call(
            engine=self._engine,
            caller=_caller(sock),
            args=Arguments(verb, args),
            descriptors=descriptors,
            send=send,
            gone=lambda: _hung_up(sock),
            shutdown=self.stop,
            closing=closing,
        )
        return function(call)


def _outcome(work: Callable[[], dict[str, object]]) -> dict[str, object]:
    """The last message of an answer."""
    try:
        return {"ok": work()}
    except (BrokenPipeError, ConnectionResetError):
        raise
    except IsolatError as error:
        return {"error": error.to_json()}
    except Exception as error:
        log_defect("a request", error)
        told = InternalError(f"a defect of Isolat: {type(error).__name__}: {error}", hint="see daemon.log")
        return {"error": told.to_json()}


def _caller(sock: socket.socket) -> Caller:
    """Who is at the other end (unix(7), SO_PEERCRED)."""
    _, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Caller(uid & 0xFFFFFFFF, gid & 0xFFFFFFFF)


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))
