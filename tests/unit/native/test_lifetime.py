"""Locks, controllers, descriptors and memory."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from tests.unit.native.wireside import INIT, KEEPER, SANITIZE, Controller, Held, start_keeper, wait_for

from isolat.wire import kinds as k


def connect(directory: Path) -> Controller:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(directory / "keeper.sock"))
    return Controller(sock)


def test_a_second_keeper_exits_with_75(keeper: Held, tmp_path: Path) -> None:
    keeper.c.hello()
    second = start_keeper(tmp_path / "env")
    assert second.process.wait(5) == 75
    second.c.close()
    assert (tmp_path / "env" / "keeper.pid").read_text() == f"{keeper.pid}\n"
    keeper.c.hello()


def test_further_controllers_see_and_hear_the_same(keeper: Held, tmp_path: Path) -> None:
    keeper.c.spawn("p", ["sleep", "60"])
    other = connect(tmp_path / "env")
    assert list(other.procs()) == ["p"]
    keeper.c.close()
    other.ask(k.SIGNAL, [(k.T_KEY, "p"), (k.T_SIGNAL, 15)])
    assert other.exited("p").int(k.T_CODE) == 143
    other.ask(k.QUIT)
    other.close()
    assert keeper.process.wait(5) == 0


def test_a_long_directory_is_no_hindrance(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 120)
    held = start_keeper(directory)
    held.c.hello()
    assert (directory / "keeper.sock").exists()
    held.stop()


def test_usage(tmp_path: Path) -> None:
    for argv in ([], ["a", "b"], ["--log-bytes", "x", str(tmp_path)], ["--log-bytes"], ["--what"]):
        done = subprocess.run([KEEPER, *argv], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
        assert (done.returncode, done.stderr[:6]) == (64, b"usage:")


def fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_no_descriptor_is_lost(keeper: Held) -> None:
    c = keeper.c
    guest = c.spawn("guest", [str(INIT)], flags=k.F_CONTROL)

    def everything() -> None:
        c.run("p", ["cat"], stdin=b"x")
        c.run("t", ["true"], flags=k.F_TTY)
        c.run("p", ["cat"], stdin=b"x", to="guest")
        c.run("t", ["true"], flags=k.F_TTY, to="guest")
        for key in ("p", "t"):
            for to in ([], [(k.T_TO, "guest")]):
                c.ask(k.FORGET, [(k.T_KEY, key), *to])
        client = c.adopt("none")
        client.close()

    everything()
    wait_for(lambda: "none" not in c.procs())
    before = fds(keeper.pid), fds(guest)  # some of them may be about to be closed: fewer than the rounds to come
    for _ in range(20):
        everything()
    wait_for(lambda: fds(keeper.pid) <= before[0] and fds(guest) <= before[1], "the descriptors closed")


def test_everything_is_close_on_exec(keeper: Held) -> None:
    c = keeper.c
    c.spawn("guest", [str(INIT)], flags=k.F_CONTROL)
    c.spawn("p", ["sleep", "60"], flags=k.F_TTY)
    client = c.adopt("p")
    for fd in [p.name for p in Path(f"/proc/{keeper.pid}/fd").iterdir()]:
        info = Path(f"/proc/{keeper.pid}/fdinfo/{fd}").read_text()
        flags = int(next(line for line in info.splitlines() if line.startswith("flags:")).split()[1], 8)
        assert int(fd) < 3 or flags & os.O_CLOEXEC, fd
    client.close()


def rss_kib(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}


@pytest.mark.skipif(SANITIZE, reason="the sanitizer's own memory")
def test_memory_stays_small(keeper: Held) -> None:
    c = keeper.c
    guest = c.spawn("guest", [str(INIT)], flags=k.F_CONTROL)
    c.spawn("main", ["sleep", "60"], flags=k.F_MAIN | k.F_LOG, to="guest")
    for pid in (keeper.pid, guest):
        assert rss_kib(pid)["Rss"] < 300, rss_kib(pid)


def test_the_oom_killer_prefers_the_processes(keeper: Held) -> None:
    pid = keeper.c.spawn("p", ["sleep", "60"])
    own = int(Path(f"/proc/{keeper.pid}/oom_score_adj").read_text())
    assert own in {-500, 0}
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == 0
