"""A guest in which nothing will happen by itself is stopped, and goes on before the next word to it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tests.unit.native.test_agent import guest
from tests.unit.native.wireside import AGENT, Controller, Held, Refused, alive, start_keeper, wait_for

from isolat.wire import kinds as k

SH = "/bin/sh"
PARK_MS = 60

# It tells when it was asked, answers IDLE with what its argument says, and everything else with OK.
ANSWERS = """
import time
out = open(sys.argv[1], "w", buffering=1)
count = {count}
while True:
    f = recv()
    if f.kind == k.IDLE:
        print(time.monotonic(), f.int(k.T_OP, 0), file=out)
        {on_idle}
        say(k.OK, f.id, [(k.T_COUNT, count)])
    else:
        say(k.OK, f.id, [(k.T_PID, 7), (k.T_DATA, b"data"), (k.T_SIZE, 4)])
"""


class Parked:
    def __init__(
        self, c: Controller, directory: Path, count: int = -1, on_idle: str = "pass", park_ms: int = PARK_MS
    ) -> None:
        self.c = c
        self.asked = directory / "asked"
        self.asked.touch()
        argv = [*guest(ANSWERS.format(count=count, on_idle=on_idle)), str(self.asked)]
        self.pid = c.spawn("guest", argv, flags=k.F_CONTROL | k.F_SERIAL, more=[(k.T_PARK, park_ms)])

    def times(self) -> list[float]:
        return [float(line.split()[0]) for line in self.asked.read_text().splitlines()]

    def exercises(self) -> list[int]:
        """Of each question, whether it asked for an exercise first."""
        return [int(line.split()[1]) for line in self.asked.read_text().splitlines()]

    def stopped(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def parked(self) -> bool:
        return self.stopped() and self.c.procs()["guest"].int(k.T_STATE) == 2

    def wait(self) -> None:
        wait_for(self.parked, "parking")

    def read(self) -> bytes:
        return self.c.ask(k.READ, [(k.T_TO, "guest"), (k.T_PATH, b"/x")]).bytes(k.T_DATA)


def awake(p: Parked) -> bool:
    return not p.stopped() and p.c.procs()["guest"].int(k.T_STATE) == 0


def test_it_is_stopped_and_wakes_for_a_word(c: Controller, tmp_path: Path) -> None:
    p = Parked(c, tmp_path)
    for _ in range(3):
        p.wait()
        assert p.read() == b"data"
        assert awake(p)


def test_it_is_asked_after_a_while_and_then_never_again(keeper: Held, tmp_path: Path) -> None:
    start = time.monotonic()
    p = Parked(keeper.c, tmp_path)
    p.wait()
    time.sleep(5 * PARK_MS / 1000)
    assert len(p.times()) == 1
    assert p.times()[0] - start > PARK_MS / 1000
    switches = Path(f"/proc/{keeper.pid}/status").read_text().split("voluntary_ctxt_switches:")[1].split()[0]
    time.sleep(0.5)
    assert Path(f"/proc/{keeper.pid}/status").read_text().split("voluntary_ctxt_switches:")[1].split()[0] == switches


def test_it_exercises_before_it_is_stopped_for_the_first_time_only(c: Controller, tmp_path: Path) -> None:
    p = Parked(c, tmp_path)
    for _ in range(3):
        p.wait()
        p.read()
    p.wait()
    assert p.exercises() == [1, 0, 0, 0]


def test_a_busy_one_is_asked_for_its_exercise_again(c: Controller, tmp_path: Path) -> None:
    p = Parked(c, tmp_path, count=0)
    wait_for(lambda: len(p.times()) == 3, "three questions")
    assert p.exercises() == [1, 1, 1]


def test_one_in_which_something_was_started_needs_no_exercise(c: Controller, tmp_path: Path) -> None:
    p = Parked(c, tmp_path)
    c.spawn("main", ["true"], flags=k.F_MAIN, to="guest")
    c.spawn("exec", ["true"], to="guest")
    p.wait()
    assert p.exercises() == [0]


def test_its_main_process_is_no_exercise(c: Controller, tmp_path: Path) -> None:
    p = Parked(c, tmp_path)
    c.spawn("main", ["true"], flags=k.F_MAIN, to="guest")
    p.wait()
    assert p.exercises() == [1]


def test_fetching_the_monitor_wakes_it(c: Controller, tmp_path: Path) -> None:
    r, w = os.pipe()
    c.ask(k.HOLD, [(k.T_KEY, "qmp")], [w])
    p = Parked(c, tmp_path)
    p.wait()
    c.ask(k.FETCH, [(k.T_KEY, "qmp")])
    assert awake(p)
    os.close(r)
    os.close(w)


def test_a_daemon_wakes_it_by_a_signal(c: Controller, tmp_path: Path) -> None:
    p = Parked(c, tmp_path)
    p.wait()
    c.ask(k.SIGNAL, [(k.T_KEY, "guest"), (k.T_SIGNAL, 18)])
    assert awake(p)
    p.wait()


def test_it_goes_on_when_something_in_it_is_due(c: Controller, tmp_path: Path) -> None:
    """Two seconds are to 5 ms what an hour is to ten seconds: worth being stopped for."""
    p = Parked(c, tmp_path, count=2000, park_ms=5)
    p.wait()
    first = p.times()[0]
    time.sleep(1)
    assert p.parked()
    assert len(p.times()) == 1
    wait_for(lambda: len(p.times()) == 2, "going on")
    assert 1.9 < p.times()[1] - first < 3
    p.wait()


def test_another_process_leaves_it_stopped(c: Controller, tmp_path: Path) -> None:
    p = Parked(c, tmp_path)
    p.wait()
    assert c.run("p", ["echo", "x"]).stdout == b"x\n"
    assert p.parked()


@pytest.mark.parametrize("count", [0, 5000, -2])
def test_a_busy_one_is_left_alone_and_asked_more_and_more_seldom(c: Controller, tmp_path: Path, count: int) -> None:
    p = Parked(c, tmp_path, count)
    wait_for(lambda: len(p.times()) == 4, "four questions")
    gaps = [b - a for a, b in zip(p.times(), p.times()[1:], strict=False)]
    assert not p.stopped()
    for i, gap in enumerate(gaps):
        assert gap > 2 ** (i + 1) * PARK_MS / 1000 * 0.9
    p.read()
    wait_for(lambda: len(p.times()) == 5, "a question soon after a word")
    assert p.times()[4] - p.times()[3] < 8 * PARK_MS / 1000


def test_what_was_said_meanwhile_counts(c: Controller, tmp_path: Path) -> None:
    """The answer to IDLE comes late: by then it has got a request."""
    p = Parked(c, tmp_path, on_idle="time.sleep(0.5 if len(sys.argv) < 3 else 0); sys.argv.append('')")
    wait_for(p.times, "the question")
    p.c.send(k.READ, [(k.T_TO, "guest"), (k.T_PATH, b"/x")])
    first = p.times()[0]
    while time.monotonic() < first + 0.55:
        assert not p.stopped()
        time.sleep(0.02)
    p.wait()
    assert len(p.times()) >= 2


def test_a_stopped_one_can_be_killed(c: Controller, tmp_path: Path) -> None:
    p = Parked(c, tmp_path)
    p.wait()
    c.ask(k.SIGNAL, [(k.T_KEY, "guest"), (k.T_SIGNAL, 15)])
    assert c.exited("guest").int(k.T_SIGNAL) == 15


def test_a_stopped_one_ends_with_its_keeper(keeper: Held, tmp_path: Path) -> None:
    p = Parked(keeper.c, tmp_path)
    p.wait()
    keeper.kill()
    wait_for(lambda: not alive(p.pid), "its end")


def test_quit_takes_a_stopped_one_along(keeper: Held, tmp_path: Path) -> None:
    p = Parked(keeper.c, tmp_path)
    p.wait()
    keeper.c.ask(k.QUIT)
    assert not alive(p.pid)


@pytest.mark.root
def test_a_real_agent_with_a_silent_process(c: Controller) -> None:
    flags = k.F_CONTROL | k.F_SERIAL
    pid = c.spawn("guest", [str(AGENT), "--fd", "3"], flags=flags, more=[(k.T_PARK, PARK_MS)])
    client = c.adopt("guest/p", stdin=True)
    c.spawn("p", ["cat"], to="guest", flags=k.F_STDIN)
    wait_for(lambda: c.procs()["guest"].int(k.T_STATE) == 2, "parking")
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "being stopped")
    client.write(b"wake up\n")
    assert client.read_until(b"\n") == b"wake up\n"
    assert client.finish().code == 0
    client.close()


# the end of a machine


def test_a_guest_gets_time_for_its_own_end(keeper: Held, tmp_path: Path) -> None:
    flags = k.F_CONTROL | k.F_SERIAL
    said = tmp_path / "said"
    after = (
        "f = recv(); say(k.OK, f.id, [(k.T_PID, 7)]); say(k.EXITED, 0, [(k.T_KEY, 'main'), (k.T_CODE, 4)])\n"
        "time.sleep(0.4); open(sys.argv[1], 'w').write('done')"
    )
    keeper.c.spawn("guest", [*guest(after), str(said)], flags=flags, more=[(k.T_GRACE, 5000)])
    keeper.c.spawn("main", ["x"], to="guest", flags=k.F_MAIN)
    keeper.c.exited("guest/main")
    keeper.c.close()  # a keeper that nobody needs any more waits for it all the same
    assert keeper.process.wait(5) == 0
    assert said.read_text() == "done"


def test_what_the_agent_says_of_memory_is_told_and_recorded(keeper: Held, tmp_path: Path) -> None:
    ended = "[(k.T_KEY, 'main'), (k.T_CODE, 0), (k.T_SIGNAL, 9), (k.T_OPTIONS, 'oom')]"
    after = f"f = recv(); say(k.OK, f.id, [(k.T_PID, 7)]); say(k.EXITED, 0, {ended}); time.sleep(60)"
    keeper.c.spawn("guest", guest(after), flags=k.F_CONTROL | k.F_SERIAL)
    keeper.c.spawn("main", ["x"], to="guest", flags=k.F_MAIN)
    assert keeper.c.exited("guest/main").text(k.T_OPTIONS) == "oom"
    assert '"oom":true' in (tmp_path / "env" / "exit.json").read_text()


def test_the_grace_has_an_end(c: Controller) -> None:
    after = (
        "f = recv(); say(k.OK, f.id, [(k.T_PID, 7)]); say(k.EXITED, 0, [(k.T_KEY, 'main'), (k.T_CODE, 4)])\n"
        "time.sleep(60)"
    )
    pid = c.spawn("guest", guest(after), flags=k.F_CONTROL | k.F_SERIAL, more=[(k.T_GRACE, 300)])
    start = time.monotonic()
    c.spawn("main", ["x"], to="guest", flags=k.F_MAIN)
    assert c.exited("guest/main").int(k.T_CODE) == 4
    assert alive(pid)
    assert c.exited("guest").int(k.T_SIGNAL) == 9
    assert time.monotonic() - start > 0.25


def test_without_grace_it_ends_with_main(c: Controller) -> None:
    c.spawn("guest", [str(AGENT), "--fd", "3"], flags=k.F_CONTROL | k.F_SERIAL)
    assert c.run("main", [SH, "-c", "exit 4"], to="guest", flags=k.F_MAIN).code == 4
    assert c.exited("guest").int(k.T_SIGNAL) == 9


def test_its_last_words_are_kept(c: Controller, tmp_path: Path) -> None:
    words = "for i in range(30000): print('line', i, file=sys.stderr)\nprint('the very end')"
    c.spawn("guest", guest("recv()\n" + words), flags=k.F_CONTROL | k.F_SERIAL)
    with pytest.raises(Refused):
        c.ask(k.READ, [(k.T_TO, "guest"), (k.T_PATH, b"/x")])
    c.exited("guest")
    assert (tmp_path / "env" / "guest.log").read_bytes()[:7] == b"line 0\n"
    assert (tmp_path / "env" / "guest.log").stat().st_size == 64 << 10
    tail = (tmp_path / "env" / "guest.tail").read_bytes()
    assert len(tail) == 4096
    assert tail.endswith(b"line 29999\nthe very end\n")


def test_a_guest_that_can_not_be_spoken_to_any_more_is_killed(c: Controller) -> None:
    pid = c.spawn("guest", guest("s.close(); time.sleep(60)"), flags=k.F_CONTROL | k.F_SERIAL)
    assert c.exited("guest").int(k.T_SIGNAL) == 9
    assert not alive(pid)


def test_how_long_a_keeper_waits_is_told(tmp_path: Path) -> None:
    held = start_keeper(tmp_path / "short", "--idle-s", "1")
    held.c.hello()
    start = time.monotonic()
    held.c.close()
    assert held.process.wait(10) == 0
    assert time.monotonic() - start > 0.8


def test_a_keeper_waits_no_longer_than_it_can_count(tmp_path: Path) -> None:
    held = start_keeper(tmp_path / "long", "--idle-s", "3000000")
    assert held.process.wait(10) == 64
    held.c.close()


def test_serial_is_for_channels_of_keepers(c: Controller) -> None:
    for flags in (k.F_SERIAL, k.F_SERIAL | k.F_CONTROL | k.F_LAUNCHER):
        with pytest.raises(Refused):
            c.spawn("p", ["true"], flags=flags)
    c.spawn("guest", [str(AGENT), "--fd", "3"], flags=k.F_CONTROL | k.F_SERIAL)
    c.spawn("guest", [str(AGENT), "--fd", "3"], to="guest", flags=k.F_CONTROL | k.F_SERIAL)
    with pytest.raises(Refused):
        c.spawn("p", ["true"], to="guest/guest")
