"""After many environments the daemon has no more descriptors and threads, and hardly more memory, than after a few."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.images import IMAGE
from tests.support.roots import Root

pytestmark = [pytest.mark.root, pytest.mark.timeout(1200)]

WARM = 20
GROWTH_KIB = 8 << 10


def _used(pid: int) -> tuple[int, int, int]:
    """Descriptors, threads, KiB of memory."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return fds, int(lines["Threads"]), int(lines["VmRSS"].split()[0])


def _rounds(root: Root, count: int) -> None:
    for n in range(count):
        conversation, stream, _ = root.run({"image": IMAGE, "command": ["sh", "-c", f"exit {n % 3}"], "x-remove": True})
        assert stream.ended() == n % 3
        conversation.end()
        id = root.run_detached({"image": IMAGE, "command": ["sleep", "600"]})
        assert root.exec(id, ["true"]).ended() == 0
        root.ask("rm", {"env": id, "force": True})
        root.close_all()


def _leaks(root: Root, count: int) -> None:
    pid = root.ensure_daemon()
    _rounds(root, WARM)
    time.sleep(1)
    fds, threads, memory = _used(pid)
    _rounds(root, count)
    time.sleep(1)
    now = _used(pid)
    assert now[0] <= fds + 2
    assert now[1] <= threads + 2
    assert now[2] - memory < GROWTH_KIB


def test_some_environments_leave_nothing_in_the_daemon(fresh_root: Root) -> None:
    _leaks(fresh_root, 40)


@pytest.mark.soak
def test_two_thousand_environments_leave_nothing_in_the_daemon(fresh_root: Root) -> None:
    _leaks(fresh_root, 1000)
