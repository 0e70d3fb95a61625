"""A command driven through a terminal, as a person does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Mapping, Sequence


class Terminal:
    """A child with a terminal of its own. Everything it shows is in ``shown``."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], rows: int = 24, cols: int = 80) -> None:
        self.shown = bytearray()
        self.code: int | None = None
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                os.execvpe(argv[0], list(argv), dict(env))
            os._exit(124)
        self.resize(rows, cols)

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("4H", rows, cols, 0, 0))

    @property
    def cooked(self) -> bool:
        """Whether the terminal is as a shell leaves it: lines, echo and signals."""
        flags = termios.tcgetattr(self._master)[3]
        return bool(flags & termios.ICANON and flags & termios.ECHO and flags & termios.ISIG)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self.shown += data
        return bool(data)

    def until(self, text: str, seconds: float = 20) -> None:
        """Read until it is shown, after what was waited for before."""
        end = time.monotonic() + seconds
        while text.encode() not in self.shown:
            if not self._read(0.1) and text.encode() not in self.shown:
                raise AssertionError(f"ended without {text!r}: {bytes(self.shown)!r}")
            if time.monotonic() > end:
                raise AssertionError(f"no {text!r} in {seconds} s: {bytes(self.shown)!r}")
        at = self.shown.index(text.encode()) + len(text.encode())
        del self.shown[:at]

    def ended(self, seconds: float = 30) -> int:
        """The exit code of the child."""
        end = time.monotonic() + seconds
        while self.code is None:
            self._read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise AssertionError(f"did not end in {seconds} s: {bytes(self.shown)!r}")
        return self.code

    def close(self) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.code = -9
        with contextlib.suppress(OSError):
            os.close(self._master)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
