"""SIGKILL to the daemon at any moment of pull, build, commit, rmi and prune: the store is as it says, and goes on.

What was being made is there whole or not at all; nothing of the operation stays, neither a process nor a file; and the
same operation, done again, succeeds. A hundred kills in ``make soak``, some in a test run.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import registry
from tests.support.roots import Root

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800)]

FEW, MANY = 5, 100
CONTAINERFILE = """\
FROM debian
RUN head -c 3000000 /dev/urandom > /one
COPY some /two
ENTRYPOINT ["/bin/cat", "/two"]
"""


@dataclass(frozen=True)
class Operation:
    """``before`` makes what it needs; ``words`` is the command."""

    name: str
    words: tuple[str, ...]
    before: Callable[[], object] = lambda: None


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with registry.running(tmp_path / "registry") as found:
        yield found


@pytest.fixture
def operations(fresh_root: Root, address: str, tmp_path: Path) -> list[Operation]:
    root, name = fresh_root, f"{address}/kills"
    root.ensure_daemon()
    context = tmp_path / "context"
    context.mkdir()
    (context / "Containerfile").write_text(CONTAINERFILE)
    (context / "some").write_text("some words\n")
    root.ok("build", "-t", name, str(context))
    root.ok("push", name)
    root.ok("run", "--name", "changed", "debian", "sh", "-c", "head -c 5000000 /dev/urandom > /big; rm /etc/issue")

    def without() -> None:
        root.cli("rmi", name)

    def pulled() -> None:
        root.ok("pull", name)

    return [
        Operation("pull", ("pull", name), without),
        Operation("build", ("build", "--no-cache", "-t", "built", str(context))),
        Operation("commit", ("commit", "changed", "committed")),
        Operation("rmi", ("rmi", name), pulled),
        Operation("prune", ("image", "prune", "--all", "--yes"), pulled),
    ]


def _killed(root: Root, operation: Operation, after_s: float) -> bool:
    """Kill the daemon so long after the start of the operation. False when it had ended before."""
    pid = root.ensure_daemon()
    command = root.popen(*operation.words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        command.wait(after_s)
    ended = command.poll() is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _gone(pid)
    command.wait(60)  # which may have started another daemon by itself
    return not ended


def _gone(pid: int) -> None:
    """Dead, if not yet reaped by whoever has to."""
    end = time.monotonic() + 10
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state in "ZX":
            return
        assert time.monotonic() < end
        time.sleep(0.01)


def _sound(root: Root, operation: Operation) -> None:
    found = root.cli("system", "check", "--deep")
    assert found.stdout.decode().strip() == "all is well", f"killed in {operation.name}"
    assert list((root.path / "images" / "tmp").iterdir()) == []
    assert root.ok("run", "--rm", "debian", "echo", "here") == "here"


def _kill_often(root: Root, operations: list[Operation], times: int) -> None:
    chance = random.Random(times)
    took = {}
    for operation in operations:
        operation.before()
        start = time.monotonic()
        root.ok(*operation.words)
        took[operation.name] = time.monotonic() - start
    hits = 0
    for n in range(times):
        operation = operations[n % len(operations)]
        operation.before()
        hits += _killed(root, operation, chance.uniform(0, took[operation.name]))
        _sound(root, operation)
    for operation in operations:
        operation.before()
        root.ok(*operation.words)
        _sound(root, operation)
    assert hits >= times // 3, f"only {hits} of {times} kills hit anything"


def test_some_kills_lose_nothing(fresh_root: Root, operations: list[Operation]) -> None:
    _kill_often(fresh_root, operations, FEW)


@pytest.mark.soak
def test_a_hundred_kills_lose_nothing(fresh_root: Root, operations: list[Operation]) -> None:
    _kill_often(fresh_root, operations, MANY)
