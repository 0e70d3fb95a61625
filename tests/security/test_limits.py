"""Who takes all he can get hits his own limit, and nobody else notices."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from isolat.engine.paths import StateRoot
from tests.support import traces
from tests.support.images import IMAGE
from tests.support.roots import Root
from tests.support.wires import Stream

pytestmark = pytest.mark.root

MIB = 1 << 20
BOMB = """
import os
print("ready", flush=True)
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
HOG = """
kept = []
while True:
    kept.append(bytearray(1 << 20))
"""
FILLER = "dd if=/dev/zero of=/var/big bs=1M count=600; wc -c < /var/big"
SPINNER = "while :; do :; done & while :; do :; done"


def _spec(*command: str, **keys: Any) -> dict[str, Any]:
    return {"image": IMAGE, "command": list(command), **keys}


def _value(root: Root, id: str, name: str, key: str = "") -> int:
    """A file of its control group, in whichever hierarchy has it; ``key``: of a line ``key value`` in it."""
    for group in traces.cgroups(f"{StateRoot(root.path).cgroup}/{id}"):
        path = Path(group) / name
        if path.exists():
            lines = path.read_text().splitlines()
            return int(lines[0]) if not key else next(int(line.split()[1]) for line in lines if line.split()[0] == key)
    raise FileNotFoundError(f"{id} has no {name}")


def _cpu_s(root: Root, id: str) -> float:
    try:
        return _value(root, id, "cpuacct.usage") / 1e9
    except FileNotFoundError:
        return _value(root, id, "cpu.stat", "usage_usec") / 1e6


def _answer_s(root: Root, id: str) -> float:
    """How long a process on the host, and one in another environment, take to be made."""
    began = time.monotonic()
    assert root.exec(id, ["true"]).ended() == 0
    os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)
    return time.monotonic() - began


def test_a_fork_bomb_hits_its_limit_of_processes(root: Root) -> None:
    other = root.run_detached(_spec("sleep", "600"))
    bomb = root.run_detached(_spec("python3", "-c", BOMB, pids_limit=100, cpus=1))
    time.sleep(1.5)
    assert 90 <= _value(root, bomb, "pids.current") <= 100
    assert _answer_s(root, other) < 2
    began = time.monotonic()
    root.ask("rm", {"env": bomb, "force": True})
    assert time.monotonic() - began < 15
    assert traces.none_of_environment(root.path, bomb) == []


def test_a_memory_hog_is_killed_and_it_is_said_why(root: Root) -> None:
    conversation, stream, id = root.run(_spec("python3", "-c", HOG, mem_limit=64 * MIB))
    assert stream.ended() == 137
    told, _ = conversation.end()
    assert (told["code"], told["oom"]) == (137, True)
    known = root.ask("inspect", {"env": id})["exit"]
    assert (known["code"], known["oom"]) == (137, True)


def test_a_hog_that_is_not_the_application_is_killed_alone(root: Root) -> None:
    script = 'python3 -c "$0" || echo survived'
    conversation, stream, _ = root.run(_spec("sh", "-c", script, HOG, mem_limit=64 * MIB))
    assert stream.ended() == 0
    assert b"survived" in stream.out
    conversation.close()


def test_a_disk_filler_hits_its_limit_and_not_the_hosts_disk(root: Root) -> None:
    free = os.statvfs(root.path).f_bavail * os.statvfs(root.path).f_frsize
    conversation, stream, _ = root.run(_spec("sh", "-c", FILLER, storage_opt={"size": 64 * MIB}))
    assert stream.ended(60) == 0
    assert b"quota" in stream.err or b"No space" in stream.err
    assert 32 * MIB < int(stream.out) <= 65 * MIB
    now = os.statvfs(root.path).f_bavail * os.statvfs(root.path).f_frsize
    assert free - now < 300 * MIB
    conversation.close()


def test_shared_memory_is_bounded_too(root: Root) -> None:
    script = "dd if=/dev/zero of=/dev/shm/big bs=1M count=200 2>/dev/null; wc -c < /dev/shm/big"
    conversation, stream, _ = root.run(_spec("sh", "-c", script))
    assert stream.ended() == 0
    assert int(stream.out) <= 64 * MIB
    conversation.close()


def test_a_cpu_hog_gets_no_more_than_its_share(root: Root) -> None:
    id = root.run_detached(_spec("sh", "-c", SPINNER, cpus=0.25))
    time.sleep(0.5)
    before, began = _cpu_s(root, id), time.monotonic()
    time.sleep(3)
    share = (_cpu_s(root, id) - before) / (time.monotonic() - began)
    assert 0.1 < share < 0.32


def _keeper_kib(root: Root, id: str) -> int:
    pid = root.ask("inspect", {"env": id})["keeper_pid"]
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def test_an_endless_printer_fills_no_disk_and_no_memory_and_is_not_held_up(root: Root) -> None:
    id = root.run_detached(_spec("yes", "an endless line of text that fills logs", cpus=1))
    log = StateRoot(root.path).env(id) / "log"
    end = time.monotonic() + 20
    while not (log / "2").exists():
        assert time.monotonic() < end, "it was held up"
        time.sleep(0.1)
    time.sleep(1)
    used = subprocess.run(["du", "-sb", str(log)], capture_output=True, text=True, check=False).stdout.split()[0]
    assert int(used) <= 3 * 10 * MIB + MIB
    assert not (log / "3").exists()
    assert _keeper_kib(root, id) < 12 << 10


def test_a_client_that_does_not_read_holds_up_the_printer_not_the_keeper(root: Root) -> None:
    conversation, stream, id = root.run(_spec("yes", cpus=1, logging={"driver": "none"}))
    assert isinstance(stream, Stream)
    time.sleep(1.5)
    assert _keeper_kib(root, id) < 12 << 10
    before = _cpu_s(root, id)
    time.sleep(1)
    assert _cpu_s(root, id) - before < 0.3
    conversation.close()
