"""A keeper with an init as its guest: an ordinary process here, without namespaces."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.native.wireside import AGENT, INIT, Controller, Held, Refused, alive, start_init, wait_for

from isolat.wire import kinds as k

SH = "/bin/sh"


@pytest.fixture(params=["init", "agent"])
def g(request: pytest.FixtureRequest, c: Controller) -> Controller:
    """A guest that gets descriptors, and one to which everything travels as frames."""
    if request.param == "init":
        c.spawn("guest", [str(INIT)], flags=k.F_CONTROL)
    else:
        c.spawn("guest", [str(AGENT), "--fd", "3"], flags=k.F_CONTROL | k.F_SERIAL)
    return c


@pytest.fixture(params=["guest", "guest/guest"])
def to(request: pytest.FixtureRequest, g: Controller) -> str:
    if request.param == "guest/guest":
        g.spawn("guest", [str(INIT)], flags=k.F_CONTROL, to="guest")
    return str(request.param)


@pytest.fixture
def init(tmp_path: Path) -> Iterator[Held]:
    held = start_init(tmp_path / "init")
    yield held
    held.stop()


@pytest.mark.parametrize("code", [0, 3, 126, 127])
def test_exit_codes(g: Controller, to: str, code: int) -> None:
    result = g.run("p", [SH, "-c", f"echo out; echo err >&2; exit {code}"], to=to)
    assert (result.stdout, result.stderr, result.code) == (b"out\n", b"err\n", code)
    assert (result.order[-1], sorted(result.eof)) == (k.EXITED, [1, 2])
    assert g.exited(f"{to}/p").int(k.T_CODE) == code


def test_failures_inside_come_out(g: Controller, to: str) -> None:
    client = g.adopt(f"{to}/p")
    with pytest.raises(Refused) as info:
        g.spawn("p", ["nosuchcommand"], to=to)
    assert (info.value.stage, info.value.code) == ("exec", 127)
    assert client.finish().error is not None
    client.close()
    assert f"{to}/p" not in g.procs()


def test_ten_megabytes(g: Controller, to: str) -> None:
    data = random.Random(2).randbytes(10 << 20)
    result = g.run("p", ["cat"], to=to, stdin=data)
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


def test_tty(g: Controller, to: str) -> None:
    client = g.adopt(f"{to}/p", stdin=True)
    g.spawn(
        "p", [SH, "-c", "stty size; read x; stty size; echo got $x; tty <&0 | grep -c pts; exit 7"], to=to,
        flags=k.F_TTY | k.F_STDIN, more=[(k.T_ROWS, 30), (k.T_COLS, 100)],
    )  # fmt: skip
    client.read_until(b"30 100\r\n")
    g.ask(k.RESIZE, [(k.T_KEY, f"{to}/p"), (k.T_ROWS, 41), (k.T_COLS, 121)])
    client.write(b"hello\n")
    result = client.finish()
    client.close()
    assert b"41 121\r\ngot hello\r\n1\r\n" in result.stdout
    assert (result.code, result.eof) == (7, [1])


def test_signals(g: Controller, to: str) -> None:
    client = g.adopt(f"{to}/p")
    g.spawn("p", ["sleep", "60"], to=to)
    client.send(k.SIGNAL, [(k.T_SIGNAL, 15)])
    assert client.finish().code == 143
    client.close()
    with pytest.raises(Refused):
        g.ask(k.SIGNAL, [(k.T_KEY, "nobody"), (k.T_TO, to), (k.T_SIGNAL, 15)])
    g.ask(k.SIGNAL, [(k.T_KEY, "p"), (k.T_TO, to), (k.T_SIGNAL, 15)])


def test_everything_inside_gets_a_signal(g: Controller, to: str) -> None:
    for key in ("p", "q"):
        g.spawn(key, ["sleep", "60"], to=to)
    g.ask(k.SIGNAL, [(k.T_TO, to), (k.T_SIGNAL, 15), (k.T_SCOPE, 2)])
    for key in ("p", "q"):
        assert g.exited(f"{to}/{key}").int(k.T_SIGNAL) == 15


def test_main_inside_ends_the_guest_and_is_recorded(keeper: Held, tmp_path: Path) -> None:
    c = keeper.c
    guest = c.spawn("guest", [str(INIT)], flags=k.F_CONTROL)
    c.spawn("other", ["sleep", "60"], to="guest")
    script = "head -c 50000 /dev/zero; sleep 60 & exit 4"
    result = c.run("main", [SH, "-c", script], to="guest", flags=k.F_MAIN | k.F_LOG)
    assert (len(result.stdout), result.code) == (50000, 4)
    record = json.loads((tmp_path / "env" / "exit.json").read_text())
    assert record["code"] == 4 and "with_guest" not in record
    assert c.exited("guest/other").int(k.T_SIGNAL) == 9
    assert c.exited("guest").int(k.T_SIGNAL) == 9
    assert not alive(guest)


def test_a_killed_guest_ends_main_with_signal_9(keeper: Held, tmp_path: Path) -> None:
    c = keeper.c
    guest = c.spawn("guest", [str(INIT)], flags=k.F_CONTROL)
    client = c.adopt("guest/main")
    c.spawn("main", [SH, "-c", "echo there; sleep 60 & wait"], to="guest", flags=k.F_MAIN)
    client.read_until(b"there")
    os.kill(guest, 9)
    result = client.finish()
    client.close()
    assert result.code == 137
    record = json.loads((tmp_path / "env" / "exit.json").read_text())
    assert (record["code"], record["signal"], record["with_guest"]) == (None, 9, True)
    assert c.exited("guest/main").text(k.T_STAGE) == "guest"
    with pytest.raises(Refused) as info:
        c.spawn("late", ["true"], to="guest")
    assert info.value.stage == "guest"


def test_files(g: Controller, to: str, tmp_path: Path) -> None:
    path = (k.T_PATH, bytes(tmp_path / "file"))
    data = random.Random(3).randbytes(600_000)
    for at in range(0, len(data), 200_000):
        part = data[at : at + 200_000]
        g.ask(k.WRITE, [(k.T_TO, to), path, (k.T_OFFSET, at), (k.T_DATA, part), (k.T_MODE, 0o640),
                        (k.T_FLAGS, k.F_TRUNCATE if not at else 0)])  # fmt: skip
    back = b""
    while len(back) < len(data):
        frame = g.ask(k.READ, [(k.T_TO, to), path, (k.T_OFFSET, len(back)), (k.T_COUNT, 256 << 10)])
        assert frame.int(k.T_SIZE) == len(data)
        back += frame.bytes(k.T_DATA)
    assert back == data
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    for odd in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        if odd.name == "fifo":
            os.mkfifo(odd)
        with pytest.raises(Refused):
            g.ask(k.READ, [(k.T_TO, to), (k.T_PATH, bytes(odd)), (k.T_COUNT, 10)])
    g.ask(k.STEP, [(k.T_TO, to), (k.T_OP, 0), (k.T_STEP, [(k.T_OP, 1), (k.T_PATH, bytes(tmp_path / "d/e"))])])
    assert (tmp_path / "d/e").is_dir()


def test_forget_reaches_the_guest(g: Controller, to: str) -> None:
    for i in range(3):
        assert g.run("p", [SH, "-c", f"exit {i}"], to=to).code == i
        g.ask(k.FORGET, [(k.T_KEY, "p"), (k.T_TO, to)])


def test_a_killed_keeper_takes_everything_with_it(keeper: Held) -> None:
    c = keeper.c
    guest = c.spawn("guest", [str(INIT)], flags=k.F_CONTROL)
    c.spawn("guest", [str(INIT)], flags=k.F_CONTROL, to="guest")
    pids = [guest]
    for to in ("guest", "guest/guest"):
        client = c.adopt(f"{to}/p")
        pids.append(c.spawn("p", [SH, "-c", "(sleep 61 & echo $!); sleep 62"], to=to))
        pids.append(int(client.read_until(b"\n")))
        client.close()
    keeper.kill()
    for pid in pids:
        wait_for(lambda pid=pid: not alive(pid), f"the end of {pid}")


def test_a_guest_that_ends_before_hello_is_told_with_its_last_words(c: Controller, tmp_path: Path) -> None:
    with pytest.raises(Refused) as info:
        c.spawn("guest", [SH, "-c", "echo sorry >&2; exit 3"], flags=k.F_CONTROL)
    assert info.value.stage == "guest"
    assert info.value.tail == b"sorry\n"
    assert (tmp_path / "env" / "guest.log").read_bytes() == b"sorry\n"


def test_a_guests_log_is_capped(c: Controller, tmp_path: Path) -> None:
    with pytest.raises(Refused) as info:
        c.spawn("guest", [SH, "-c", "head -c 300000 /dev/zero >&2; echo end >&2"], flags=k.F_CONTROL)
    assert info.value.tail.endswith(b"end\n")
    assert (tmp_path / "env" / "guest.log").stat().st_size == 64 << 10


LAUNCH = '"$0" <&3 3<&3 & echo $! > "$1"; exit 0'


def test_a_launcher_leaves_its_process_to_the_keeper(c: Controller, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    pid = c.spawn("guest", [SH, "-c", LAUNCH, str(INIT), str(pidfile)], flags=k.F_CONTROL | k.F_LAUNCHER,
                  more=[(k.T_PIDFILE, bytes(pidfile))])  # fmt: skip
    assert pid == int(pidfile.read_text())
    assert c.run("p", ["echo", "x"], to="guest").stdout == b"x\n"


def test_a_launchers_process_that_dies_at_once_is_not_missed(c: Controller, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    script = "((sleep 0.1; exit 5) & echo $! > $0); sleep 0.4"
    c.spawn("p", [SH, "-c", script, str(pidfile)], flags=k.F_LAUNCHER, more=[(k.T_PIDFILE, bytes(pidfile))])
    assert c.exited("p").int(k.T_CODE) == 5


def test_a_failing_launcher_is_told(c: Controller, tmp_path: Path) -> None:
    for script, tail in (("echo no >&2; exit 1", b"no\n"), ("exit 0", b"")):
        with pytest.raises(Refused) as info:
            c.spawn("p", [SH, "-c", script], flags=k.F_LAUNCHER, more=[(k.T_PIDFILE, bytes(tmp_path / "none"))])
        assert (info.value.stage, info.value.tail) == ("launch", tail)


def test_the_init_ends_with_its_controller(init: Held) -> None:
    r, w = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    init.c.spawn("p", [SH, "-c", "(sleep 61 & echo $!); sleep 60"], flags=k.F_FDS, fds=[null, w, w])
    child = int(os.read(r, 100))
    for fd in (r, w, null):
        os.close(fd)
    init.c.close()
    assert init.process.wait(5) == 0
    assert not alive(child)


def test_the_init_says_what_is_no_controller(tmp_path: Path) -> None:
    assert os.waitstatus_to_exitcode(os.system(f"{INIT} 3</dev/null 2>{tmp_path}/err")) == 64
