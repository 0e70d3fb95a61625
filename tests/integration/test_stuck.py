"""What stands in the way for a while loses nothing: unreadable handles, patient stops, keepers that do not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from isolat.errors import UsageError
from tests.support.roots import Root

pytestmark = pytest.mark.root
STUBBORN = "trap '' TERM; while :; do sleep 0.2; done"


def test_force_ends_what_somebody_else_is_stopping_patiently(fresh_root: Root) -> None:
    id = fresh_root.ok("run", "-d", "debian", "sh", "-c", STUBBORN).strip()
    patient = fresh_root.popen("stop", "--time", "300", id)
    time.sleep(0.7)
    began = time.monotonic()
    fresh_root.ok("rm", "-f", id)
    assert time.monotonic() - began < 10
    patient.communicate(timeout=20)


def test_a_time_limit_holds_beside_a_patient_stop(fresh_root: Root) -> None:
    id = fresh_root.ok("run", "-d", "--timeout", "2s", "debian", "sh", "-c", STUBBORN).strip()
    patient = fresh_root.popen("stop", "--time", "300", id)
    assert fresh_root.ok("wait", id).strip() == "137"
    patient.communicate(timeout=20)
    fresh_root.ok("rm", id)


def test_an_environment_whose_handle_cannot_be_read_goes_on(fresh_root: Root) -> None:
    id = fresh_root.ok("run", "-d", "debian", "sleep", "600").strip()
    fresh_root.kill_daemon()
    handle = fresh_root.path / "envs" / id / "handle.json"
    text = handle.read_text()
    handle.write_text(text.replace('"version":1', '"version":9', 1))
    other = fresh_root.ok("run", "-d", "debian", "sleep", "600").strip()
    assert (fresh_root.path / "pool" / id).is_dir()
    fresh_root.kill_daemon()
    handle.write_text(text)
    fresh_root.ensure_daemon()
    rows = {row["id"]: row["state"] for row in fresh_root.environments()}
    assert rows == {id: "running", other: "running"}
    uids = {fresh_root.ok("exec", ref, "sh", "-c", "cat /proc/self/uid_map").split()[1] for ref in (id, other)}
    assert len(uids) == 2
    fresh_root.ok("rm", "-f", id, other)


@pytest.mark.soak
def test_a_keeper_that_does_not_answer_for_a_while_is_not_taken_for_dead(fresh_root: Root) -> None:
    id = fresh_root.ok("run", "-d", "debian", "sleep", "600").strip()
    keeper = int((fresh_root.path / "envs" / id / "keeper.pid").read_text())
    fresh_root.kill_daemon()
    os.kill(keeper, signal.SIGSTOP)
    try:
        fresh_root.ensure_daemon()
        assert [row["state"] for row in fresh_root.environments()] == ["running"]
    finally:
        os.kill(keeper, signal.SIGCONT)
    deadline = time.monotonic() + 30
    while fresh_root.cli("exec", id, "true").returncode and time.monotonic() < deadline:
        time.sleep(0.5)
    fresh_root.ok("exec", id, "true")
    fresh_root.ok("rm", "-f", id)


def test_a_forced_removal_that_waits_for_its_keeper_tells_when_it_ended(fresh_root: Root) -> None:
    id = fresh_root.ok("run", "-d", "debian", "sleep", "600").strip()
    keeper = int((fresh_root.path / "envs" / id / "keeper.pid").read_text())
    os.kill(keeper, signal.SIGSTOP)
    removing = fresh_root.popen("rm", "-f", id)
    try:
        end = time.monotonic() + 20
        while not (told := fresh_root.environments()[0]["status"]).startswith("exited"):
            assert time.monotonic() < end, told
            time.sleep(0.1)
        assert " d ago" not in told
    finally:
        os.kill(keeper, signal.SIGCONT)
    removing.communicate(timeout=60)
    fresh_root.cli("rm", "-f", id)


def test_more_words_than_a_process_can_have_are_refused(fresh_root: Root) -> None:
    id = fresh_root.ok("run", "-d", "--layer", "host", "debian", "sleep", "600").strip()
    with pytest.raises(UsageError, match="at most"):
        fresh_root.ask("exec", {"env": id, "command": ["true", *(12 * ["x" * 100_000])]})


def test_a_removal_that_fails_is_tried_again_until_it_works(fresh_root: Root) -> None:
    id = fresh_root.ok("run", "-d", "--rm", "debian", "sleep", "600").strip()
    kept = fresh_root.path / "envs" / id / "bundle" / "config.json"
    subprocess.run(["chattr", "+i", kept], check=True)
    try:
        fresh_root.ok("kill", id)
        time.sleep(1.5)
        assert [row["state"] for row in fresh_root.environments()] == ["removing"]
    finally:
        subprocess.run(["chattr", "-i", kept], check=True)
    deadline = time.monotonic() + 20
    while fresh_root.environments() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert fresh_root.environments() == []
    assert "defect" not in fresh_root.log()
