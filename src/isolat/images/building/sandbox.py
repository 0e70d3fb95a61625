"""A build's sandbox, from outside: made, spoken to and ended by the daemon (what it is made of: ``inside.py``).

One sandbox serves one build. It has its control group, its uid range and its network from the start; the daemon then
runs one program after the other in it and gets every line of output as it comes. Nothing of it outlives ``close``, nor
the daemon: the sandbox's mounts are in its own mount namespace, so that they go with its last process.

What a hostile build can do to this side: write lines (cut, counted and never taken for anything else), answer nonsense
on the control socket (an error), or nothing at all (the deadline, and the caller who hangs up).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, StoreError
from isolat.images.building import inside

LINE_BYTES = 4096
_ANSWER_BYTES = 8 << 20
_POLL_S = 0.25
_START_S = 20.0
_END_S = 10.0
_DRAIN_BYTES = 1 << 20

OnLine = Callable[[str], None]


class Cancelled(Exception):
    """Whoever asked for the build has gone."""


@dataclass(frozen=True)
class View:
    """Something of this machine that is seen inside, without what is mounted below it.

    ``descriptor`` (O_PATH, opened by the caller) instead of ``source``. ``shifted``: its root's files belong to root
    inside. ``lines``: (id on the file system, id outside, how many) instead, as in places/steps.py, Idmap.
    """

    source: str
    target: str
    write: bool = False
    shifted: bool = False
    descriptor: int = -1
    lines: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Settings:
    """``root``: any directory of this machine; inside, and only there, the sandbox's root is mounted over it."""

    root: str
    uid_base: int
    uid_count: int
    join: tuple[str, ...]
    host_network: bool
    views: tuple[View, ...]
    files: Mapping[str, tuple[str, int]]  # path inside to text and mode
    environment: Mapping[str, str]
    inputs: tuple[int, ...] = ()  # descriptors, of which the first is the standard input of who asks for it

    def to_json(self, control: int) -> dict[str, Any]:
        binds = [
            {
                "source": view.source,
                "target": view.target,
                "write": view.write,
                "shifted": view.shifted,
                "descriptor": view.descriptor,
                "lines": [list(line) for line in view.lines],
            }
            for view in self.views
        ]
        return {
            "parent": os.getpid(),
            "root": self.root,
            "uid_base": self.uid_base,
            "uid_count": self.uid_count,
            "join": list(self.join),
            "host_network": self.host_network,
            "binds": binds,
            "files": {path: list(file) for path, file in self.files.items()},
            "environment": dict(self.environment),
            "inputs": list(self.inputs),
            "control": control,
        }

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (*self.inputs, *(view.descriptor for view in self.views if view.descriptor >= 0))


@dataclass
class _Lines:
    """Bytes to lines of at most LINE_BYTES, without what can't be shown."""

    on_line: OnLine
    rest: bytes = field(default=b"")

    def feed(self, chunk: bytes) -> None:
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        if len(self.rest) > LINE_BYTES:
            lines, self.rest = [*lines, self.rest], b""
        for line in lines:
            self._tell(line)

    def end(self) -> None:
        if self.rest:
            self._tell(self.rest)
            self.rest = b""

    def _tell(self, line: bytes) -> None:
        text = line[:LINE_BYTES].decode(errors="replace").rstrip()
        self.on_line(text.rpartition("\r")[2])  # a progress bar ends with what it showed last


class Sandbox:
    """Use it as a context manager. ``gone`` is asked a few times a second; where it is true, Cancelled is raised."""

    def __init__(self, settings: Settings, gone: Callable[[], bool]) -> None:
        self._settings = settings
        self._gone = gone
        self._answers = b""
        self._kept: list[str] = []

    def __enter__(self) -> Sandbox:
        ours, theirs = socket.socketpair()
        self._control = ours
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self._output = reading
        try:
            self._process = self._start(theirs.fileno(), writing)
        except BaseException:
            ours.close()
            os.close(reading)
            raise
        finally:
            theirs.close()
            os.close(writing)
        os.set_blocking(reading, False)
        try:
            self._hello()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, control: int, output: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(inside.__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            pass_fds=(control, *self._settings.descriptors),
            start_new_session=True,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stream:
            stream.write(json.dumps(self._settings.to_json(control)).encode())
        return process

    def _hello(self) -> None:
        lines: list[str] = []
        answer = self._answer(_Lines(lines.append), Deadline(_START_S), "starting the sandbox")
        if answer is None or not answer.get("ready"):
            raise StoreError(
                f"could not make the sandbox of a build: {lines[-1] if lines else 'it ended at once'}",
                stage="sandbox",
                details=tuple(lines[-20:]),
                hint=_hint("\n".join(lines)),
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(
        self, argv: Sequence[str], d: Deadline, on_line: OnLine, *, cwd: str = "/", with_input: bool = False
    ) -> int:
        """Run a program to its end. Its exit code, or minus its signal.

        Raises Cancelled, DeadlineExceeded, StoreError when the sandbox ends meanwhile.
        """
        return int(self._ask({"argv": list(argv), "cwd": cwd, "input": with_input}, d, on_line)["code"])

    def read(self, argv: Sequence[str], d: Deadline, on_line: OnLine) -> tuple[int, bytes]:
        """As ``run``; its standard output is not told but returned, up to 4 MiB."""
        answer = self._ask({"argv": list(argv), "keep": True}, d, on_line)
        try:
            return int(answer["code"]), base64.b64decode(str(answer.get("text", "")), validate=True)
        except (binascii.Error, ValueError) as error:
            raise StoreError(f"the sandbox of a build answered nonsense: {error}", stage=argv[0]) from error

    def _ask(self, request: Mapping[str, Any], d: Deadline, on_line: OnLine) -> dict[str, Any]:
        what = " ".join(request["argv"][:2])
        with contextlib.suppress(OSError):
            self._control.sendall(json.dumps(request).encode() + b"\n")
        answer = self._answer(_Lines(on_line), d, what)
        if answer is None or not isinstance(answer.get("code"), int):
            raise StoreError(
                f"the sandbox of a build ended while {what} ran in it",
                stage=what,
                hint="when this machine is out of memory, the kernel kills what has most",
            )
        if answer.get("error"):
            raise StoreError(f"could not start a program in the sandbox of a build: {answer['error']}", stage=what)
        return answer

    def _answer(self, lines: _Lines, d: Deadline, what: str) -> dict[str, Any] | None:
        """Tell the output until there is an answer. None when there will be none."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._output, selectors.EVENT_READ)
            while True:
                if self._gone():
                    raise Cancelled
                if d.passed:
                    raise DeadlineExceeded(f"{what} did not end in time", stage=what)
                ready = {key.fileobj for key, _ in selector.select(d.left_s(_POLL_S))}
                if self._output in ready and not self._tell(lines):
                    selector.unregister(self._output)
                if self._control in ready:
                    line = self._line()
                    if line != b"":
                        self._drain(lines)
                        return _parse(line, what) if line is not None else None

    def _tell(self, lines: _Lines) -> bool:
        """What has been written until now. False at its end."""
        try:
            chunk = os.read(self._output, 65536)
        except BlockingIOError:
            return True
        lines.feed(chunk)
        return chunk != b""

    def _drain(self, lines: _Lines) -> None:
        """What the program wrote before it ended; it is in the pipe, which holds no more than this."""
        for _ in range(_DRAIN_BYTES // 65536):
            try:
                chunk = os.read(self._output, 65536)
            except BlockingIOError:
                break
            if not chunk:
                break
            lines.feed(chunk)
        lines.end()

    def _line(self) -> bytes | None:
        """One whole line from the control socket; empty when there is none yet, None when there will be none."""
        try:
            chunk = self._control.recv(65536)
        except OSError:
            return None
        self._answers += chunk
        if not chunk or len(self._answers) > _ANSWER_BYTES:
            return None
        line, newline, rest = self._answers.partition(b"\n")
        if not newline:
            return b""
        self._answers = rest
        return line

    def close(self) -> None:
        """Kill everything inside and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_END_S)
        self._control.close()
        self._wait_for_the_last()
        os.close(self._output)

    def _wait_for_the_last(self) -> None:
        """Its first process is our grandchild: that it is gone shows at the pipe, which it and its children hold."""
        end = time.monotonic() + _END_S
        os.set_blocking(self._output, False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while time.monotonic() < end:
                if selector.select(_POLL_S):
                    with contextlib.suppress(BlockingIOError):
                        if not os.read(self._output, 65536):
                            return


def _parse(line: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise StoreError("the sandbox of a build answered nonsense", stage=what)
    return found


def _hint(text: str) -> str:
    if "a view of" in text:
        return (
            "the context lies on a file system whose owners can't be shifted, or in another mount namespace:"
            " send it as an archive instead, `tar -C DIRECTORY -c . | isolat build -`"
        )
    return "`isolat doctor` shows what this machine allows"
