"""IDLE: an agent knows when nothing in its care will ever run by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.native.wireside import AGENT, Controller, Held, Refused, alive, wait_for

from isolat.wire import kinds as k

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root to look into processes")

DAY_S = 86400
TIMERS = """
import ctypes, signal
libc = ctypes.CDLL(None, use_errno=True)
timer = ctypes.c_void_p()
assert libc.timer_create(1, None, ctypes.byref(timer)) == 0
"""
TIMERFD = """
import ctypes, select
libc = ctypes.CDLL(None)
fd = libc.timerfd_create(1, 0)
libc.timerfd_settime(fd, 0, (ctypes.c_long * 4)(0, 0, {seconds}, 0), None)
select.select([], [], [])
"""
FOREVER = {
    "read": "import sys; sys.stdin.read()",
    "pause": "import signal; signal.pause()",
    "wait": "import subprocess, sys; subprocess.run(['cat'])",
    "select": "import select; select.select([0], [], [])",
    "poll": "import select; p = select.poll(); p.register(0, 1); p.poll()",
    "epoll": "import select; e = select.epoll(); e.register(0, 1); e.poll()",
    "accept": "import socket; s = socket.socket(); s.listen(); s.accept()",
    "recv": "import socket; a, b = socket.socketpair(); a.recv(1)",
    "write": "import os; r, w = os.pipe(); os.write(w, bytes(1 << 20))",
    "lock": "import fcntl, os; a, b = (os.open('/bin', 0) for _ in 'ab'); fcntl.flock(a, 2); fcntl.flock(b, 2)",
    "sigwait": "import signal; signal.sigwait([10])",
    "futex": "import threading; threading.Lock().acquire(); x = threading.Lock(); x.acquire(); x.acquire()",
    "threads": "import sys, threading; [threading.Thread(target=sys.stdin.read).start() for _ in range(3)]",
    "for ever": f"import time; time.sleep({100 * 365 * DAY_S})",
    "no end": "import ctypes; ctypes.CDLL(None).nanosleep((ctypes.c_long * 2)(2**63 - 1, 0), None)",
    "a timer that is not set": TIMERFD.format(seconds=0),
}
BUSY = {
    "computing": "while True: pass",
    "select": "import select; select.select([0], [], [], 1000)",
    "poll": "import select; p = select.poll(); p.register(0, 1); p.poll(1_000_000)",
    "epoll": "import select; e = select.epoll(); e.register(0, 1); e.poll(1000)",
    "sigwait": "import signal; signal.sigtimedwait([10], 1000)",
    "a thread": "import threading\ndef f():\n  while True: pass\nthreading.Thread(target=f).start(); input()",
    "poll for a week": "import select; select.poll().poll(7 * 86_400_000)",
    "a day that may be over soon": f"import signal; signal.sigtimedwait([10], {DAY_S})",
    "a time limit": "import socket, struct; a, b = socket.socketpair();"
    " a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack('ll', 1000, 0)); a.recv(1)",
    "a timer": TIMERS + "signal.pause()",
    "two that take turns": "a, b = os.pipe(); c, d = os.pipe()\n"
    "r, w = (a, d) if os.fork() else (c, b)\n"
    "os.write(w, b'x')\n"
    "while True: os.read(r, 1); os.write(w, b'x')",
}
KNOWN = {
    "until": "import time; time.sleep(1000)",
    "lock": "import threading; x = threading.Lock(); x.acquire(); x.acquire(timeout=1000)",
    "timerfd": TIMERFD.format(seconds=1000),
}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Held]:
    held = Held([str(AGENT), "--fd", "3"], 3, tmp_path / "stderr", {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    held.c.hello()
    yield held
    held.stop()


def idle(c: Controller) -> int:
    return c.ask(k.IDLE).int(k.T_COUNT, -2)


def start(c: Controller, script: str) -> int:
    """Run a Python script whose stdin is open and silent for ever; its pid."""
    silent = "import os; os.dup2(os.pipe()[0], 0)\n"
    pid = c.spawn("p", [sys.executable, "-S", "-c", silent + script])
    wait_for(lambda: b"-c" in Path(f"/proc/{pid}/cmdline").read_bytes(), "the script")
    return pid


def test_nothing_at_all_is_idle(agent: Held) -> None:
    assert idle(agent.c) == -1


@pytest.mark.parametrize("name", FOREVER)
def test_what_waits_for_others_is_idle(agent: Held, name: str) -> None:
    pid = start(agent.c, FOREVER[name])
    wait_for(lambda: idle(agent.c) == -1, name)
    assert alive(pid)


@pytest.mark.parametrize("name", BUSY)
def test_what_runs_or_will_soon_is_not(agent: Held, name: str) -> None:
    start(agent.c, BUSY[name])
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        assert idle(agent.c) == 0
        time.sleep(0.02)


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_end_is_told(agent: Held, name: str) -> None:
    start(agent.c, KNOWN[name])
    wait_for(lambda: 900_000 < idle(agent.c) <= 1_000_000, name)


@pytest.mark.parametrize(
    "script", [f"import time; time.sleep({2 * DAY_S})", TIMERFD.format(seconds=2 * DAY_S)], ids=["until", "timerfd"]
)
def test_what_is_days_away_is_told_like_any_other_time(agent: Held, script: str) -> None:
    start(agent.c, script)
    wait_for(lambda: 1990 * DAY_S < idle(agent.c) <= 2000 * DAY_S, "its end")


def test_a_stopped_process_and_a_dead_one_are_idle(agent: Held) -> None:
    pid = start(agent.c, "import os\nif os.fork():\n  while True: pass")  # the child is never waited for
    assert idle(agent.c) == 0
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: idle(agent.c) == -1, "rest")
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: idle(agent.c) == 0, "going on")


@pytest.mark.parametrize("kind", [k.RESUME, k.SETTLE])
def test_a_machine_of_others_is_left_alone(agent: Held, kind: int) -> None:
    with pytest.raises(Refused, match="not its own"):
        agent.c.ask(kind, [(k.T_DATA, bytes(64)), (k.T_TIME, 1), (k.T_HOST, "never")])


def test_the_processes_of_others_do_not_count(agent: Held) -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            assert idle(agent.c) == -1
        finally:
            other.kill()


class Application:
    """A process in a root and with the file of a control group, so that an exercise shows: it writes there, too."""

    def __init__(self, c: Controller, directory: Path, script: str) -> None:
        self.c = c
        self.joined = directory / "cgroup.procs"
        self.joined.touch()
        silent = "import os; os.dup2(os.pipe()[0], 0)\n"
        more = [(k.T_ROOT, b"/"), (k.T_CGROUP, os.fsencode(self.joined))]
        self.pid = c.spawn("p", [sys.executable, "-S", "-c", silent + script], more=more)
        assert self.joined.read_text() == "0"
        self.joined.write_text("")

    def asked(self, op: int = 1) -> int:
        return self.c.ask(k.IDLE, [(k.T_OP, op)]).int(k.T_COUNT, -2)

    @property
    def exercised(self) -> bool:
        return bool(self.joined.read_text())


def test_an_exercise_is_over_when_it_is_answered_and_nobody_hears_of_it(agent: Held, tmp_path: Path) -> None:
    application = Application(agent.c, tmp_path, FOREVER["pause"])
    wait_for(lambda: idle(agent.c) == -1, "rest")
    assert not application.exercised
    assert application.asked() == -1
    assert application.exercised
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert children == [str(application.pid)]
    assert list(agent.c.procs()) == ["p"]
    assert agent.c.events == []


def test_there_is_no_exercise_while_something_runs_or_when_nobody_wants_it(agent: Held, tmp_path: Path) -> None:
    application = Application(agent.c, tmp_path, BUSY["computing"])
    assert application.asked() == 0
    assert not application.exercised
    os.kill(application.pid, signal.SIGSTOP)
    wait_for(lambda: idle(agent.c) == -1, "rest")
    assert application.asked(op=0) == -1
    assert not application.exercised


def test_an_exercise_without_an_application_is_none(agent: Held) -> None:
    assert agent.c.ask(k.IDLE, [(k.T_OP, 1)]).int(k.T_COUNT, -2) == -1


def test_many_exercises_leave_nothing(agent: Held, tmp_path: Path) -> None:
    application = Application(agent.c, tmp_path, FOREVER["pause"])
    wait_for(lambda: idle(agent.c) == -1, "rest")
    descriptors = Path(f"/proc/{agent.pid}/fd")
    before = len(list(descriptors.iterdir()))
    assert [application.asked() for _ in range(50)] == [-1] * 50
    assert len(list(descriptors.iterdir())) == before
