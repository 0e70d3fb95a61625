"""A daemon in the test: the other end of docs/api.md, answering what the test tells it to."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isolat.wire import api

from .keeper import Keeper

Answer = Callable[["Request"], None]


class Request:
    """One request that came."""

    def __init__(self, sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
        self.sock = sock
        self.verb, self.args = api.parse_request(message)
        self.fds = fds

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        api.send(self.sock, message, fds)

    def ok(self, **content: Any) -> None:
        self.send({"ok": content})

    def error(self, code: str, message: str, **more: Any) -> None:
        self.send({"error": {"code": code, "message": message, **more}})

    def stream(self, keeper: Keeper, key: str = "guest/main") -> None:
        self.send({"stream": {"id": "1" * 16, "name": "web", "key": key, "tty": False}}, (keeper.client.fileno(),))
        keeper.client.close()


class Daemon:
    """Answers each verb with the function that the test gave for it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.root = str(root)
        self.requests: list[Request] = []
        self.answers: dict[str, Answer] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        directory = os.open(root, os.O_PATH)
        self._listener.bind(f"/proc/self/fd/{directory}/daemon.sock")
        os.close(directory)
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def on(self, verb: str, answer: Answer) -> None:
        self.answers[verb] = answer

    def replies(self, verb: str, **content: Any) -> None:
        self.answers[verb] = lambda request: request.ok(**content)

    def runs(self, code: int = 0, out: bytes = b"", err: bytes = b"", verb: str = "run", **final: Any) -> None:
        """Answer ``verb`` with a stream of a process that writes this and ends with ``code``."""

        def answer(request: Request) -> None:
            keeper = Keeper()
            try:
                request.stream(keeper)
                keeper.write(1, out)
                keeper.write(2, err)
                keeper.exit(code)
                request.ok(**{"code": code, "signal": 0, "removed": True, **final})
                keeper.gone.wait(10)
            finally:
                keeper.close()

        self.answers[verb] = answer

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        with sock:
            try:
                request = Request(sock, *api.Receiver(sock).receive())
            except EOFError:
                return
            self.requests.append(request)
            try:
                self.answers[request.verb](request)
            except OSError:
                pass
            finally:
                for fd in request.fds:
                    os.close(fd)
