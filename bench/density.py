"""How many idle containers one machine holds: N at once, how fast they start, what each costs, how long `ps` takes.

Memory is what the whole machine has less of afterwards (MemAvailable before and after, through N): keepers, runtime
state and the kernel's own share are in it. The containers are started through the daemon's socket by a few threads,
so that the rate is Isolat's and not the start of N interpreters.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import lib, subject

from isolat.client import connect
from isolat.linux import mounts

RATE_PER_S = 20.0
MEMORY_MIB = 2.5
PS_MS = 300.0
PREFIX = "bench-density"
SETTLE_S = 3.0
PS_RUNS = 7


class Herd:
    """The containers of one run."""

    def __init__(self, image: str, parallel: int) -> None:
        self.root = str(subject.root())
        self.image = image
        self.parallel = parallel
        self.ids: list[str] = []
        self._lock = threading.Lock()

    def ask(self, verb: str, args: dict[str, Any]) -> Any:
        return connect.ask(self.root, verb, args)

    def start(self, count: int) -> float:
        """Start so many; how many a second."""
        return count / self._timed(self._start_one, range(count))

    def _start_one(self, number: int) -> None:
        name = f"{PREFIX}-{number}"
        spec = {"image": self.image, "command": ["sleep", "infinity"], "container_name": name}
        id = str(self.ask("run", {"spec": spec, "attach": False})["id"])
        with self._lock:
            self.ids.append(id)

    def remove(self) -> float:
        """Remove all that this run started; how many a second."""
        count = len(self.ids)
        return count / self._timed(self._remove_one, list(self.ids))

    def _remove_one(self, id: str) -> None:
        self.ask("rm", {"env": id, "force": True})

    def _timed(self, work: Callable[[Any], None], items: Any) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(self.parallel) as pool:
            for _ in pool.map(work, items):
                pass
        return time.perf_counter() - start

    def running(self) -> int:
        ours = set(self.ids)
        rows = self.ask("ps", {"all": True})["environments"]
        return sum(1 for row in rows if row["id"] in ours and row["state"] == "running")

    def leftovers(self) -> list[str]:
        """What on this machine still has one of our ids in its name: mounts, processes, control groups, directories."""
        return [text for text in _traces(Path(self.root)) if any(id in text for id in self.ids)]


def _traces(root: Path) -> Iterator[str]:
    yield from (f"mount {entry.target}" for entry in mounts.mounts())
    yield from (f"directory {path}" for where in ("envs", "pool", "runtime") for path in (root / where).glob("*"))
    yield from (f"control group {path}" for path in Path("/sys/fs/cgroup").glob("**/isolat/*/*"))
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield f"process {entry.parent.name} {entry.read_bytes().decode(errors='replace')}"
        except OSError:
            continue


def measure(options: argparse.Namespace) -> lib.Report:
    report = lib.Report("density", versions=subject.versions())
    herd = Herd(options.image, options.parallel)
    warm = subject.argv("run", "--rm", options.image, "true")
    lib.spend(warm)  # the daemon is up, the image mounted
    before = _available()
    try:
        _full(herd, report, options.count, before)
    finally:
        report.figures["removed per second"] = herd.remove() if herd.ids else 0.0
    left = herd.leftovers()
    for text in left[:5]:
        report.missing["a clean end"] = text
    report.promises.append(lib.Promise("traces left afterwards", len(left), 0))
    return report


def _full(herd: Herd, report: lib.Report, count: int, before: float) -> None:
    """While all run."""
    rate = herd.start(count)
    used = (before - _available()) / count / (1 << 20)
    running = herd.running()
    ps = [lib.spend(subject.argv("ps")) for _ in range(PS_RUNS)]
    report.series = [lib.Series("isolat ps", tuple(ps))]
    report.figures |= {"containers": count, "started per second": rate, "MiB each": used}
    report.promises += [
        lib.Promise("running at once", running, count, at_least=True),
        lib.Promise("started per second", rate, RATE_PER_S, at_least=True),
        lib.Promise("memory each", used, MEMORY_MIB, unit=" MiB"),
        lib.Promise("isolat ps", report.of("isolat ps").median, PS_MS, unit=" ms"),
    ]


def _available() -> int:
    """MemAvailable once the kernel has freed what it frees later (RCU, slabs)."""
    time.sleep(SETTLE_S)
    return lib.meminfo("MemAvailable")


def main(argv: list[str] | None = None) -> int:
    parser = lib.parser(__doc__)
    parser.add_argument("count", nargs="?", type=int, default=200, help="containers at once (default %(default)s)")
    parser.add_argument("--image", default=subject.IMAGE, help="the image to run (default %(default)s)")
    parser.add_argument("--parallel", type=int, default=4, help="threads that start them (default %(default)s)")
    options = parser.parse_args(argv)
    return lib.finish(measure(options), as_json=options.json)


if __name__ == "__main__":
    sys.exit(lib.guarded(main))
