"""What a serial channel must not lose, and must not be fooled into: one case each."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.native.test_agent import STARTED, guest
from tests.unit.native.wireside import AGENT, Controller, Held, Refused, spawn_fields, wait_for

from isolat.wire import codec
from isolat.wire import kinds as k

SH = "/bin/sh"
SERIAL = k.F_CONTROL | k.F_SERIAL


@pytest.fixture
def g(c: Controller) -> Controller:
    c.spawn("guest", [str(AGENT), "--fd", "3"], flags=SERIAL)
    return c


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Held]:
    held = Held([str(AGENT), "--fd", "3"], 3, tmp_path / "stderr", {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    held.c.hello()
    yield held
    held.stop()


def test_the_next_client_of_a_terminal_can_type_too(g: Controller) -> None:
    """A terminal outlives the one who typed: its stdin has no end."""
    client = g.adopt("guest/p", stdin=True)
    g.spawn("p", [SH, "-c", "for i in 1 2; do read x; echo got $x; done"], to="guest", flags=k.F_TTY | k.F_STDIN)
    client.write(b"one\n")
    client.read_until(b"got one")
    client.end_input()
    client.close()
    client = g.adopt("guest/p", stdin=True)
    client.write(b"two\n")
    client.read_until(b"got two")
    assert client.finish().code == 0
    client.close()


def test_too_much_asked_of_a_guest_is_refused(c: Controller, tmp_path: Path) -> None:
    """And does not end it: it may be a machine that is slow to take what it is told."""
    c.spawn("guest", guest("time.sleep(1)\nwhile True:\n  f = recv()\n  say(k.OK, f.id)"), flags=SERIAL)
    data = bytes(900_000)
    ids = [c.send(k.WRITE, [(k.T_TO, "guest"), (k.T_PATH, b"/x"), (k.T_DATA, data)]) for _ in range(8)]
    with pytest.raises(Refused) as info:
        c.answer(ids[-1])
    assert (info.value.stage, info.value.errno) == ("guest", errno.EAGAIN)
    wait_for(lambda: c.ask(k.WRITE, [(k.T_TO, "guest"), (k.T_PATH, b"/x")]).kind == k.OK, "the guest")


BREACHES = {
    "the same end twice": "s.sendall(codec.pack_raw(k.EOF, b'\\1', n) * 2)",
    "errors of a terminal": "s.sendall(codec.pack_raw(k.DATA, b'\\2x', n))",
    "an end of a terminal's errors": "s.sendall(codec.pack_raw(k.EOF, b'\\2', n))",
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_the_end_of_the_guest(c: Controller, breach: str) -> None:
    client = c.adopt("guest/p")
    c.spawn("guest", guest(STARTED + BREACHES[breach] + "\nrecv(); recv()"), flags=SERIAL)
    c.spawn("p", ["true"], to="guest", flags=k.F_TTY)
    assert client.finish().code == 137
    client.close()


def test_who_greets_as_something_else_is_no_agent(c: Controller) -> None:
    with pytest.raises(Refused) as info:
        c.spawn("guest", guest("recv()", "say(k.OK, hello.id, [(k.T_VERSION, 1), (k.T_ROLE, 'init')]); recv()"),
                flags=SERIAL)  # fmt: skip
    assert info.value.stage == "guest"


def test_input_for_a_process_that_has_none_gathers_nowhere(agent: Held) -> None:
    c = agent.c
    c.spawn("p", ["sleep", "60"], more=[(k.T_STREAM, 5)])
    part = bytes(32 << 10)
    for _ in range(64):
        c.send_bytes(codec.pack_raw(k.DATA, b"\0" + part, 5))
        frame = c.recv()  # it gives credit for what it throws away
        assert (frame.kind, frame.id, frame.body[:1]) == (k.CREDIT, 5, b"\0")


def test_an_agent_with_unread_output_is_not_idle(agent: Held, tmp_path: Path) -> None:
    """It would be stopped with the output on its way."""
    c = agent.c
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"read x < {fifo}; echo out; exec sleep infinity"
    c.spawn("p", [SH, "-c", script], more=[(k.T_STREAM, 900)])
    wait_for(lambda: c.ask(k.IDLE).int(k.T_COUNT) == -1, "a process at rest")
    os.kill(agent.pid, signal.SIGSTOP)
    id = c.send(k.IDLE)
    fifo.write_text("go\n")
    time.sleep(0.3)
    os.kill(agent.pid, signal.SIGCONT)
    frames = [c.recv(), c.recv()]
    answer = next(f for f in frames if f.id == id)
    assert answer.int(k.T_COUNT) == 0 or frames[0].kind == k.DATA
    wait_for(lambda: c.ask(k.IDLE).int(k.T_COUNT) == -1, "a process at rest")


def test_it_is_not_parked_in_its_grace(c: Controller) -> None:
    """It was told to end, and would not."""
    script = (
        STARTED + "say(k.EXITED, 0, [(k.T_KEY, 'main'), (k.T_CODE, 0), (k.T_SIGNAL, 0)])\n"
        "end = time.monotonic() + 3\ns.settimeout(0.05)\n"
        "while time.monotonic() < end:\n"
        "  try: f = recv(); say(k.OK, f.id, [(k.T_COUNT, -1)])\n"
        "  except TimeoutError: pass\n"
        "sys.exit(4)"
    )
    c.spawn("guest", guest(script), flags=SERIAL, more=[(k.T_PARK, 50), (k.T_GRACE, 20_000)])
    c.ask(k.SPAWN, spawn_fields("main", ["true"], k.F_MAIN, "guest"))
    time.sleep(0.4)
    assert c.procs()["guest"].int(k.T_STATE) == 0
    assert c.exited("guest").int(k.T_CODE) == 4
