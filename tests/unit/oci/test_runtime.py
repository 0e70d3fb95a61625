"""The command line of OCI runtimes, and that a trial container really runs on this machine."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.errors import Unsupported
from isolat.linux.facts import record_facts
from isolat.oci.runtime import Runtime, choose, installed, try_out, version
from tests.unit.layers.jobs import TOOLS, facts


def test_only_crun_has_to_be_told_to_use_the_file_system() -> None:
    crun = Runtime("/usr/bin/crun", "/state").run("ID", "/bundle", "/pid")
    runc = Runtime("/usr/sbin/runc", "/state").run("ID", "/bundle", "/pid")
    assert crun[:4] == ("/usr/bin/crun", "--root", "/state", "--cgroup-manager=cgroupfs")
    assert runc[3:] == crun[4:]
    assert runc[3:] == ("run", "--detach", "--bundle", "/bundle", "--pid-file", "/pid", "--preserve-fds", "1", "ID")


def test_deleting_kills_what_runs() -> None:
    assert Runtime("/usr/sbin/runc", "/state").delete("ID")[-3:] == ("delete", "--force", "ID")


def test_the_quickest_is_taken_unless_one_is_named() -> None:
    assert installed(facts()) == TOOLS
    assert choose("", TOOLS) == "/usr/bin/crun"
    assert choose("runc", TOOLS) == "/usr/sbin/runc"
    assert choose("/opt/kata", ()) == "/opt/kata"


@pytest.mark.parametrize(("wanted", "found", "words"), [("kata", TOOLS, "found: crun, runc"), ("", (), "found: none")])
def test_one_that_is_not_there_is_refused(wanted: str, found: tuple[tuple[str, str], ...], words: str) -> None:
    with pytest.raises(Unsupported, match=words) as caught:
        choose(wanted, found)
    assert caught.value.hint


def test_a_version_of_what_cannot_be_run_is_empty() -> None:
    assert version("/nonexistent/crun", Deadline(5)) == ""
    assert version("/dev/null", Deadline(5)) == ""
    assert version("/bin/sleep", Deadline(0)) == ""


@pytest.mark.root
def test_a_trial_container_runs_and_leaves_nothing() -> None:
    here = record_facts()
    path = here.tool("crun")
    if path is None:
        pytest.skip("there is no crun on this machine")
    assert version(path, Deadline(5))
    assert try_out(path, here, Deadline(30)) == ""
    assert _left_over() == []


@pytest.mark.root
def test_a_trial_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "crun"
    broken.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "no such thing" in try_out(str(broken), record_facts(), Deadline(30))
    assert _left_over() == []


@pytest.mark.root
def test_a_trial_that_hangs_ends_in_time_with_all_that_it_started(tmp_path: Path) -> None:
    hanging = tmp_path / "crun"
    hanging.write_text("#!/bin/sh\nsleep 61.5 & wait\n")
    hanging.chmod(0o755)
    began = time.monotonic()
    assert "in time" in try_out(str(hanging), record_facts(), Deadline(0.5))
    assert time.monotonic() - began < 10
    assert subprocess.run(["pgrep", "-f", "sleep 61[.]5"], capture_output=True, check=False).stdout == b""
    assert _left_over() == []


@pytest.mark.root
def test_what_a_killed_daemons_trial_left_is_removed_by_the_next(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    old = Path(tempfile.mkdtemp(prefix=f"isolat-probe-{dead.pid}-"))
    alive = Path(tempfile.mkdtemp(prefix="isolat-probe-1-"))
    try:
        try_out("/nonexistent/crun", record_facts(), Deadline(5))
        assert not old.exists()
        assert alive.exists()
    finally:
        alive.rmdir()


def _left_over() -> list[str]:
    """What this process's trials have left; another process's may be under way."""
    pattern = f"isolat-probe-{os.getpid()}-*"
    places = [tempfile.gettempdir(), "/sys/fs/cgroup"]
    found = subprocess.run(
        ["find", *places, "-maxdepth", "2", "-name", pattern], capture_output=True, text=True, check=False
    )
    return found.stdout.splitlines()
