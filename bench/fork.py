"""How long a fork of a running microVM takes: until its child has answered, and how long the parent stands still.

For parents that have written 1, 10 and 40 MiB beside what they began with, in turns. The child's first answer is its
agent's, to the keeper's greeting; the whole fork is over when it has also been given randomness, time and names, and
its application is bound to the keeper. Both are counted from before the request. What a child has of its own is more
than what was written: the pages that the guest's kernel and the image's programs have touched.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import lib, microvm, roots, subject

from isolat import Client, Environment

MIB = (1, 10, 40)
ANSWER_MS = 150.0
ANSWER_MS_PER_MIB = 2.0
STOPPED_MS = 50.0
MEMORY = "256m"
WRITE = "head -c {bytes} /dev/urandom >/dev/shm/written; exec sleep infinity"
RUNS = 15
ANSWERED = "agent-greeted"  # the daemon's mark


class Parent:
    """One that is forked again and again; each child is removed at once."""

    def __init__(self, root: roots.Own, env: Environment, trace: Path) -> None:
        self._root = root
        self._env = env
        self._trace = trace
        self.whole_ms: list[float] = []
        self.stopped_ms: list[float] = []
        self.own_mib = 0.0

    def fork(self) -> float:
        """Milliseconds to the child's first answer."""
        self._trace.write_bytes(b"")
        start = time.monotonic_ns()
        found = self._root.ask("fork", {"env": self._env.id})
        self.whole_ms.append((time.monotonic_ns() - start) / 1e6)
        for child in found["environments"]:
            self._root.ask("rm", {"env": child["id"], "force": True})
        self.stopped_ms.append(float(found["stopped_ms"]))
        self.own_mib = found["own_bytes"] / (1 << 20)
        marks = [line.split() for line in self._trace.read_text().splitlines()]
        return (next(int(ns) for name, ns, _ in marks if name == ANSWERED) - start) / 1e6


@contextlib.contextmanager
def parent(root: roots.Own, image: str, mib: int, trace: Path) -> Iterator[Parent]:
    words = ("sh", "-c", WRITE.format(bytes=mib << 20))
    env = Client(str(root.path)).run(image, words, detach=True, layer="microvm", memory=MEMORY)
    try:
        env.exec(("sh", "-c", "while ! pidof sleep >/dev/null; do sleep 0.1; done")).check()
        yield Parent(root, env, trace)
    finally:
        env.rm(force=True)


def name(mib: int) -> str:
    return f"first answer, {mib} MiB written"


def measure(options: argparse.Namespace) -> lib.Report:
    report = lib.Report("fork", versions=subject.versions())
    with contextlib.ExitStack() as stack:
        trace = Path(stack.enter_context(tempfile.NamedTemporaryFile(prefix="isolat-trace-")).name)
        root = stack.enter_context(roots.own(options.image, ISOLAT_WARM="0", ISOLAT_TRACE=str(trace)))
        parents = {mib: stack.enter_context(parent(root, options.image, mib, trace)) for mib in MIB}
        report.versions |= microvm.accelerator(root)
        samples: dict[str, Callable[[], float]] = {name(mib): one.fork for mib, one in parents.items()}
        report.series = lib.interleave(samples, options.runs)
        for mib, one in parents.items():
            add(report, mib, one, options.runs)
    return report


def add(report: lib.Report, mib: int, one: Parent, runs: int) -> None:
    stopped = lib.Series(f"parent stands still, {mib} MiB written", tuple(one.stopped_ms[-runs:]))
    report.series += [stopped, lib.Series(f"whole fork, {mib} MiB written", tuple(one.whole_ms[-runs:]))]
    report.figures[f"own memory of a child, {mib} MiB written, MiB"] = one.own_mib
    limit = ANSWER_MS + ANSWER_MS_PER_MIB * mib
    report.promises += [
        lib.Promise(f"{name(mib)}, median", report.of(name(mib)).median, limit, unit=" ms"),
        lib.Promise(f"{stopped.name}, median", stopped.median, STOPPED_MS, unit=" ms"),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = lib.parser(__doc__, RUNS)
    parser.add_argument("--image", default=subject.IMAGE, help="the image to run (default %(default)s)")
    options = parser.parse_args(argv)
    return lib.finish(measure(options), as_json=options.json)


if __name__ == "__main__":
    sys.exit(lib.guarded(main))
