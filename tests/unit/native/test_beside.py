"""What a guest can't do without: one ends with the other, and it is root of nothing but its own user namespace."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tests.unit.native.wireside import INIT, Controller, Held, Refused, alive, wait_for

from isolat.wire import codec
from isolat.wire import kinds as k

SH = "/bin/sh"
NEWUSER, NEWPID, NEWNS, NEWNET = 0x10000000, 0x20000000, 0x20000, 0x40000000
FIRST = 0x4123_0000
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="namespaces need root")


def with_guest(c: Controller, script: str) -> tuple[int, int]:
    """Pids of what is beside, and of the guest."""
    beside = c.spawn("server", [SH, "-c", script], flags=k.F_BESIDE)
    return beside, c.spawn("guest", [str(INIT)], flags=k.F_CONTROL)


def words(at: Path, name: str) -> str:
    path = at / "env" / name
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(("script", "how"), [("sleep 0.3; exit 3", "code 3"), ("exec sleep 60", "signal 9")])
def test_its_end_is_the_guests_and_is_told(keeper: Held, tmp_path: Path, script: str, how: str) -> None:
    c = keeper.c
    beside, guest = with_guest(c, f"echo in trouble; {script}")
    c.spawn("main", ["sleep", "60"], flags=k.F_MAIN, to="guest")
    if how.startswith("signal"):
        os.kill(beside, signal.SIGKILL)
    assert c.exited("guest/main").text(k.T_STAGE) == "guest"
    wait_for(lambda: not alive(guest))
    wait_for(lambda: f"server ended with {how}" in words(tmp_path, "guest.tail"))
    assert "in trouble" in words(tmp_path, "guest.tail")
    assert "in trouble" in words(tmp_path, "guest.log")


def test_an_end_that_has_seen_the_guests_is_none_to_tell(keeper: Held, tmp_path: Path) -> None:
    _, guest = with_guest(keeper.c, "sleep 0.3")
    wait_for(lambda: not alive(guest))
    assert "server ended" not in words(tmp_path, "guest.log")


def test_it_ends_with_the_guest(keeper: Held) -> None:
    c = keeper.c
    beside, guest = with_guest(c, "exec sleep 60")
    os.kill(guest, signal.SIGKILL)
    assert c.exited("server").int(k.T_SIGNAL) == signal.SIGKILL
    assert not alive(beside)


def test_it_ends_with_the_keeper(keeper: Held) -> None:
    beside, guest = with_guest(keeper.c, "exec sleep 60")
    os.kill(keeper.pid, signal.SIGKILL)
    wait_for(lambda: not alive(beside) and not alive(guest))


def test_a_signal_to_everything_spares_it(keeper: Held) -> None:
    c = keeper.c
    beside, guest = with_guest(c, "exec sleep 60")
    c.spawn("p", ["sleep", "60"])
    c.ask(k.SIGNAL, [(k.T_KEY, "p"), (k.T_SIGNAL, signal.SIGKILL), (k.T_SCOPE, k.SCOPE_ALL)])
    assert c.exited("p").int(k.T_SIGNAL) == signal.SIGKILL
    assert alive(beside) and alive(guest)


@pytest.mark.parametrize("flags", [k.F_LOG, k.F_MAIN, k.F_CONTROL, k.F_TTY, k.F_STDIN])
def test_it_is_nothing_else(c: Controller, flags: int) -> None:
    with pytest.raises(Refused, match="BESIDE"):
        c.spawn("server", [SH, "-c", "true"], flags=k.F_BESIDE | flags)


def test_no_guest_has_one_inside(c: Controller) -> None:
    c.spawn("guest", [str(INIT)], flags=k.F_CONTROL)
    with pytest.raises(Refused, match="BESIDE"):
        c.spawn("server", [SH, "-c", "true"], flags=k.F_BESIDE, to="guest")


# a user namespace


def spaces(user: str, more: int = NEWPID | NEWNS | NEWNET) -> codec.Fields:
    return [(k.T_SPACES, NEWUSER | more), (k.T_USER, user)]


@pytest.mark.root
@needs_root
def test_it_is_root_of_its_own_users_and_nobodys_outside(c: Controller) -> None:
    script = "id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map; chown 7:8 /proc/self 2>/dev/null || echo none"
    pid = c.spawn("p", ["sleep", "60"], more=spaces(str(FIRST)))
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(FIRST)}
    assert status["Groups"].strip() == "" and status["NoNewPrivs"] == "1"
    assert Path(f"/proc/{pid}/ns/user").readlink() != Path("/proc/self/ns/user").readlink()
    lines = c.run("q", [SH, "-c", script], more=spaces(str(FIRST))).stdout.decode().split("\n")
    assert lines[:2] == ["0", "0"] and lines[-2] == "none"
    assert [line.split() for line in lines[2:4]] == [["0", str(FIRST), "65536"]] * 2


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("user", ["", "root", "0", "1:1", "4294967295", "-1"])
def test_ids_that_are_none(c: Controller, user: str) -> None:
    with pytest.raises(Refused) as info:
        c.spawn("p", ["true"], more=spaces(user))
    assert info.value.stage == "users"


@pytest.mark.root
@needs_root
def test_users_of_its_own_need_further_namespaces_and_no_root(c: Controller, tmp_path: Path) -> None:
    for more in (spaces(str(FIRST), 0), [*spaces(str(FIRST)), (k.T_ROOT, bytes(tmp_path))]):
        with pytest.raises(Refused) as info:
            c.spawn("p", ["true"], more=more)
        assert info.value.stage == "users"


@pytest.mark.root
@needs_root
def test_the_keeper_loses_no_descriptor_by_it(keeper: Held) -> None:
    def count() -> int:
        keeper.c.hello()
        return len(list(Path(f"/proc/{keeper.pid}/fd").iterdir()))

    keeper.c.run("p", ["true"], more=spaces(str(FIRST)))
    before = count()
    for n in range(5):
        keeper.c.run(f"p{n}", ["true"], more=spaces(str(FIRST)))
        with pytest.raises(Refused):
            keeper.c.spawn(f"q{n}", ["true"], more=[*spaces(str(FIRST)), (k.T_HELD, "nothing")])
    assert count() <= before
