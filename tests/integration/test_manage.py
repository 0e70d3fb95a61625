"""Detached environments: looked at, entered, stopped, removed, and what happened told."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

import pytest

from tests.support import traces
from tests.support.roots import Root

pytestmark = pytest.mark.root

COUNTING = "i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); sleep 0.03; done; exit 5"


def _detached(root: Root, script: str, *options: str, name: str = "one") -> str:
    return root.ok("run", "-d", "--name", name, *options, "debian", "sh", "-c", script)


def test_a_detached_run_prints_its_id_and_is_listed(root: Root) -> None:
    id = _detached(root, "sleep 600")
    assert len(id) == 16
    (row,) = json.loads(root.ok("ps", "--json"))
    assert (row["id"], row["name"], row["image"], row["layer"], row["state"]) == (
        *(id, "one", "debian"),
        *("container", "running"),
    )
    assert root.ok("ps", "-q") in (id, id[:12])


def test_logs_follow_until_the_end(root: Root) -> None:
    _detached(root, COUNTING)
    assert root.ok("logs", "-f", "one").splitlines() == [f"line {n}" for n in range(40)]
    assert root.ok("wait", "one") == "5"


def test_logs_by_tail_and_time(root: Root) -> None:
    _detached(root, "echo first; sleep 1.2; echo second >&2; echo third")
    root.ok("wait", "one")
    done = root.cli("logs", "one")
    assert (done.stdout, done.stderr) == (b"first\nthird\n", b"second\n")
    assert root.cli("logs", "--tail", "1", "one").stdout == b"third\n"
    assert root.cli("logs", "--since", "1h", "one").stdout == b"first\nthird\n"
    stamped = root.cli("logs", "-t", "one").stdout.decode().splitlines()[0]
    assert stamped.endswith(" first")
    assert stamped[:2] == "20"


def test_logs_of_what_keeps_none_say_so(root: Root) -> None:
    _detached(root, "echo lost", "--log-driver", "none")
    root.ok("wait", "one")
    done = root.cli("logs", "one")
    assert b"lost" not in done.stdout


def test_exec_runs_in_the_same_place(root: Root) -> None:
    _detached(root, "echo shared > /tmp/x; sleep 600")
    root.ok("exec", "one", "sh", "-c", "while [ ! -s /tmp/x ]; do sleep 0.02; done")
    assert root.ok("exec", "one", "cat", "/tmp/x") == "shared"
    assert root.ok("exec", "-i", "one", "cat", input=b"in\n") == "in"
    assert root.cli("exec", "one", "sh", "-c", "exit 9").returncode == 9
    assert root.cli("exec", "one", "nothing-there").returncode == 127
    assert root.cli("exec", "nobody", "true").returncode == 125
    assert root.ok("exec", "-u", "1000", "-w", "/var", "-e", "X=y", "one", "sh", "-c", "echo $(id -u) $(pwd) $X") == (
        "1000 /var y"
    )


def test_a_detached_exec_goes_on(root: Root) -> None:
    _detached(root, "sleep 600")
    root.ok("exec", "-d", "one", "sh", "-c", "sleep 0.3; echo done > /tmp/done")
    wait = "i=0; while [ ! -s /tmp/done ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.05; done; cat /tmp/done"
    assert root.ok("exec", "one", "sh", "-c", wait) == "done"


def test_attach_shows_what_comes_and_tells_the_code(root: Root) -> None:
    _detached(root, COUNTING)
    done = root.cli("attach", "--no-stdin", "one")
    assert done.returncode == 5
    assert done.stdout.decode().splitlines()[-1] == "line 39"


def test_stop_kill_and_wait(root: Root) -> None:
    _detached(root, "trap 'exit 8' TERM; while :; do sleep 0.05; done")
    time.sleep(0.2)
    root.ok("stop", "one")
    assert root.ok("wait", "one") == "8"
    _detached(root, "sleep 600", name="two")
    root.ok("kill", "two")
    assert root.ok("wait", "two") == "137"
    _detached(root, "trap '' TERM; while :; do sleep 0.05; done", name="three")
    time.sleep(0.2)
    root.ok("stop", "-t", "1", "three")
    assert root.ok("wait", "three") == "137"
    assert "forced" in root.ok("ps", "-a")


def test_what_runs_is_not_removed_without_force(root: Root) -> None:
    _detached(root, "sleep 600")
    done = root.cli("rm", "one")
    assert done.returncode == 125
    assert b"isolat stop" in done.stderr or b"--force" in done.stderr
    root.ok("rm", "-f", "one")
    assert root.cli("rm", "one").returncode == 125


def test_inspect_tells_everything(root: Root) -> None:
    id = _detached(root, "sleep 600", "--label", "a=b", "--memory", "100m")
    (known,) = json.loads(root.ok("inspect", "one"))
    assert known["id"] == id
    assert known["state"] == "running"
    assert known["uid_base"] >= 0x40000000
    assert known["spec"]["mem_limit"] in ("100m", 100 << 20)
    assert known["plan"][0]


def test_events_tell_the_life_of_an_environment(root: Root) -> None:
    watching = root.popen("events", "--json", stdout=subprocess.PIPE)
    assert watching.stdout is not None
    time.sleep(0.5)
    assert root.cli("run", "--rm", "--name", "seen", "debian", "sh", "-c", "exit 4").returncode == 4
    found: list[dict[str, Any]] = []
    while not found or found[-1]["event"] != "destroy":
        found.append(json.loads(watching.stdout.readline()))
    watching.terminate()
    watching.wait(10)
    watching.stdout.close()
    assert [event["event"] for event in found] == ["create", "start", "die", "destroy"]
    assert found[2]["details"]["code"] == 4
    past = [json.loads(line) for line in root.ok("events", "--since", "1m", "--no-follow", "--json").splitlines()]
    assert [event["event"] for event in past if event["name"] == "seen"] == ["create", "start", "die", "destroy"]


def test_an_image_in_use_is_not_removed(root: Root) -> None:
    _detached(root, "sleep 600")
    done = root.cli("rmi", "debian")
    assert done.returncode == 125
    assert b"in use" in done.stderr
    assert "debian" in root.ok("images")


def test_many_at_once_are_all_there_and_all_removed(root: Root) -> None:
    starting = [root.popen("run", "-d", "debian", "sleep", "600", stdout=subprocess.PIPE) for _ in range(12)]
    ids = {process.communicate(timeout=60)[0].decode().strip() for process in starting}
    assert len(ids) == 12
    assert {row["id"] for row in root.environments()} == ids
    root.ok("rm", "-f", *ids)
    assert traces.none_of_environments(root.path) == []
