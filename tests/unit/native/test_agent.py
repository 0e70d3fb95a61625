"""An agent behind a keeper: every stream of its processes is frames on one channel. An ordinary process here."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.native.wireside import (
    AGENT,
    INIT,
    Client,
    Controller,
    Gone,
    Held,
    Line,
    Refused,
    alive,
    spawn_fields,
    wait_for,
)

from isolat.wire import codec
from isolat.wire import kinds as k

SH = "/bin/sh"
FRAME_COST = 16  # of every DATA frame, beside its bytes
CREDIT_BYTES = 256 << 10
RESERVE_BYTES = 72 << 10


@pytest.fixture
def g(c: Controller) -> Controller:
    c.spawn("guest", [str(AGENT), "--fd", "3"], flags=k.F_CONTROL | k.F_SERIAL)
    return c


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Held]:
    """An agent whose keeper is the test."""
    held = Held([str(AGENT), "--fd", "3"], 3, tmp_path / "stderr", {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    assert held.c.hello().text(k.T_ROLE) == "agent"
    yield held
    held.stop()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_sixty_four_megabytes_through_stdin_and_back(g: Controller) -> None:
    data = random.Random(4).randbytes(1 << 20) * 64
    result = g.run("p", ["cat"], to="guest", stdin=data)
    assert digest(result.stdout) == digest(data)
    assert result.code == 0


def test_many_at_once_stay_apart(g: Controller) -> None:
    clients: list[tuple[int, Client]] = []
    for i in range(24):
        client = g.adopt(f"guest/p{i}")
        script = f"head -c 200000 /dev/zero | tr '\\0' {chr(97 + i)}; echo {i} >&2; exit {i}"
        g.spawn(f"p{i}", [SH, "-c", script], to="guest")
        clients.append((i, client))
    for i, client in clients:
        result = client.finish()
        client.close()
        assert (result.stdout, result.stderr, result.code) == (bytes([97 + i]) * 200_000, b"%d\n" % i, i)


def test_a_slow_client_holds_back_and_loses_nothing(g: Controller) -> None:
    slow = g.adopt("guest/p")
    g.spawn("p", [SH, "-c", "head -c 8000000 /dev/urandom | tee /dev/fd/2 | sha256sum >&2"], to="guest")
    time.sleep(0.3)
    assert not g.procs()["guest/p"].int(k.T_STATE)
    assert g.run("q", ["echo", "meanwhile"], to="guest").stdout == b"meanwhile\n"
    result = slow.finish()
    slow.close()
    said = result.stderr[8_000_000:]
    assert said.split()[0].decode() == digest(result.stderr[:8_000_000])


def test_single_bytes_to_a_slow_client_do_not_cut_it_off(g: Controller) -> None:
    script = "import os\nfor i in range(150_000): os.write(1 + i % 2, b'%d' % (i % 10))"
    slow = g.adopt("guest/p")
    g.spawn("p", ["/usr/bin/python3", "-IS", "-c", script], to="guest")
    time.sleep(1)
    result = slow.finish()
    slow.close()
    assert (result.stdout, result.stderr, result.code) == (b"02468" * 15_000, b"13579" * 15_000, 0)


def test_what_was_written_before_the_exit_arrives_before_it(g: Controller) -> None:
    for i in range(20):
        result = g.run(f"p{i}", [SH, "-c", "head -c 60000 /dev/zero; head -c 60000 /dev/zero >&2; exit 1"], to="guest")
        assert (len(result.stdout), len(result.stderr), result.code) == (60_000, 60_000, 1)
        assert (result.order[-1], sorted(result.eof)) == (k.EXITED, [1, 2])


def test_an_end_does_not_wait_for_a_slow_client(g: Controller) -> None:
    slow = g.adopt("guest/p")
    g.spawn("p", [SH, "-c", "head -c 600000 /dev/zero; exit 3"], to="guest")
    assert g.exited("guest/p").int(k.T_CODE) == 3
    result = slow.finish()
    slow.close()
    assert (len(result.stdout), result.code) == (600_000, 3)


def test_what_an_enlarged_pipe_holds_at_the_end_arrives(g: Controller) -> None:
    script = "import fcntl, os; fcntl.fcntl(1, 1031, 1 << 20); os.write(1, bytes(1_000_000))"
    result = g.run("p", ["/usr/bin/python3", "-IS", "-c", script], to="guest")
    assert (len(result.stdout), result.code) == (1_000_000, 0)


def test_a_background_child_does_not_hold_back_the_exit(g: Controller) -> None:
    result = g.run("p", [SH, "-c", "sleep 30 & echo $!; exit 5"], to="guest")
    assert (result.code, sorted(result.eof)) == (5, [1, 2])
    os.kill(int(result.stdout), 9)


def test_a_process_that_closed_its_stdin_costs_its_client_nothing(g: Controller) -> None:
    result = g.run("p", [SH, "-c", "exec 0<&-; sleep 0.2; echo done"], to="guest", stdin=bytes(4 << 20))
    assert (result.stdout, result.code) == (b"done\n", 0)


def test_input_waits_for_a_process_that_does_not_read(g: Controller) -> None:
    client = g.adopt("guest/p", stdin=True)
    g.spawn("p", [SH, "-c", "sleep 0.4; wc -c"], to="guest", flags=k.F_STDIN)
    client.write(bytes(300_000))
    assert g.run("q", ["true"], to="guest").code == 0
    assert client.finish().stdout.strip() == b"300000"
    client.close()


def test_a_client_that_disconnects_ends_stdin_after_what_it_sent(g: Controller) -> None:
    client, watcher = g.adopt("guest/p", stdin=True), g.adopt("guest/p")
    g.spawn("p", [SH, "-c", "sleep 0.2; wc -c"], to="guest", flags=k.F_STDIN)
    client.write(bytes(200_000))
    client.close()
    assert watcher.finish().stdout.strip() == b"200000"
    watcher.close()


def test_output_is_logged_without_a_client(keeper: Held, g: Controller, tmp_path: Path) -> None:
    g.spawn("main", [SH, "-c", "seq 100000"], to="guest", flags=k.F_MAIN | k.F_LOG)
    assert g.exited("guest/main").int(k.T_CODE) == 0
    assert (tmp_path / "env" / "log" / "0").read_bytes().endswith(b"100000\n")
    assert keeper.process.poll() is None


@pytest.mark.parametrize(("command", "code"), [("nosuchcommand", 127), ("/etc", 126)])
def test_what_can_not_be_executed(g: Controller, command: str, code: int) -> None:
    for _ in range(2):  # and the name is free again
        client = g.adopt("guest/p", stdin=True)
        with pytest.raises(Refused) as info:
            g.spawn("p", [command], to="guest", flags=k.F_STDIN)
        assert (info.value.stage, info.value.code) == ("exec", code)
        assert client.finish().error is not None
        client.close()
    assert g.run("p", ["echo", "still"], to="guest").stdout == b"still\n"


def test_control_c_reaches_the_foreground_of_a_terminal(g: Controller) -> None:
    script = "trap 'exit 9' INT; echo ready; while :; do sleep 0.05; done"
    client = g.adopt("guest/p", stdin=True)
    g.spawn("p", [SH, "-c", script], to="guest", flags=k.F_TTY | k.F_STDIN)
    client.read_until(b"ready")
    client.write(b"\x03")
    assert client.finish().code == 9
    client.close()


def test_a_client_resizes_its_terminal(g: Controller) -> None:
    script = "trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.05; done"
    client = g.adopt("guest/p", stdin=True)
    g.spawn("p", [SH, "-c", script], to="guest", flags=k.F_TTY | k.F_STDIN)
    client.read_until(b"ready")
    client.send(k.RESIZE, [(k.T_ROWS, 40), (k.T_COLS, 120)])
    result = client.finish()
    client.close()
    assert b"40 120\r\n" in result.stdout
    assert result.code == 7


def test_no_descriptor_travels(g: Controller) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(Refused) as info:
        g.spawn("p", ["true"], to="guest", flags=k.F_FDS, fds=[null] * 3)
    assert info.value.stage == "guest"
    with pytest.raises(Refused):
        g.ask(k.STEP, [(k.T_TO, "guest"), (k.T_OP, 0), (k.T_STEP, [(k.T_OP, 4)])], [null])
    os.close(null)
    assert g.run("q", ["true"], to="guest").code == 0


def test_a_container_in_a_machine(g: Controller) -> None:
    init = g.spawn("guest", [str(INIT)], to="guest", flags=k.F_CONTROL)
    data = random.Random(5).randbytes(3 << 20)
    result = g.run("p", ["cat"], to="guest/guest", stdin=data)
    assert (digest(result.stdout), result.code) == (digest(data), 0)
    client = g.adopt("guest/guest/q")
    g.spawn("q", ["sleep", "60"], to="guest/guest")
    os.kill(init, 9)
    assert client.finish().code == 137
    client.close()
    assert g.exited("guest/guest").int(k.T_SIGNAL) == 9
    assert g.run("after", ["true"], to="guest").code == 0


def test_a_killed_machine_ends_everything_in_it(keeper: Held, g: Controller) -> None:
    pid = g.procs()["guest"].int(k.T_PID)
    client = g.adopt("guest/p")
    g.spawn("p", [SH, "-c", "echo there; sleep 60"], to="guest")
    client.read_until(b"there")
    os.kill(pid, 9)
    result = client.finish()
    client.close()
    assert (result.code, sorted(result.eof)) == (137, [1, 2])
    assert not alive(pid)
    assert keeper.process.poll() is None


def test_the_agent_ends_with_its_controller(agent: Held) -> None:
    pid = agent.c.spawn("p", [SH, "-c", "trap '' TERM; sleep 60"])
    agent.c.close()
    assert agent.process.wait(5) == 0
    assert not alive(pid)


def test_a_keeper_is_not_held_up_by_a_guest_that_does_not_listen(c: Controller) -> None:
    """It greets, and never reads again."""
    c.spawn("guest", guest("time.sleep(60)"), flags=k.F_CONTROL | k.F_SERIAL)
    ids = [c.send(k.READ, [(k.T_TO, "guest"), (k.T_PATH, b"x" * 9000)]) for _ in range(100)]
    assert c.run("p", ["echo", "here"]).stdout == b"here\n"
    c.ask(k.SIGNAL, [(k.T_KEY, "guest"), (k.T_SIGNAL, 9)])
    with pytest.raises(Refused, match="the guest ended"):
        c.answer(ids[-1])


# What a keeper sees of a guest that is not the agent: a script that speaks for itself.

GREETING = """
import socket, sys, time
sys.path.insert(0, {source!r})
from isolat.wire import codec
from isolat.wire import kinds as k
s = socket.socket(fileno=3)
decoder = codec.Decoder()
waiting = []
def recv():
    while not waiting:
        data = s.recv(1 << 16)
        if not data:
            sys.exit(0)
        waiting.extend(decoder.feed(data))
    return waiting.pop(0)
def say(kind, id, fields=()):
    s.sendall(codec.pack(kind, id, fields))
hello = recv()
assert (hello.kind, hello.int(k.T_VERSION), hello.text(k.T_ROLE)) == (k.HELLO, 1, "keeper")
{before}
say(k.OK, hello.id, [(k.T_VERSION, 1), (k.T_ROLE, "agent"), (k.T_PID, 1)])
{after}
"""
SOURCE = str(Path(codec.__file__).parents[2])


def guest(after: str, before: str = "") -> list[str]:
    return ["/usr/bin/python3", "-IS", "-c", GREETING.format(source=SOURCE, before=before, after=after)]


def test_it_may_come_to_life_late(c: Controller) -> None:
    start = time.monotonic()
    c.spawn("guest", guest("recv()", "time.sleep(0.5)"), flags=k.F_CONTROL | k.F_SERIAL)
    assert time.monotonic() - start > 0.4


@pytest.mark.parametrize(
    "greeting",
    [
        "say(k.HELLO, 0, [(k.T_VERSION, 1)])",
        "say(k.OK, hello.id, [(k.T_VERSION, 2)])",
        "say(k.OK, hello.id + 1, [(k.T_VERSION, 1)])",
        "say(k.ERROR, hello.id, [(k.T_MESSAGE, 'no')])",
        "s.sendall(codec.pack_raw(k.DATA, b'\\1x', 1))",
        "s.sendall(bytes(100))",
    ],
)
def test_a_wrong_greeting_is_the_end(c: Controller, greeting: str) -> None:
    with pytest.raises(Refused) as info:
        c.spawn("guest", guest("recv(); recv()", greeting), flags=k.F_CONTROL | k.F_SERIAL)
    assert info.value.stage == "guest"


STARTED = "f = recv(); n = f.int(k.T_STREAM); say(k.OK, f.id, [(k.T_PID, 7)])\n"
BREACHES = {
    "beyond the credit": "for _ in range(64): s.sendall(codec.pack_raw(k.DATA, b'\\1' + bytes(65520), n))",
    "small frames beyond the credit": "s.sendall(codec.pack_raw(k.DATA, b'\\1x', n) * 200_000)",
    "a number nobody has": "s.sendall(codec.pack_raw(k.DATA, b'\\1x', n + 1))",
    "no number": "s.sendall(codec.pack_raw(k.DATA, b'\\1x', 0))",
    "its own input": "s.sendall(codec.pack_raw(k.DATA, b'\\0x', n))",
    "a fourth stream": "s.sendall(codec.pack_raw(k.DATA, b'\\3x', n))",
    "too large": "s.sendall(codec.pack_raw(k.DATA, b'\\1' + bytes(65537), n))",
    "nothing": "s.sendall(codec.pack_raw(k.DATA, b'', n))",
    "after its end": "s.sendall(codec.pack_raw(k.EOF, b'\\1', n) + codec.pack_raw(k.DATA, b'\\1x', n))",
    "credit for an output": "s.sendall(codec.pack_raw(k.CREDIT, b'\\1\\1\\0\\0\\0', n))",
    "credit for what was not sent": "s.sendall(codec.pack_raw(k.CREDIT, b'\\0\\1\\0\\0\\0', n))",
    "credit of no form": "s.sendall(codec.pack_raw(k.CREDIT, b'\\0\\1', n))",
    "a request": "say(k.SPAWN, 1, [(k.T_KEY, 'x'), (k.T_ARGV, b'true')])",
    "an answer to nothing": "say(k.OK, 4711)",
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_the_end_of_the_guest(c: Controller, breach: str) -> None:
    client = c.adopt("guest/p")
    argv = guest(STARTED + BREACHES[breach] + "\nrecv(); recv()")
    c.spawn("guest", argv, flags=k.F_CONTROL | k.F_SERIAL)
    c.spawn("p", ["true"], to="guest")
    assert c.exited("guest").int(k.T_SIGNAL) == 9  # the client has read nothing yet
    assert client.finish().code == 137
    client.close()


def test_credit_is_given_for_what_the_clients_have_taken(c: Controller) -> None:
    script = STARTED + (
        "for _ in range(3): s.sendall(codec.pack_raw(k.DATA, b'\\1' + bytes(65536 - 16), n))\n"
        "got = 0\n"
        "while got < 3 * 65536:\n"
        "  f = recv(); assert (f.kind, f.id, f.body[0]) == (k.CREDIT, n, 1)\n"
        "  got += int.from_bytes(f.body[1:], 'little')\n"
        "say(k.EXITED, 0, [(k.T_KEY, 'p'), (k.T_CODE, 6), (k.T_SIGNAL, 0)])\n"
        "recv()"
    )
    client = c.adopt("guest/p")
    c.spawn("guest", guest(script), flags=k.F_CONTROL | k.F_SERIAL)
    c.spawn("p", ["true"], to="guest")
    result = client.finish()
    client.close()
    assert (len(result.stdout), result.code) == (3 * (65536 - 16), 6)


# The other side: an agent whose keeper takes nothing, or says what makes no sense.


def test_the_agent_stops_at_its_reserve_and_drains_an_end_with_it(agent: Held) -> None:
    c = agent.c
    for key, count, number in (("p", 1_000_000, 901), ("q", 240_000, 902)):  # numbers that no request of ours has
        c.send(k.SPAWN, spawn_fields(key, ["head", "-c", str(count), "/dev/zero"], more=[(k.T_STREAM, number)]))
    spent = {901: 0, 902: 0}
    ended = ""
    while not ended:
        frame = c.recv()
        if frame.kind == k.DATA:
            spent[frame.id] += len(frame.body) - 1 + FRAME_COST
        ended = frame.text(k.T_KEY) if frame.kind == k.EXITED else ""
    assert ended == "q"
    assert spent[902] > 240_000 > CREDIT_BYTES - RESERVE_BYTES
    assert spent[901] <= CREDIT_BYTES - RESERVE_BYTES


@pytest.mark.parametrize(
    "nonsense",
    [
        codec.pack_raw(k.DATA, b"\0x", 77),
        codec.pack_raw(k.DATA, b"\1x", 5),
        codec.pack_raw(k.DATA, b"\3x", 5),
        codec.pack_raw(k.DATA, b"", 5),
        codec.pack_raw(k.EOF, b"\1", 5),
        codec.pack_raw(k.EOF, b"", 5),
        codec.pack_raw(k.CREDIT, b"\1\xff\xff\xff\xff", 5),
        codec.pack_raw(k.CREDIT, b"\0\1\0\0\0", 5),
        codec.pack_raw(k.CREDIT, b"\1\1", 5),
        codec.pack_raw(k.DATA, b"\0" + bytes(65536), 5) * 8,
    ],
)
def test_the_agent_ignores_what_makes_no_sense(agent: Held, nonsense: bytes) -> None:
    c = agent.c
    c.spawn("p", ["sleep", "60"], flags=k.F_STDIN, more=[(k.T_STREAM, 5)])
    c.send_bytes(nonsense)
    assert c.procs()["p"].int(k.T_STATE) == 0


def memory_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:"))


def test_an_agent_whose_answers_nobody_takes_waits(agent: Held, tmp_path: Path) -> None:
    c = agent.c
    big = tmp_path / "big"
    big.write_bytes(bytes(256 << 10))
    requests = [codec.pack(k.READ, i, [(k.T_PATH, bytes(big)), (k.T_COUNT, 256 << 10)]) for i in range(1000, 1200)]
    many = [f"p{i}" for i in range(30)]
    for i, key in enumerate(many):
        c.spawn(key, [SH, "-c", "read x; head -c 130000 /dev/zero"], flags=k.F_STDIN, more=[(k.T_STREAM, i + 1)])
    for i in range(len(many)):
        c.send_bytes(codec.pack_raw(k.DATA, b"\0\n", i + 1))
    c.sock.settimeout(0.5)
    sent = 0
    with pytest.raises(TimeoutError):
        for data in requests * 40:
            c.sock.sendall(data)
            sent += 1
    assert memory_kib(agent.pid) < 20 << 10
    assert alive(agent.pid)
    seen, ended, stdout = 0, 0, 0
    while seen < sent or ended < len(many):
        frame = c.recv()
        seen += frame.kind == k.OK and len(frame.body) > (256 << 10)
        ended += frame.kind == k.EXITED
        stdout += len(frame.body) - 1 if frame.kind == k.DATA else 0
    assert stdout == len(many) * 130_000
    c.close()
    assert agent.process.wait(5) == 0


def test_what_is_no_frame_ends_the_agent(tmp_path: Path) -> None:
    held = Held([str(AGENT), "--fd", "3"], 3, tmp_path / "stderr")
    line: Line = held.c
    line.send_bytes(b"\xff" * 40)
    with pytest.raises((Gone, OSError)):
        line.recv()
    assert held.process.wait(5) == 0
    line.close()


def test_orphans_of_a_machine_are_reaped(g: Controller) -> None:
    result = g.run("p", [SH, "-c", "(sleep 0.1 & echo $!)"], to="guest")
    pid = int(result.stdout)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the orphan's end")
