"""The command on a real terminal (a pty): keys, signals, job control, sizes, and the terminal as it was afterwards."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolat.wire import kinds as k

from .daemon import Daemon, Request
from .keeper import Keeper

SOURCE = Path(__file__).parents[3] / "src"
PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from isolat.cli.main import entry; entry()"
# The first terminal that a session's leader opens becomes its controlling terminal.
TAKE_TERMINAL = "import posix; posix.close(posix.open(posix.ttyname(1), posix.O_RDWR)); "


class Session:
    """``isolat`` with a terminal of its own, a keeper at the other end, and the test between them."""

    def __init__(self, daemon: Daemon, *words: str, before: Callable[[], None] | None = None) -> None:
        self.answered = threading.Event()
        self.keeper = Keeper()
        self.master, slave = pty.openpty()
        self.resize(30, 100)
        self.cooked = termios.tcgetattr(slave)

        def answer(request: Request) -> None:
            try:
                if before is not None:
                    before()
                request.stream(self.keeper)
                self.keeper.gone.wait(20)
                request.ok(code=None)
            finally:
                self.answered.set()

        daemon.on(words[0], answer)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", TAKE_TERMINAL + PROGRAM, str(SOURCE), "--root", daemon.root, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        self.slave = slave

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, cols, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def shows(self, text: bytes, seconds: float = 10) -> bytes:
        """Read the terminal until it shows ``text``."""
        found = b""
        end = time.monotonic() + seconds
        while text not in found and time.monotonic() < end:
            if select.select([self.master], [], [], 0.2)[0]:
                found += os.read(self.master, 65536)
        assert text in found
        return found

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def until(self, what: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end
            time.sleep(0.01)

    def stopped(self) -> bool:
        pid, status = os.waitpid(self.process.pid, os.WNOHANG | os.WUNTRACED)
        return pid == self.process.pid and os.WIFSTOPPED(status)

    def ends(self) -> int:
        code = self.process.wait(20)
        assert termios.tcgetattr(self.slave) == self.cooked
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.keeper.cut()
        self.answered.wait(20)
        self.keeper.close()
        os.close(self.master)
        os.close(self.slave)


Make = Callable[..., Session]


@pytest.fixture
def session(daemon: Daemon) -> Iterator[Make]:
    made: list[Session] = []

    def make(*words: str, **more: object) -> Session:
        made.append(Session(daemon, *words, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def started(one: Session) -> Session:
    """Wait until it is connected: its first output passes through."""
    one.keeper.write(1, b"ready")
    one.shows(b"ready")
    return one


def test_with_a_terminal_every_key_goes_inside_as_it_is(session: Make) -> None:
    one = started(session("run", "-it", "debian"))
    assert one.is_raw()
    one.type(b"a\r\x03\x1a\x04\x1b[A")
    one.keeper.wait_for(lambda: bytes(one.keeper.stdin) == b"a\r\x03\x1a\x04\x1b[A")
    assert one.keeper.signals() == []
    one.keeper.write(1, b"x\r\ny")
    assert b"x\r\ny" in one.shows(b"y")
    one.keeper.exit(4)
    assert one.ends() == 4


def test_the_size_goes_with_the_request_and_follows_the_terminal(session: Make, daemon: Daemon) -> None:
    one = started(session("run", "-it", "debian"))
    assert (daemon.requests[0].args["rows"], daemon.requests[0].args["cols"]) == (30, 100)
    one.resize(40, 120)
    one.keeper.wait_for(lambda: (40, 120) in one.keeper.sizes())
    one.keeper.exit(0)
    assert one.ends() == 0


def test_the_detach_keys_leave_it_running(session: Make) -> None:
    one = started(session("run", "-it", "debian"))
    one.type(b"x\x10\x11")
    assert one.ends() == 0
    assert one.keeper.gone.wait(10)
    assert bytes(one.keeper.stdin) == b"x"


def test_the_terminal_is_restored_when_the_keeper_dies(session: Make) -> None:
    one = started(session("run", "-it", "debian"))
    assert one.is_raw()
    one.keeper.cut()
    assert one.ends() == 125


def test_ctrl_c_without_a_terminal_inside_interrupts_the_group_there(session: Make) -> None:
    one = started(session("run", "-i", "debian"))
    assert not one.is_raw()
    one.type(b"\x03")
    one.keeper.wait_for(lambda: one.keeper.signals() == [(signal.SIGINT, k.SCOPE_GROUP)])
    one.keeper.exit(130, signal.SIGINT)
    assert one.ends() == 130


def test_ctrl_z_stops_what_is_inside_and_fg_continues_it(session: Make) -> None:
    one = started(session("run", "-i", "debian"))
    one.type(b"\x1a")
    one.keeper.wait_for(lambda: one.keeper.signals() == [(signal.SIGSTOP, k.SCOPE_GROUP)])
    one.until(one.stopped)
    one.process.send_signal(signal.SIGCONT)
    one.keeper.wait_for(lambda: one.keeper.signals()[1:] == [(signal.SIGCONT, k.SCOPE_GROUP)])
    one.keeper.exit(0)
    assert one.ends() == 0


def test_raw_mode_comes_back_after_a_stop(session: Make) -> None:
    one = started(session("run", "-it", "debian"))
    one.process.send_signal(signal.SIGSTOP)
    one.until(one.stopped)
    termios.tcsetattr(one.slave, termios.TCSANOW, one.cooked)  # as a shell does
    one.process.send_signal(signal.SIGCONT)
    one.until(one.is_raw)
    one.keeper.exit(0)
    assert one.ends() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_to_the_command_reach_the_process(session: Make, number: signal.Signals) -> None:
    one = started(session("run", "debian"))
    one.process.send_signal(number)
    one.keeper.wait_for(lambda: one.keeper.signals() == [(number, k.SCOPE_PROCESS)])
    one.keeper.exit(128 + number, number)
    assert one.ends() == 128 + number


def test_a_signal_reaches_the_process_while_our_output_blocks(session: Make) -> None:
    one = started(session("run", "debian"))
    termios.tcflow(one.slave, termios.TCOOFF)  # as ctrl-s: whoever writes to the terminal blocks
    one.keeper.write(1, b"x" * 200_000)
    time.sleep(0.3)
    one.process.send_signal(signal.SIGTERM)
    one.keeper.wait_for(lambda: one.keeper.signals() == [(signal.SIGTERM, k.SCOPE_PROCESS)])


def test_an_interrupt_before_the_start_is_passed_on_afterwards(session: Make) -> None:
    made: list[Session] = []

    def interrupt() -> None:
        time.sleep(0.2)
        made[0].process.send_signal(signal.SIGINT)
        time.sleep(0.2)

    made.append(session("run", "debian", before=interrupt))
    one = made[0]
    one.keeper.wait_for(lambda: one.keeper.signals() == [(signal.SIGINT, k.SCOPE_GROUP)])
    one.keeper.exit(130, signal.SIGINT)
    assert one.ends() == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_before_the_start_gives_up(session: Make, number: int) -> None:
    made: list[Session] = []

    def interrupt() -> None:
        for _ in range(2):
            time.sleep(0.2)
            made[0].process.send_signal(number)
        time.sleep(0.2)

    made.append(session("run", "debian", before=interrupt))
    assert made[0].ends() == 128 + number


def test_a_pipeline_whose_reader_ends_ends_too(daemon: Daemon) -> None:
    def answer(request: Request) -> None:
        keeper = Keeper()
        keeper.on_signal = lambda n: keeper.exit(128 + n, n)
        request.stream(keeper)
        try:
            while not keeper.gone.is_set():
                keeper.write(1, b"y\n" * 10000)
        except OSError:
            pass
        request.ok(code=141)
        keeper.close()

    daemon.on("run", answer)
    command = f"'{sys.executable}' -I -S -c '{PROGRAM}' '{SOURCE}' --root '{daemon.root}' run debian yes"
    shell = ["bash", "-c", f"{command} | head -n 2; echo ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, capture_output=True, timeout=30, check=True)
    assert done.stdout == b"y\ny\n141\n"
    assert done.stderr == b""
