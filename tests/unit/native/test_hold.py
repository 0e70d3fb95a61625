"""Descriptors that a keeper keeps by name, for a process that is to get them and for the next daemon."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from tests.unit.native.wireside import AGENT, Controller, Held, Refused

from isolat.wire import kinds as k

SH = "/bin/sh"
HELD_MAX = 32


def connect(held: Held) -> Controller:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(held.log.parent / "keeper.sock"))
    return Controller(sock)


def hold(c: Controller, /, **named: int) -> None:
    c.ask(k.HOLD, [(k.T_KEY, name) for name in named], list(named.values()))


def fetch(c: Controller, name: str) -> int:
    c.ask(k.FETCH, [(k.T_KEY, name)])
    return c.fds.pop()


def open_fds(keeper: Held) -> int:
    keeper.c.hello()
    return len(list(Path(f"/proc/{keeper.pid}/fd").iterdir()))


def same(a: int, b: int) -> bool:
    x, y = os.fstat(a), os.fstat(b)
    return (x.st_dev, x.st_ino) == (y.st_dev, y.st_ino)


@pytest.fixture
def files(tmp_path: Path) -> list[int]:
    fds = [os.open(tmp_path / f"file{i}", os.O_RDWR | os.O_CREAT) for i in range(3)]
    for i, fd in enumerate(fds):
        os.write(fd, b"%d\n" % i)
        os.lseek(fd, 0, os.SEEK_SET)
    return fds


@pytest.fixture(autouse=True)
def closed(files: list[int]) -> object:
    yield None
    for fd in files:
        os.close(fd)


def test_the_next_controller_fetches_what_the_last_one_left(keeper: Held, files: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        hold(keeper.c, qmp=theirs.fileno(), ram=files[0])
        other = connect(keeper)
        other.hello()
        keeper.c.close()
        for _ in range(2):  # a duplicate each time: fetching takes nothing away
            fd = fetch(other, "qmp")
            assert same(fd, theirs.fileno())
            os.write(fd, b"hello")
            assert ours.recv(10) == b"hello"
            os.close(fd)
        other.ask(k.QUIT)
        other.close()


def test_a_name_is_replaced_and_dropped(c: Controller, files: list[int]) -> None:
    hold(c, a=files[0], b=files[1])
    hold(c, a=files[2])
    fd = fetch(c, "a")
    assert same(fd, files[2])
    os.close(fd)
    c.ask(k.DROP, [(k.T_KEY, "a"), (k.T_KEY, "never")])
    with pytest.raises(Refused) as info:
        fetch(c, "a")
    assert (info.value.stage, info.value.errno) == ("key", errno.ENOENT)
    os.close(fetch(c, "b"))


def test_names_and_descriptors_must_fit(c: Controller, files: list[int]) -> None:
    for names, fds in (([], []), (["a"], []), (["a"], files), (["a", "b"], files[:1]), ([""], files[:1]),
                       (["x" * 32], files[:1])):  # fmt: skip
        with pytest.raises(Refused):
            c.ask(k.HOLD, [(k.T_KEY, name) for name in names], fds)


def test_there_is_a_bound(keeper: Held, files: list[int]) -> None:
    c = keeper.c
    before = open_fds(keeper)
    for i in range(HELD_MAX):
        hold(c, **{f"n{i}": files[0]})
    with pytest.raises(Refused) as info:
        hold(c, more=files[0])
    assert info.value.errno == errno.ENOSPC
    hold(c, n3=files[1])
    c.ask(k.DROP, [(k.T_KEY, f"n{i}") for i in range(HELD_MAX)])
    assert open_fds(keeper) == before


def test_a_child_gets_them_in_the_order_given(c: Controller, files: list[int]) -> None:
    hold(c, a=files[0], b=files[1], c=files[2])
    held = [(k.T_HELD, name) for name in ("c", "a")]
    assert c.run("p", [SH, "-c", "cat <&4; cat <&5; ls /proc/self/fd"], more=held).stdout.split() == [
        b"2", b"0", b"0", b"1", b"2", b"3", b"4", b"5",
    ]  # fmt: skip
    os.lseek(files[1], 0, os.SEEK_SET)
    assert c.run("q", [SH, "-c", "cat <&4"], more=[(k.T_HELD, "b")]).stdout == b"1\n"


def test_a_guest_has_its_channel_and_them(c: Controller, files: list[int]) -> None:
    hold(c, a=files[0])
    script = 'cat <&4 >&2; exec "$0" --fd 3 4<&-'
    c.spawn("guest", [SH, "-c", script, str(AGENT)], flags=k.F_CONTROL | k.F_SERIAL, more=[(k.T_HELD, "a")])
    assert c.run("p", ["echo", "x"], to="guest").stdout == b"x\n"


def test_what_is_not_held_can_not_be_given(keeper: Held, files: list[int]) -> None:
    hold(keeper.c, a=files[0])
    before = open_fds(keeper)
    for names in (["b"], ["a", "b"], ["a"] * 13):
        with pytest.raises(Refused) as info:
            keeper.c.spawn("p", ["true"], more=[(k.T_HELD, name) for name in names])
        assert info.value.stage == "held"
    assert open_fds(keeper) == before
    assert keeper.c.run("p", ["echo", "x"], more=[(k.T_HELD, "a")] * 12).stdout == b"x\n"


def test_other_processes_do_not_see_them(c: Controller, files: list[int]) -> None:
    hold(c, a=files[0])
    assert c.run("p", ["ls", "/proc/self/fd"]).stdout.split() == [b"0", b"1", b"2", b"3"]
