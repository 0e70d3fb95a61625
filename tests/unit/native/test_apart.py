"""Several environments at one keeper: each with a log, a record and an end of its own."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tests.unit.native.wireside import AGENT, INIT, Controller, Held, Refused, alive, log_records, wait_for

from isolat.wire import codec
from isolat.wire import kinds as k

SH = "/bin/sh"
APART = k.F_MAIN | k.F_LOG | k.F_APART


@pytest.fixture(params=["init", "agent"])
def g(request: pytest.FixtureRequest, c: Controller) -> Controller:
    """A guest that gets descriptors, and one to which everything travels as frames."""
    if request.param == "init":
        c.spawn("guest", [str(INIT)], flags=k.F_CONTROL)
    else:
        c.spawn("guest", [str(AGENT), "--fd", "3"], flags=k.F_CONTROL | k.F_SERIAL)
    return c


class Inner:
    """An environment inside of the keeper's: an init in its guest, a directory of its own."""

    def __init__(self, g: Controller, below: Path, name: str, to: str = "guest") -> None:
        self.g, self.home, self.to = g, below / name, f"{to}/{name}"
        self.home.mkdir()
        self.init = g.spawn(name, [str(INIT)], flags=k.F_CONTROL, to=to)

    def fields(self) -> codec.Fields:
        return [(k.T_HOME, os.fsencode(self.home))]

    def main(self, script: str, flags: int = APART) -> int:
        return self.g.spawn("main", [SH, "-c", script], to=self.to, flags=flags, more=self.fields())

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "exit.json").read_text())
        return found

    def logged(self) -> list[tuple[int, bytes]]:
        return [(stream, data) for _, stream, data in log_records(self.home / "log" / "0")]


def test_a_hello_says_which_flags_are_known(c: Controller) -> None:
    assert c.hello().int(k.T_FLAGS) & k.F_APART


def test_logs_and_records_are_apart(g: Controller, tmp_path: Path) -> None:
    inner = [Inner(g, tmp_path, name) for name in ("one", "two", "three")]
    for n, one in enumerate(inner):
        one.main(f"echo out {n}; sleep 0.05; echo err {n} >&2; exit {n}")
    for n, one in enumerate(inner):
        assert g.exited(f"{one.to}/main").int(k.T_CODE) == n
        assert one.logged() == [(1, b"out %d\n" % n), (2, b"err %d\n" % n)]
        assert (one.record["code"], one.record["signal"]) == (n, None)
    assert sorted(p.name for p in (tmp_path / "env").iterdir() if p.name in ("log", "exit.json")) == []


def test_its_end_is_that_of_its_own_guest_and_of_no_other(g: Controller, tmp_path: Path) -> None:
    g.spawn("main", ["sleep", "60"], to="guest", flags=k.F_MAIN)
    one, two = Inner(g, tmp_path, "one"), Inner(g, tmp_path, "two")
    two.main("sleep 60")
    one.main("echo before; exit 3")
    assert g.exited(f"{one.to}/main").int(k.T_CODE) == 3
    assert g.exited(one.to).int(k.T_SIGNAL) == 9
    assert not alive(one.init) and alive(two.init)
    states = {key: proc.int(k.T_STATE) for key, proc in g.procs().items()}
    assert states == {"guest": 0, "guest/main": 0, "guest/two": 0, "guest/two/main": 0, "guest/one": 1,
                      "guest/one/main": 1}  # fmt: skip


def test_the_keepers_own_main_ends_all_and_all_is_recorded(keeper: Held, g: Controller, tmp_path: Path) -> None:
    one, two = Inner(g, tmp_path, "one"), Inner(g, tmp_path, "two")
    for inner in (one, two):
        inner.main("sleep 60")
    g.spawn("main", [SH, "-c", "exit 5"], to="guest", flags=k.F_MAIN | k.F_LOG)
    for inner in (one, two):
        assert g.exited(f"{inner.to}/main").text(k.T_STAGE) == "guest"
        assert (inner.record["signal"], inner.record["with_guest"]) == (9, True)
    assert json.loads((tmp_path / "env" / "exit.json").read_text())["code"] == 5
    g.close()
    wait_for(lambda: keeper.process.poll() is not None, "the keeper ends with its own MAIN")


def test_a_keeper_does_not_stay_for_them_nor_end_with_them(keeper: Held, g: Controller, tmp_path: Path) -> None:
    g.spawn("main", ["sleep", "60"], to="guest", flags=k.F_MAIN)
    one = Inner(g, tmp_path, "one")
    one.main("sleep 0.2; echo late; exit 7")
    g.close()
    wait_for((one.home / "exit.json").exists)
    assert (one.record["code"], one.logged()) == (7, [(1, b"late\n")])
    time.sleep(0.2)
    assert keeper.process.poll() is None
    keeper.kill()


def test_a_killed_guest_of_one_is_told(g: Controller, tmp_path: Path) -> None:
    one, two = Inner(g, tmp_path, "one"), Inner(g, tmp_path, "two")
    one.main("sleep 60")
    two.main("sleep 60")
    os.kill(one.init, 9)
    assert g.exited(f"{one.to}/main").text(k.T_STAGE) == "guest"
    assert (one.record["signal"], one.record["with_guest"]) == (9, True)
    assert not g.procs("guest/two/main")["guest/two/main"].int(k.T_STATE)


def test_one_in_one(g: Controller, tmp_path: Path) -> None:
    one = Inner(g, tmp_path, "one")
    one.main("sleep 60")
    deep = Inner(g, tmp_path, "deep", one.to)
    deep.main("echo deep; exit 9")
    assert g.exited(f"{deep.to}/main").int(k.T_CODE) == 9
    wait_for(lambda: not alive(deep.init))
    assert (deep.record["code"], deep.logged()) == (9, [(1, b"deep\n")])
    assert alive(one.init) and not (one.home / "exit.json").exists()


def test_clients_streams_and_a_terminal(g: Controller, tmp_path: Path) -> None:
    one = Inner(g, tmp_path, "one")
    client = g.adopt(f"{one.to}/main", stdin=True)
    g.spawn("main", [SH, "-c", "cat; exit 4"], to=one.to, flags=APART | k.F_STDIN, more=one.fields())
    result = client.finish(b"there and back")
    client.close()
    assert (result.stdout, result.code) == (b"there and back", 4)
    assert one.logged() == [(1, b"there and back")]


def test_its_log_rotates_by_itself(g: Controller, tmp_path: Path) -> None:
    one = Inner(g, tmp_path, "one")
    one.main("head -c 25000000 /dev/zero")
    g.exited(f"{one.to}/main")
    sizes = [(one.home / "log" / name).stat().st_size for name in ("0", "1", "2")]
    assert max(sizes) <= 10 << 20
    assert sum(sizes) > 15 << 20


@pytest.mark.parametrize(
    ("flags", "to", "home", "stage"),
    [
        (APART, "guest/one", b"", "request"),  # no HOME
        (APART, "guest/one", b"relative", "request"),
        (k.F_APART, "guest/one", b"/nowhere", "request"),  # no MAIN
        (APART, "", b"/nowhere", "request"),  # in no guest
        (APART, "guest/one", b"/nowhere/isolat", "home"),
    ],
)
def test_what_makes_no_sense_is_refused(
    g: Controller, tmp_path: Path, flags: int, to: str, home: bytes, stage: str
) -> None:
    Inner(g, tmp_path, "one")
    with pytest.raises(Refused) as told:
        g.spawn("main", ["true"], to=to, flags=flags, more=[(k.T_HOME, home)] if home else [])
    assert told.value.stage == stage
    assert "main" not in "".join(g.procs())


def test_a_home_is_not_told_to_guests(c: Controller, tmp_path: Path) -> None:
    """What travels to a guest names no path of this machine."""
    script = (
        "import socket, sys; s = socket.socket(fileno=3);"
        f" s.sendall(bytes.fromhex('{codec.pack(k.HELLO, 0, [(k.T_VERSION, 1), (k.T_ROLE, 'init')]).hex()}'));"
        " open(sys.argv[1], 'wb').write(s.recv(1 << 16))"
    )
    seen = tmp_path / "seen"
    c.spawn("guest", ["/usr/bin/python3", "-c", script, str(seen)], flags=k.F_CONTROL)
    c.send(k.SPAWN, [(k.T_KEY, "main"), (k.T_TO, "guest"), (k.T_ARGV, b"true"), (k.T_FLAGS, APART),
                     (k.T_HOME, os.fsencode(tmp_path))])  # fmt: skip
    wait_for(lambda: seen.exists() and seen.stat().st_size)
    assert os.fsencode(tmp_path) not in seen.read_bytes()
