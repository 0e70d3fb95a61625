"""What an agent does between a process's end and telling it: the end stays as it was, and is told after that."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tests.unit.native.wireside import AGENT, INIT, Controller

from isolat.wire import codec
from isolat.wire import kinds as k

SH = "/bin/sh"


@pytest.fixture(params=["guest", "guest/guest"])
def to(request: pytest.FixtureRequest, c: Controller) -> str:
    c.spawn("guest", [str(AGENT), "--fd", "3"], flags=k.F_CONTROL | k.F_SERIAL)
    if request.param == "guest/guest":
        c.spawn("guest", [str(INIT)], flags=k.F_CONTROL, to="guest")
    return str(request.param)


def _after(*argv: str) -> list[tuple[int, codec.Value]]:
    return [(k.T_INVERSE, word) for word in argv]


def _end(c: Controller, to: str, script: str, *after: str, flags: int = 0) -> tuple[int, int]:
    c.spawn("main", [SH, "-c", script], to=to, flags=flags, more=_after(*after))
    frame = c.exited(f"{to}/main")
    return frame.int(k.T_CODE), frame.int(k.T_SIGNAL)


@pytest.mark.parametrize("script", ["exit 7", "kill -9 $$", "exit 0"])
def test_it_is_done_before_the_end_is_told_as_it_was(c: Controller, to: str, tmp_path: Path, script: str) -> None:
    done = tmp_path / "done"
    code, number = _end(c, to, script, SH, "-c", f"sleep 0.2; echo x > {done}")
    assert done.exists()
    assert (code, number) == ((128 + 9, 9) if "kill" in script else (int(script[-1]), 0))


def test_an_end_with_a_terminal_and_all_its_output(c: Controller, to: str, tmp_path: Path) -> None:
    client = c.adopt(f"{to}/main")
    c.spawn("main", [SH, "-c", "echo out; exit 4"], to=to, flags=k.F_TTY, more=_after(SH, "-c", "sleep 0.1"))
    result = client.finish()
    client.close()
    assert (result.stdout, result.code) == (b"out\r\n", 4)


@pytest.mark.parametrize("after", [("/no/such/program",), (SH, "-c", "exit 3"), (SH, "-c", "kill -9 $$")])
def test_that_it_fails_is_no_matter(c: Controller, to: str, after: tuple[str, ...]) -> None:
    assert _end(c, to, "exit 5", *after) == (5, 0)


def test_a_signal_to_what_has_ended_does_not_reach_it(c: Controller, to: str, tmp_path: Path) -> None:
    done = tmp_path / "done"
    after = _after(SH, "-c", f"touch {tmp_path}/begun; sleep 0.4; echo x > {done}")
    c.spawn("main", [SH, "-c", "exit 6"], to=to, more=after)
    while not (tmp_path / "begun").exists():
        time.sleep(0.005)
    c.ask(k.SIGNAL, [(k.T_KEY, "main"), (k.T_TO, to), (k.T_SIGNAL, signal.SIGKILL), (k.T_SCOPE, 1)])
    assert c.exited(f"{to}/main").int(k.T_CODE) == 6
    assert done.exists()


def test_other_processes_go_on_meanwhile(c: Controller, to: str) -> None:
    c.spawn("main", [SH, "-c", "exit 6"], to=to, more=_after(SH, "-c", "sleep 0.5"))
    before = time.monotonic()
    assert c.run("other", ["echo", "here"], to=to).stdout == b"here\n"
    assert time.monotonic() - before < 0.4
    assert c.exited(f"{to}/main").int(k.T_CODE) == 6


def test_the_guest_of_a_process_ends_while_it_is_done(c: Controller, tmp_path: Path) -> None:
    c.spawn("guest", [str(AGENT), "--fd", "3"], flags=k.F_CONTROL | k.F_SERIAL)
    c.spawn("guest", [str(INIT)], flags=k.F_CONTROL, to="guest")
    after = _after(SH, "-c", f"touch {tmp_path}/begun; sleep 0.3; touch {tmp_path}/done")
    c.spawn("main", [SH, "-c", "exit 6"], to="guest/guest", more=after)
    while not (tmp_path / "begun").exists():
        time.sleep(0.005)
    c.ask(k.SIGNAL, [(k.T_KEY, "guest"), (k.T_TO, "guest"), (k.T_SIGNAL, signal.SIGKILL), (k.T_SCOPE, 0)])
    assert c.exited("guest/guest/main").int(k.T_CODE) == 6
    assert (tmp_path / "done").exists()


def test_a_keeper_alone_does_nothing_of_the_kind(c: Controller, tmp_path: Path) -> None:
    c.spawn("p", [SH, "-c", "exit 2"], more=_after("touch", str(tmp_path / "done")))
    assert c.exited("p").int(k.T_CODE) == 2
    assert not (tmp_path / "done").exists()
