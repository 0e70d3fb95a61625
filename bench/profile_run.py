"""Where the time of one `isolat run --rm IMAGE true` goes: between which moments of client and daemon.

The marks of ``isolat.trace`` are collected over many runs. The daemon of the state root is restarted twice, to begin
and to end tracing; what it holds goes on meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import lib, subject

from isolat.client import connect

BEGIN, END = "command is started", "command has ended"
GONE_S = 10.0
Run = list[tuple[str, float]]  # mark, milliseconds since BEGIN


def parse(text: str) -> list[tuple[str, int]]:
    """Marks of a trace file by time, a name's second appearance as ``name#2``."""
    rows = [line.split() for line in text.splitlines()]
    marks = sorted(((row[0], int(row[1])) for row in rows if len(row) >= 2), key=lambda mark: mark[1])
    seen: dict[str, int] = {}
    found = []
    for name, at_ns in marks:
        seen[name] = seen.get(name, 0) + 1
        found.append((name if seen[name] == 1 else f"{name}#{seen[name]}", at_ns))
    return found


def offsets(runs: Sequence[Run]) -> dict[str, list[float]]:
    """For each mark that at least half of the runs passed, its offsets; in the order of their medians."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, at_ms in run:
            found.setdefault(name, []).append(at_ms)
    usual = {name: values for name, values in found.items() if len(values) * 2 >= len(runs)}
    return dict(sorted(usual.items(), key=lambda item: statistics.median(item[1])))


def rows(found: Mapping[str, Sequence[float]]) -> list[tuple[str, float, float]]:
    """Mark, median since the beginning, and what of it came after the mark before."""
    result: list[tuple[str, float, float]] = []
    before = 0.0
    for name, values in found.items():
        at = statistics.median(values)
        result.append((name, at, at - before))
        before = at
    return result


def text(found: Sequence[tuple[str, float, float]]) -> str:
    width = max(len(name) for name, _, _ in found)
    lines = [f"{'':<{width}}  {'at ms':>8}  {'+ ms':>8}"]
    lines += [f"{name:<{width}}  {at:8.2f}  {more:8.2f}  {'#' * round(more)}" for name, at, more in found]
    return "\n".join(lines)


@contextlib.contextmanager
def traced(file: Path) -> Iterator[None]:
    """Daemon and commands write their marks to ``file``."""
    restart_daemon()
    os.environ["ISOLAT_TRACE"] = str(file)
    try:
        yield
    finally:
        del os.environ["ISOLAT_TRACE"]
        restart_daemon()


def restart_daemon() -> None:
    """End the daemon; the next command starts one with its own environment. What runs is not touched."""
    root = str(subject.root())
    try:
        sock = connect.reach(root)
    except OSError:
        return
    request = connect.Call(sock, "shutdown", {})
    request.result()
    request.close()
    end = time.monotonic() + GONE_S
    while time.monotonic() < end:
        try:
            connect.reach(root).close()
        except OSError:
            return
        time.sleep(0.02)
    raise lib.BenchError("the daemon did not end")


def take(argv: Sequence[str], file: Path) -> Run:
    """One run and its marks."""
    file.write_text("")
    begin = time.monotonic_ns()
    lib.spend(argv)
    end = time.monotonic_ns()
    marks = [(BEGIN, begin), *parse(file.read_text()), (END, end)]
    return [(name, (at - begin) / 1e6) for name, at in marks]


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    argv = subject.argv("run", "--rm", "--layer", options.layer, options.image, "true")
    with tempfile.TemporaryDirectory(prefix="isolat-bench-") as directory:
        file = Path(directory) / "trace"
        with traced(file):
            for _ in range(lib.WARM_UPS):
                paused(options.pause, argv, file)
            return offsets([paused(options.pause, argv, file) for _ in range(options.runs)])


def paused(pause_s: float, argv: Sequence[str], file: Path) -> Run:
    """One run after a pause, in which what is made in the background ends: its marks are not this run's."""
    time.sleep(pause_s)
    return take(argv, file)


def main(argv: list[str] | None = None) -> int:
    parser = lib.parser(__doc__)
    parser.add_argument("--image", default=subject.IMAGE, help="the image to run (default %(default)s)")
    parser.add_argument("--layer", default="container", help="the layer or stack (default %(default)s)")
    parser.add_argument("--pause", type=float, default=0.0, metavar="S", help="seconds before each run (default 0)")
    options = parser.parse_args(argv)
    found = rows(measure(options))
    if options.json:
        print(json.dumps([{"mark": name, "at_ms": at, "more_ms": more} for name, at, more in found], indent=1))
    else:
        print(f"profile_run, medians of {options.runs}, on {lib.machine_line()}")
        print(text(found))
    return 0


if __name__ == "__main__":
    sys.exit(lib.guarded(main))
