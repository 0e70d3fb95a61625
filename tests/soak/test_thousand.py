"""Many idle containers at once: how quickly they start, what each costs, and that nothing of them is left."""

from __future__ import annotations

import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.support import traces
from tests.support.images import IMAGE
from tests.support.roots import REPOSITORY, Root

pytestmark = [pytest.mark.root, pytest.mark.timeout(1200)]

AT_ONCE = 4
RATE_PER_S = 20.0
MEMORY_MIB = 2.5
PS_S = 0.3


@dataclass(frozen=True)
class Figures:
    """What was measured. Memory is what MemAvailable lost, the keeper and everything else included."""

    containers: int
    started_per_s: float
    memory_mib_each: float
    ps_s: float
    removed_per_s: float

    def table(self) -> str:
        rows = (
            ("idle containers at once", f"{self.containers}", ""),
            ("started per second", f"{self.started_per_s:.1f}", f"at least {RATE_PER_S:g}"),
            ("host memory each", f"{self.memory_mib_each:.2f} MiB", f"at most {MEMORY_MIB:g} MiB"),
            ("ps", f"{self.ps_s * 1000:.0f} ms", f"at most {PS_S * 1000:.0f} ms"),
            ("removed per second", f"{self.removed_per_s:.1f}", ""),
        )
        return "\n".join(f"{name:<26}{value:>14}   {promised}".rstrip() for name, value, promised in rows)


def _available_mib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024


def _settled_mib() -> float:
    """MemAvailable once it stays: the median of some looks after a moment."""
    time.sleep(2)
    looks = []
    for _ in range(5):
        looks.append(_available_mib())
        time.sleep(0.2)
    return statistics.median(looks)


def measure(root: Root, count: int) -> Figures:
    """Start so many, look, remove them. Asserts that all are there, and afterwards gone."""
    root.ensure_daemon()
    spec = {"image": IMAGE, "command": ["sleep", "86400"]}
    root.ask("rm", {"env": root.run_detached(spec), "force": True})  # the image mounted, the pool made
    before = _settled_mib()
    with ThreadPoolExecutor(AT_ONCE) as users:
        began = time.monotonic()
        ids = list(users.map(lambda _: root.run_detached(spec), range(count)))
        rate = count / (time.monotonic() - began)
        memory = (before - _settled_mib()) / count
        assert len(set(ids)) == count
        ps_s = _ps_s(root, count)
        began = time.monotonic()
        list(users.map(lambda id: root.ask("rm", {"env": id, "force": True}), ids))
        removed = count / (time.monotonic() - began)
    root.close_all()
    assert root.environments() == []
    assert traces.none_of_environments(root.path, 20) == []
    return Figures(count, rate, memory, ps_s, removed)


def _ps_s(root: Root, count: int) -> float:
    """The median of some ``isolat ps``, as typed: with the start of the command."""
    times = []
    for _ in range(5):
        began = time.monotonic()
        said = root.ok("ps", "-q")
        times.append(time.monotonic() - began)
        assert len(said.splitlines()) == count
    return statistics.median(times)


def test_thirty_idle_containers_are_there_and_then_gone(fresh_root: Root) -> None:
    measure(fresh_root, 30)


@pytest.mark.soak
def test_a_thousand_idle_containers_as_promised(fresh_root: Root) -> None:
    figures = measure(fresh_root, 1000)
    results = REPOSITORY / "bench" / "results"
    results.mkdir(exist_ok=True)
    about = {"kernel": os.uname().release, "cpus": os.cpu_count(), **asdict(figures)}
    (results / "thousand.json").write_text(json.dumps(about, indent=1) + "\n")
    (results / "thousand.txt").write_text(figures.table() + "\n")
    print(f"\n{figures.table()}")
    assert figures.started_per_s >= RATE_PER_S
    assert figures.memory_mib_each <= MEMORY_MIB
    assert figures.ps_s <= PS_S
