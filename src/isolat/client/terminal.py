"""What the caller's terminal and signals mean for the process inside.

Signals are caught from before the request is sent: one that comes while the environment is being started waits, so
that ctrl-c never leaves something running behind. A second interrupt gives up at once.
"""

from __future__ import annotations

import posix

from isolat.client.streams import SCOPE_GROUP, SCOPE_PROCESS, Ending, Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from types import FrameType
    from typing import Any
else:
    import _signal  # ``signal`` itself imports enum

HUP, INT, QUIT, USR1, USR2, TERM = 1, 2, 3, 10, 12, 15
CONT, STOP, TSTP, WINCH = _signal.SIGCONT, _signal.SIGSTOP, _signal.SIGTSTP, _signal.SIGWINCH
_FROM_TERMINAL = frozenset((INT, QUIT))  # a terminal sends them to a whole group, so they go to one inside
_CAUGHT = (HUP, INT, QUIT, USR1, USR2, TERM, CONT, TSTP, WINCH)


def size() -> tuple[int, int]:
    """Rows and columns of the caller's terminal, or zeros."""
    for fd in (1, 0, 2):
        try:
            found = posix.get_terminal_size(fd)
        except OSError:
            continue
        return found.lines, found.columns
    return 0, 0


def is_terminal(fd: int) -> bool:
    try:
        return posix.isatty(fd)
    except OSError:
        return False


class Relay:
    """Catches signals and passes them inside; a context manager, for the main thread only."""

    def __init__(self, *, tty: bool) -> None:
        self._tty = tty
        self._pump: Pump | None = None
        self._early: list[int] = []
        self._old: list[tuple[int, Any]] = []
        self._wake, self._wake_write = -1, -1
        self._raw: Raw | None = None

    def __enter__(self) -> Relay:
        self._wake, self._wake_write = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        self._old_wakeup = _signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in _CAUGHT:
            old = _signal.getsignal(number)
            if old == _signal.SIG_IGN and number in {HUP, INT, QUIT}:
                continue  # nohup, or a shell's background job: it stays ignored
            self._old.append((number, old))
            _signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old:
            _signal.signal(number, _signal.SIG_DFL if old is None else old)
        _signal.set_wakeup_fd(self._old_wakeup)
        posix.close(self._wake)
        posix.close(self._wake_write)

    def run(self, pump: Pump, raw: bool) -> Ending:
        """Pump until the end, with the signals so far and to come. ``raw``: standard input is a terminal to be
        passed on key by key."""
        self._pump = pump
        early, self._early = self._early, []
        for number in early:
            self._pass_on(number)
        if not raw:
            return pump.run(self._wake)
        with Raw(0) as self._raw:
            self._send_size()
            return pump.run(self._wake)

    def _caught(self, number: int, _: FrameType | None) -> None:
        if self._pump is not None:
            self._pass_on(number)
        elif number == TSTP:
            posix.kill(posix.getpid(), STOP)
        elif number not in {CONT, WINCH}:
            if number in self._early:
                raise KeyboardInterrupt(number)
            self._early.append(number)

    def _pass_on(self, number: int) -> None:
        assert self._pump is not None
        if number == WINCH:
            self._send_size()
        elif number == TSTP:
            self._pump.signal(STOP, SCOPE_GROUP)
            posix.kill(posix.getpid(), STOP)
        elif number == CONT:
            if self._raw is not None:
                self._raw.again()
                self._send_size()
            self._pump.signal(CONT, SCOPE_GROUP)
        else:
            self._pump.signal(number, SCOPE_GROUP if number in _FROM_TERMINAL else SCOPE_PROCESS)

    def _send_size(self) -> None:
        rows, cols = size()
        if self._tty and self._pump is not None and rows:
            self._pump.resize(rows, cols)


class Raw:
    """A terminal that passes on every key as it is, restored whatever happens."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._old: list[Any] | None = None

    def __enter__(self) -> Raw:
        import termios

        try:
            self._old = termios.tcgetattr(self._fd)
        except termios.error:
            return self
        self.again()
        return self

    def again(self) -> None:
        """Raw mode, also after a shell that stopped us has set its own."""
        import termios as t

        if self._old is None:
            return
        new = [*self._old[:6], list(self._old[6])]
        new[0] &= ~(t.IGNBRK | t.BRKINT | t.PARMRK | t.ISTRIP | t.INLCR | t.IGNCR | t.ICRNL | t.IXON)
        new[1] &= ~t.OPOST
        new[2] = new[2] & ~(t.CSIZE | t.PARENB) | t.CS8
        new[3] &= ~(t.ECHO | t.ECHONL | t.ICANON | t.ISIG | t.IEXTEN)
        new[6][t.VMIN], new[6][t.VTIME] = 1, 0
        self._set(new)

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            self._set(self._old)

    def _set(self, attributes: list[Any]) -> None:
        import termios

        try:
            termios.tcsetattr(self._fd, termios.TCSANOW, attributes)
        except termios.error:  # the terminal has hung up
            pass
