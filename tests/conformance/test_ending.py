"""How an environment ends: asked, forced, with its keeper or under a killed daemon; then nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from isolat.errors import IllegalState, NotFound
from tests.conformance.subject import Subject
from tests.support import traces
from tests.support.roots import Root
from tests.support.wires import Cut

pytestmark = pytest.mark.root

LINES = 150
COUNTING = f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); sleep 0.01; done; exit 23"
IGNORING = "trap '' TERM; echo ready; while :; do sleep 0.2; done"
OBEYING = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"


def _ready(root: Root, subject: Subject, script: str) -> str:
    """A detached environment that has said that it is ready."""
    conversation, stream, id = root.run(subject.shell(script))
    stream.until_out(b"ready")
    stream.close()
    conversation.close()
    return id


def test_stop_asks_first(root: Root, subject: Subject) -> None:
    id = _ready(root, subject, OBEYING)
    told = root.ask("stop", {"env": id, "grace_s": 10})
    assert (told["code"], told["forced"]) == (7, False)


def test_stop_of_what_ignores_it_ends_in_time_and_says_that_it_was_forced(root: Root, subject: Subject) -> None:
    id = _ready(root, subject, IGNORING)
    began = time.monotonic()
    told = root.ask("stop", {"env": id, "grace_s": 1})
    assert time.monotonic() - began < 2
    assert (told["code"], told["signal"], told["forced"]) == (137, 9, True)
    assert root.ask("inspect", {"env": id})["exit"]["forced"] is True


def test_stop_of_what_has_ended_tells_its_end(root: Root, subject: Subject) -> None:
    id = root.run_detached(subject.shell("exit 4"))
    root.until_state(id, "exited")
    assert root.ask("stop", {"env": id})["code"] == 4


def test_kill_sends_any_signal(root: Root, subject: Subject) -> None:
    id = _ready(root, subject, "trap 'exit 6' USR2; echo ready; while :; do sleep 0.05; done")
    root.ask("kill", {"env": id, "signal": "USR2"})
    assert root.ask("wait", {"env": id})["code"] == 6


def test_a_time_limit_ends_it_and_says_so(root: Root, subject: Subject) -> None:
    id = root.run_detached(subject.spec("sleep", "60", x_timeout=0.5))
    told = root.ask("wait", {"env": id})
    assert told["code"] == 143
    assert "--timeout" in told["reason"]


def test_a_killed_daemon_cuts_no_stream_and_loses_no_exit_code(root: Root, subject: Subject) -> None:
    conversation, stream, id = root.run(subject.shell(COUNTING))
    stream.until_out(b"line 20\n")
    root.kill_daemon()
    assert stream.ended() == 23
    assert stream.out.decode().splitlines() == [f"line {n}" for n in range(LINES)]
    conversation.close()
    root.start_daemon()
    known = root.until_state(id, "exited")
    assert known["exit"]["code"] == 23


def test_an_end_while_no_daemon_lives_is_told_by_the_next(root: Root, subject: Subject) -> None:
    id = root.run_detached(subject.shell("sleep 0.5; exit 11"))
    root.kill_daemon()
    time.sleep(1)
    root.start_daemon()
    assert root.ask("wait", {"env": id})["code"] == 11


def test_what_runs_outlives_a_killed_daemon_and_can_be_used_again(root: Root, subject: Subject) -> None:
    id = _ready(root, subject, OBEYING)
    root.kill_daemon()
    root.start_daemon()
    assert root.state(id) == "running"
    if subject.can.enter:
        assert root.exec(id, ["true"]).ended() == 0
    assert root.ask("stop", {"env": id, "grace_s": 10})["code"] == 7


@pytest.mark.applies(to=lambda s: s.can.enter)
def test_an_exec_stream_is_not_cut_by_a_killed_daemon(root: Root, subject: Subject) -> None:
    id = root.run_detached(subject.spec("sleep", "600"))
    stream = root.exec(id, ["sh", "-c", COUNTING])
    stream.until_out(b"line 20\n")
    root.kill_daemon()
    assert stream.ended() == 23
    assert len(stream.out.splitlines()) == LINES
    root.start_daemon()


def test_what_was_to_be_removed_is_removed_by_the_next_daemon(root: Root, subject: Subject) -> None:
    conversation, stream, id = root.run(subject.shell(COUNTING, x_remove=True))
    stream.until_out(b"line 20\n")
    root.kill_daemon()
    assert stream.ended() == 23
    conversation.close()
    root.start_daemon()
    assert traces.none_of_environment(root.path, id) == []


def test_a_killed_keeper_makes_its_environment_lost_and_harms_no_other(root: Root, subject: Subject) -> None:
    lost = root.run_detached(subject.spec("sleep", "600"))
    other = _ready(root, subject, OBEYING)
    os.kill(root.ask("inspect", {"env": lost})["keeper_pid"], signal.SIGKILL)
    known = root.until_state(lost, "lost")
    assert known["exit"] is None
    assert "keeper" in known["reason"]
    assert traces.processes(lost) == {}
    told = root.ask("wait", {"env": lost})
    assert (told["code"], told["state"]) == (None, "lost")
    assert root.state(other) == "running"
    assert root.ask("stop", {"env": other, "grace_s": 10})["code"] == 7


def test_a_killed_keeper_cuts_a_foreground_run_without_an_exit_code(root: Root, subject: Subject) -> None:
    conversation, stream, id = root.run(subject.shell(IGNORING))
    stream.until_out(b"ready")
    os.kill(root.ask("inspect", {"env": id})["keeper_pid"], signal.SIGKILL)
    with contextlib.suppress(Cut):
        stream.until(lambda: stream.cut or stream.lost, 10)
    assert stream.exit is None
    told, _ = conversation.end()
    assert (told["code"], told["state"]) == (None, "lost")


def test_daemon_and_keeper_killed_together_make_it_lost(root: Root, subject: Subject) -> None:
    id = root.run_detached(subject.spec("sleep", "600"))
    keeper = root.ask("inspect", {"env": id})["keeper_pid"]
    root.kill_daemon()
    os.kill(keeper, signal.SIGKILL)
    root.start_daemon()
    known = root.until_state(id, "lost")
    assert known["exit"] is None
    assert traces.processes(id, id) == {}


def test_removing_twice_finds_nothing_the_second_time_and_leaves_nothing(root: Root, subject: Subject) -> None:
    id = root.run_detached(subject.spec("sleep", "600"))
    with pytest.raises(IllegalState):
        root.ask("rm", {"env": id})
    root.ask("rm", {"env": id, "force": True})
    assert traces.none_of_environment(root.path, id) == []
    with pytest.raises(NotFound):
        root.ask("rm", {"env": id, "force": True})


def test_what_has_ended_leaves_only_its_record_until_it_is_removed(root: Root, subject: Subject) -> None:
    id = root.run_detached(subject.shell("echo told; exit 2"))
    root.until_state(id, "exited")
    left = traces.none_of_environment(root.path, id, 2)
    assert [line for line in left if not line.startswith("file ")] == []
    root.ask("rm", {"env": id})
    assert traces.none_of_environment(root.path, id) == []


def test_children_left_behind_end_with_the_application(root: Root, subject: Subject) -> None:
    marker = f"97531.{os.getpid()}"
    id = root.run_detached(subject.shell(f"setsid sleep {marker} & sleep 0.3; exit 0"))
    root.until_state(id, "exited")
    assert traces.processes(f"sleep {marker}") == {}
