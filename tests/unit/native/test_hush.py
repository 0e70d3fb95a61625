"""Silence on a serial channel, and an agent that finds itself at another host: what a copy of a machine needs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.native.test_park import Parked
from tests.unit.native.wireside import AGENT, TIMEOUT_S, Controller, Held, Refused, spawn_fields, wait_for

from isolat.wire import codec
from isolat.wire import kinds as k

SH = "/bin/sh"
SERIAL = k.F_CONTROL | k.F_SERIAL
QUIET_S = 0.2
CREDIT_BYTES, RESERVE_BYTES = 256 << 10, 72 << 10


@pytest.fixture
def g(c: Controller) -> Controller:
    c.spawn("guest", [str(AGENT), "--fd", "3"], flags=SERIAL)
    return c


class Host(Controller):
    """An agent's host: keeps everything that it hears, in order."""

    def answer(self, id: int, timeout_s: float = TIMEOUT_S) -> codec.Frame:
        while True:
            frame = self.recv(timeout_s)
            if frame.id == id and frame.kind in (k.OK, k.ERROR):
                if frame.kind == k.ERROR:
                    raise Refused(frame)
                return frame
            self.events.append(frame)

    def exited(self, key: str) -> codec.Frame:
        while True:
            for event in self.events:
                if event.kind == k.EXITED and event.text(k.T_KEY) == key:
                    return event
            self.events.append(self.recv())


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Held]:
    held = Held([str(AGENT), "--fd", "3"], 3, tmp_path / "stderr", {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    held.c = Host(held.c.sock)
    held.c.hello()
    yield held
    held.stop()


def hush(c: Controller, to: str = "guest", op: int = 0) -> None:
    c.ask(k.HUSH, [(k.T_OP, op), *([(k.T_TO, to)] if to else [])])


def start(c: Controller, key: str, script: str, number: int, flags: int = 0) -> int:
    return c.spawn(key, [SH, "-c", script], flags=flags, more=[(k.T_STREAM, number)])


def frames(c: Controller, seconds: float = QUIET_S) -> list[codec.Frame]:
    """What comes by itself within this time."""
    found = []
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            found.append(c.recv(left))
        except TimeoutError:
            break
    return found


def output(found: list[codec.Frame], number: int) -> bytes:
    return b"".join(f.body[1:] for f in found if f.kind == k.DATA and f.id == number and f.body[0] == k.STDOUT)


TICKS = "i=0; while [ $i -lt 200 ]; do echo $i; i=$((i+1)); sleep 0.01; done"
TICKED = b"".join(b"%d\n" % n for n in range(200))


# the agent


def test_a_silent_agent_says_nothing_until_the_next_word(agent: Held) -> None:
    start(agent.c, "p", TICKS, 5)
    hush(agent.c, "")
    agent.c.events.clear()
    assert frames(agent.c) == []
    hush(agent.c, "", 1)
    code = agent.c.exited("p").int(k.T_CODE)
    assert code == 0


def test_what_was_held_back_comes_whole(agent: Held) -> None:
    start(agent.c, "p", TICKS, 5)
    hush(agent.c, "")
    before = output(agent.c.events, 5)
    assert frames(agent.c, 3) == []
    hush(agent.c, "", 1)
    agent.c.exited("p")
    assert output(agent.c.events, 5) == TICKED
    assert TICKED.startswith(before)


def test_its_ok_comes_after_all_that_was_before(agent: Held) -> None:
    """Also where the channel is full at that moment."""
    start(agent.c, "p", "head -c 200000 /dev/zero; exec sleep 60", 5)
    time.sleep(0.3)
    hush(agent.c, "")
    there = len(output(agent.c.events, 5))
    assert frames(agent.c) == []
    hush(agent.c, "", 1)
    while there < CREDIT_BYTES - RESERVE_BYTES - 65536:
        there += len(output([agent.c.recv()], 5))


def test_a_new_host_is_told_nothing_of_what_was_before(agent: Held) -> None:
    pid = start(agent.c, "main", TICKS, 5)
    start(agent.c, "short", "echo gone; sleep 0.1; exit 3", 6)
    hush(agent.c, "")
    agent.c.events.clear()
    time.sleep(0.3)
    agent.c.hello()
    assert agent.c.events == []
    assert frames(agent.c) == []
    assert set(agent.c.procs()) == {"main", "short"}
    assert agent.c.procs()["main"].int(k.T_PID) == pid
    assert start(agent.c, "main", "something else", 1) == pid
    agent.c.exited("main")
    assert TICKED.endswith(output(agent.c.events, 1))
    assert output(agent.c.events, 5) == b""


def test_one_that_has_ended_before_it_was_bound_tells_its_end(agent: Held) -> None:
    start(agent.c, "p", "sleep 0.1; exit 7", 5)
    hush(agent.c, "")
    time.sleep(0.3)
    agent.c.hello()
    start(agent.c, "p", "anything", 9)
    assert agent.c.exited("p").int(k.T_CODE) == 7


def test_what_nobody_binds_goes_on_and_is_not_told(agent: Held, tmp_path: Path) -> None:
    start(agent.c, "p", f"head -c 1000000 /dev/zero; touch {tmp_path}/done", 5)
    hush(agent.c, "")
    agent.c.events.clear()
    agent.c.hello()
    wait_for((tmp_path / "done").exists, "what nobody listens to")
    assert frames(agent.c) == []


def test_an_answer_that_another_host_waits_for_is_not_given_to_this_one(agent: Held) -> None:
    id = agent.c.send(k.SPAWN, spawn_fields("p", [SH, "-c", "sleep 60"], more=[(k.T_STREAM, 5)]))
    agent.c.send(k.HUSH, [(k.T_OP, 0)])
    agent.c.hello()
    assert all(f.id != id for f in frames(agent.c))


def test_input_of_before_gets_no_credit_from_the_new_host(agent: Held) -> None:
    start(agent.c, "p", "sleep 0.5; cat | wc -c", 5, k.F_STDIN)
    sent = b"x" * 60_000
    for _ in range(3):
        agent.c.send_bytes(codec.pack_raw(k.DATA, b"\0" + sent, 5))
    hush(agent.c, "")
    agent.c.hello()
    start(agent.c, "p", "anything", 1, k.F_STDIN)
    more = b"y" * 50_000
    agent.c.send_bytes(codec.pack_raw(k.DATA, b"\0" + more, 1))
    agent.c.send_bytes(codec.pack_raw(k.EOF, b"\0", 1))
    agent.c.exited("p")
    credit = sum(int.from_bytes(f.body[1:], "little") for f in agent.c.events if f.kind == k.CREDIT and f.id == 1)
    assert output(agent.c.events, 1) == b"%d\n" % (3 * len(sent) + len(more))
    assert credit <= len(more) + 16


def test_a_closed_input_is_told_to_the_new_host(agent: Held) -> None:
    start(agent.c, "p", "cat; sleep 60", 5, k.F_STDIN)
    agent.c.send_bytes(codec.pack_raw(k.EOF, b"\0", 5))
    time.sleep(0.2)
    hush(agent.c, "")
    agent.c.hello()
    start(agent.c, "p", "anything", 1, k.F_STDIN)
    assert [(f.kind, f.id, f.body) for f in frames(agent.c)] == [(k.EOF, 1, b"\0")]


# the keeper


def test_a_stream_loses_nothing_over_a_silence(g: Controller) -> None:
    client = g.adopt("guest/p")
    g.spawn("p", [SH, "-c", TICKS], to="guest")
    for _ in range(4):
        hush(g)
        time.sleep(0.1)
        hush(g, op=1)
    result = client.finish()
    client.close()
    assert (result.stdout, result.code) == (TICKED, 0)


def test_input_waits_and_arrives(g: Controller) -> None:
    client = g.adopt("guest/p", stdin=True)
    g.spawn("p", ["cat"], to="guest", flags=k.F_STDIN)
    hush(g)
    client.write(b"x" * 100_000)
    time.sleep(QUIET_S)
    assert not client.result.stdout
    hush(g, op=1)
    client.end_input()
    assert client.finish().stdout == b"x" * 100_000
    client.close()


def test_the_end_of_who_asked_ends_the_silence(keeper: Held, g: Controller, tmp_path: Path) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(tmp_path / "env" / "keeper.sock"))
    other = Controller(sock)
    other.hello()
    client = g.adopt("guest/p")
    g.spawn("p", [SH, "-c", "sleep 0.1; echo said"], to="guest")
    hush(other)
    with pytest.raises(Refused, match="another controller"):
        hush(g)
    time.sleep(QUIET_S)
    assert client.result.stdout == b""
    other.close()
    assert client.finish().stdout == b"said\n"
    client.close()


def test_a_silent_machine_is_not_parked_and_a_parked_one_wakes(c: Controller, tmp_path: Path) -> None:
    p = Parked(c, tmp_path)
    p.wait()
    asked = len(p.times())
    hush(c)
    time.sleep(5 * 0.06)
    assert not p.stopped()
    assert len(p.times()) == asked
    hush(c, op=1)
    p.wait()


def test_only_machines_can_be_silent(c: Controller, g: Controller) -> None:
    c.spawn("p", [SH, "-c", "sleep 60"])
    for to in ("", "p", "nothing", "guest/guest"):
        with pytest.raises(Refused):
            hush(c, to)
