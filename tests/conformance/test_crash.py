"""SIGKILL to the daemon between every two steps, of making and of removing: whatever is half made can be undone."""

from __future__ import annotations

import contextlib

import pytest

from isolat.errors import IsolatError
from tests.conformance.subject import Subject
from tests.support import traces
from tests.support.roots import Root
from tests.support.wires import Cut

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

MOST = 150
SETTLED = {"running", "exited", "lost"}


def _until_survived(root: Root, subject: Subject, kill_at: int) -> bool:
    """Run and remove under a daemon that kills itself at this checkpoint. True when it lived to the end."""
    pid = root.start_daemon(ISOLAT_KILL_AT=str(kill_at))
    try:
        id = root.run_detached(subject.spec("sleep", "600"))
        root.ask("rm", {"env": id, "force": True})
    except Cut:
        root.daemon_gone(pid)
        return False
    root.kill_daemon()
    return True


def _recovered(root: Root, subject: Subject, kill_at: int) -> None:
    """A new daemon finds only environments that are as it says, and all of them can be removed."""
    root.start_daemon()
    for env in root.environments():
        assert env["state"] in SETTLED, f"killed at {kill_at}: {env}"
        if env["state"] == "running" and subject.can.enter:
            assert root.exec(env["id"], ["true"]).ended() == 0
    root.remove_all()
    assert traces.none_of_environments(root.path) == [], f"killed at {kill_at}"
    root.kill_daemon()


def test_a_daemon_killed_between_any_two_steps_leaves_nothing(fresh_root: Root, subject: Subject) -> None:
    for kill_at in range(1, MOST):
        survived = _until_survived(fresh_root, subject, kill_at)
        _recovered(fresh_root, subject, kill_at)
        if survived:
            assert kill_at > 2 * len(subject.layers), "there were no checkpoints"
            return
    pytest.fail(f"no end after {MOST} checkpoints")


def test_a_daemon_killed_at_every_step_of_its_recovery_leaves_nothing(fresh_root: Root, subject: Subject) -> None:
    middle = 6
    for kill_at in range(1, MOST):
        _until_survived(fresh_root, subject, middle)
        pid = fresh_root.start_daemon(ISOLAT_KILL_AT=str(kill_at))
        with contextlib.suppress(Cut, OSError, IsolatError):
            fresh_root.remove_all()
        survived = fresh_root.daemon_pid() == pid
        fresh_root.kill_daemon()
        _recovered(fresh_root, subject, kill_at)
        if survived:
            return
    pytest.fail(f"no end after {MOST} checkpoints")
