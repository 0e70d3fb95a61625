"""The daemon's own life: started by need, alone on its root, gone when idle; nothing depends on what it remembers."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import traces
from tests.support.roots import Root, plain_environment, private_root

pytestmark = pytest.mark.root

SLEEP = {"image": "debian", "command": ["sleep", "600"]}


def test_the_first_command_starts_it_and_all_share_it(fresh_root: Root) -> None:
    assert fresh_root.daemon_pid() is None
    starting = [fresh_root.popen("ps", stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(8)]
    said = [process.communicate(timeout=60) for process in starting]
    assert [process.returncode for process in starting] == [0] * 8, said
    words = f"--root {fresh_root.path}"
    assert len([line for line in traces.processes(words).values() if "daemon" in line]) == 1


def test_it_stops_itself_when_nothing_runs_and_comes_back(fresh_root: Root) -> None:
    pid = fresh_root.start_daemon("--idle", "1")
    id = fresh_root.run_detached({**SLEEP, "command": ["sleep", "2.5"]})
    time.sleep(2)
    assert fresh_root.daemon_pid() == pid
    fresh_root.daemon_gone(pid, 15)
    assert json.loads(fresh_root.ok("ps", "-a", "--json"))[0]["id"] == id


def test_a_second_daemon_on_the_same_root_is_refused(root: Root) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "isolat.daemon.main", "--root", str(root.path)],
        env=plain_environment(),
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 125
    assert b"another daemon holds" in done.stderr
    assert root.daemon_pid() is not None


def test_its_socket_is_for_root_and_the_group_only(root: Root) -> None:
    mode = stat.S_IMODE(root.socket.stat().st_mode)
    assert mode in (0o600, 0o660)
    assert root.socket.stat().st_uid == 0
    for private in (root.path / "mounts", root.path / "images"):
        assert stat.S_IMODE(private.stat().st_mode) & 0o066 == 0


def test_an_unprivileged_caller_is_told_the_remedy(root: Root) -> None:
    for daemon in ("there", "gone"):
        if daemon == "gone":
            root.kill_daemon()
        done = root.cli("ps", user=65534, group=65534, extra_groups=[])
        assert done.returncode == 125, daemon
        assert b"sudo" in done.stderr or b"group" in done.stderr
        assert b"Traceback" not in done.stderr
    root.start_daemon()


def test_two_roots_side_by_side_know_nothing_of_each_other(root: Root) -> None:
    root.ok("run", "-d", "--name", "same", "debian", "sleep", "600")
    with private_root() as other:
        other.ok("run", "-d", "--name", "same", "debian", "sleep", "600")
        assert len(other.environments()) == 1
        other.ok("rm", "-f", "same")
        assert root.state("same") == "running"
    assert root.state("same") == "running"
    assert root.exec("same", ["true"]).ended() == 0


def test_after_a_restart_of_the_host_what_ran_is_lost_and_swept(fresh_root: Root) -> None:
    fresh_root.start_daemon()
    ran, ended = fresh_root.run_detached(SLEEP), fresh_root.run_detached({**SLEEP, "command": ["sh", "-c", "exit 3"]})
    fresh_root.until_state(ended, "exited")
    keeper = fresh_root.ask("inspect", {"env": ran})["keeper_pid"]
    fresh_root.kill_daemon()
    os.kill(keeper, signal.SIGKILL)
    for id in (ran, ended):
        _damage_boot_id(fresh_root.path / "envs" / id / "handle.json")
    fresh_root.start_daemon()
    known = fresh_root.ask("inspect", {"env": ran})
    assert (known["state"], known["exit"]) == ("lost", None)
    assert "restarted" in known["reason"]
    assert fresh_root.ask("inspect", {"env": ended})["exit"]["code"] == 3
    assert [line for line in traces.none_of_environment(fresh_root.path, ran, 3) if not line.startswith("file")] == []


def _damage_boot_id(handle: Path) -> None:
    data = json.loads(handle.read_text())
    data["boot_id"] = "of-another-boot"
    handle.write_text(json.dumps(data))


@pytest.mark.parametrize("damage", ["deleted", "garbage", "emptied"])
def test_the_index_may_be_lost_at_any_time(root: Root, damage: str) -> None:
    id = root.run_detached(SLEEP)
    root.kill_daemon()
    for path in root.path.glob("index.sqlite*"):
        path.unlink()
    if damage != "deleted":
        (root.path / "index.sqlite").write_bytes(b"no database " * 1000 if damage == "garbage" else b"")
    root.start_daemon()
    assert [env["id"] for env in root.environments()] == [id]
    root.ask("rm", {"env": id, "force": True})
    assert [row["event"] for row in _events(root, id)][-1] == "destroy"


def _events(root: Root, id: str) -> list[dict[str, object]]:
    conversation = root.open("events", {"since_ns": 1})
    conversation.end()
    return [row for row in conversation.rows if row["id"] == id]


def test_a_damaged_handle_harms_no_other_environment(fresh_root: Root) -> None:
    fresh_root.start_daemon()
    ended, runs = fresh_root.run_detached({**SLEEP, "command": ["true"]}), fresh_root.run_detached(SLEEP)
    fresh_root.until_state(ended, "exited")
    fresh_root.kill_daemon()
    (fresh_root.path / "envs" / ended / "handle.json").write_text('{"version": 1, "id": ')
    fresh_root.start_daemon()
    assert [env["id"] for env in fresh_root.environments()] == [runs]
    assert "damaged" in fresh_root.log()


def test_what_nobody_knows_is_swept_at_the_start(fresh_root: Root) -> None:
    fresh_root.start_daemon()
    fresh_root.run_detached(SLEEP)
    fresh_root.kill_daemon()
    stray = fresh_root.path / "envs" / "0123456789abcdef"
    (stray / "log").mkdir(parents=True)
    fresh_root.start_daemon()
    assert not stray.exists()
    assert len(fresh_root.environments()) == 1


def test_keepers_of_a_replaced_installation_go_on(fresh_root: Root, tmp_path: Path) -> None:
    """An upgrade: what was started by the former binaries, which are gone, is held, entered and ended as before."""
    from isolat.engine.paths import native_dir

    kept = Path(f"/tmp/isolat-k-{os.getpid()}")
    kept.mkdir()
    try:
        for name in ("isolat-keeper", "isolat-init"):
            (kept / name).write_bytes((native_dir() / name).read_bytes())
            (kept / name).chmod(0o755)
        fresh_root.start_daemon(ISOLAT_LIBEXEC=str(kept))
        id = fresh_root.run_detached(
            {**SLEEP, "command": ["sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done"]}
        )
        time.sleep(0.3)
        fresh_root.kill_daemon()
    finally:
        for path in kept.iterdir():
            path.unlink()
        kept.rmdir()
    fresh_root.start_daemon()
    assert fresh_root.exec(id, ["true"]).ended() == 0
    assert fresh_root.ask("stop", {"env": id, "grace_s": 10})["code"] == 9


def test_system_reset_says_and_leaves_nothing() -> None:
    with private_root() as root:
        root.ok("run", "-d", "debian", "sleep", "600")
        root.ok("run", "debian", "true")
        said = root.ok("system", "reset", "--yes")
        assert "nothing is left" in said
        assert traces.of_root(root.path) == []
        assert not root.path.exists()


def test_system_shutdown_ends_the_daemon_and_nothing_else(root: Root) -> None:
    id = root.run_detached(SLEEP)
    pid = root.daemon_pid()
    assert pid
    root.ok("system", "shutdown")
    root.daemon_gone(pid)
    assert root.ok("exec", id, "echo", "still here") == "still here"
