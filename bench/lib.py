"""What every bench shares: series that are paired in one run, their medians and ratios, promises, a table and JSON.

A machine's speed changes from minute to minute, so two figures are comparable only when they were taken in turns.
``interleave`` takes one sample of every series per round, and what is promised is a ratio or a difference of medians of
one run, never a bare figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isolat.errors import IsolatError

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UPS = 3
PAUSE_S = 0.05

Sample = Callable[[], float]  # does the thing once and says how long it took, in milliseconds


class BenchError(Exception):
    """The bench could not measure: something failed that has nothing to do with speed."""


@dataclass(frozen=True)
class Series:
    """The samples of one thing, in one unit."""

    name: str
    samples: tuple[float, ...]
    unit: str = "ms"

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return (self.samples[0], self.samples[0])
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (low, high)

    def to_json(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {
            "unit": self.unit,
            "runs": len(self.samples),
            "median": round(self.median, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "min": round(min(self.samples), 3),
            "max": round(max(self.samples), 3),
            "samples": [round(sample, 3) for sample in self.samples],
        }


@dataclass(frozen=True)
class Promise:
    """One limit and whether it is met: ``value`` at most (or at least) ``limit``."""

    text: str
    value: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "MISSED"
        return f"{verdict} {self.text}: {self.value:.4g}{self.unit} (promised {sign} {self.limit:g}{self.unit})"


@dataclass
class Report:
    """What one run of a bench found."""

    bench: str
    series: list[Series] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    promises: list[Promise] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # what was not measured, and why
    versions: dict[str, str] = field(default_factory=dict)
    base: str = ""  # the series that the table's ratios are of

    def of(self, name: str) -> Series:
        return next(series for series in self.series if series.name == name)

    def has(self, *names: str) -> bool:
        return set(names) <= {series.name for series in self.series}

    @property
    def kept(self) -> bool:
        """True when everything was measured and every promise is met."""
        return not self.missing and all(promise.met for promise in self.promises)

    def to_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(),
            "versions": self.versions,
            "series": {series.name: series.to_json() for series in self.series},
            "figures": {name: round(value, 4) for name, value in self.figures.items()},
            "promises": [asdict(promise) | {"met": promise.met} for promise in self.promises],
            "missing": self.missing,
            "base": self.base,
            "kept": self.kept,
        }

    def text(self) -> str:
        lines = [f"{self.bench} on {machine_line()}"]
        lines += [f"  {name} {version}" for name, version in self.versions.items()]
        if self.series:
            lines += ["", table(self.series, self.base)]
        lines += [f"  {name}: {value:.4g}" for name, value in self.figures.items()]
        lines += [f"not measured: {name}: {why}" for name, why in self.missing.items()]
        lines += [promise.line() for promise in self.promises]
        return "\n".join(lines)


def table(series: Sequence[Series], base: str = "") -> str:
    """Median, quartiles, least, number, and the ratio of medians to ``base``; Markdown, for docs/promises.md."""
    reference = next((one for one in series if one.name == base), None)
    head = ("", "median", "quartiles", "min", "runs", f"/ {base}" if reference else "")
    body = [_row(one, reference) for one in series]
    widths = [max(3, *(len(row[n]) for row in (head, *body))) for n in range(len(head))]
    rule = tuple("-" * (width - 1) + (":" if n else "-") for n, width in enumerate(widths))
    return "\n".join(_line(row, widths) for row in (head, rule, *body))


def _row(one: Series, base: Series | None) -> tuple[str, ...]:
    low, high = one.quartiles
    ratio = f"{one.median / base.median:.3f}" if base and base.median and base.unit == one.unit else ""
    spread = f"{low:.1f} to {high:.1f}"
    return (one.name, f"{one.median:.1f} {one.unit}", spread, f"{min(one.samples):.1f}", str(len(one.samples)), ratio)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        cell.rjust(width) if n else cell.ljust(width) for n, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return f"| {' | '.join(cells)} |"


def interleave(
    what: Mapping[str, Sample], runs: int, warm_ups: int = WARM_UPS, pause_s: float | None = None
) -> list[Series]:
    """Take ``runs`` samples of each in turns, after ``warm_ups`` rounds that don't count.

    Each round has an order of its own (shuffled, the same in every run of the bench), and a pause (``pause_s``, else
    ``PAUSE_S``) stands before each sample: what one leaves to be tidied up in the background must not fall on the next.
    """
    found: dict[str, list[float]] = {name: [] for name in what}
    for number in range(-warm_ups, runs):
        for name in _order(list(what), number):
            time.sleep(PAUSE_S if pause_s is None else pause_s)
            sample = what[name]()
            if number >= 0:
                found[name].append(sample)
    return [Series(name, tuple(samples)) for name, samples in found.items()]


def _order(names: list[str], number: int) -> list[str]:
    random.Random(number).shuffle(names)
    return names


def spend(argv: Sequence[str], env: Mapping[str, str] | None = None) -> float:
    """Run a command that must end with 0 and say little; milliseconds from before its start to after its end."""
    start = time.perf_counter_ns()
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, check=False
    )
    taken = (time.perf_counter_ns() - start) / 1e6
    _must_succeed(argv, done.returncode, done.stderr)
    return taken


def spend_to(argv: Sequence[str], errors: Path) -> float:
    """As ``spend``, for a command that leaves something behind that keeps its standard error open."""
    with errors.open("w+b") as file:
        start = time.perf_counter_ns()
        code = subprocess.call(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)
        taken = (time.perf_counter_ns() - start) / 1e6
        file.seek(0)
        _must_succeed(argv, code, file.read())
    return taken


def _must_succeed(argv: Sequence[str], code: int, said: bytes) -> None:
    if code:
        tail = said.decode(errors="replace").strip()[-800:]
        raise BenchError(f"{' '.join(argv)} ended with {code}: {tail}")


def ratio(report: Report, over: str, under: str) -> float:
    return report.of(over).median / report.of(under).median


def difference(report: Report, more: str, less: str) -> float:
    return report.of(more).median - report.of(less).median


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count() or 0,
        "memory_mib": meminfo("MemTotal") >> 20,
        "kernel": platform.release(),
        "system": _system(),
        "load": round(os.getloadavg()[0], 2),
    }
    return found | {"virtual": "hypervisor" in _cpu_field("flags").split()}


def machine_line() -> str:
    return machine_words(machine())


def machine_words(it: Mapping[str, Any]) -> str:
    """What ``machine`` found, in one line."""
    kind = "a virtual machine" if it["virtual"] else "a machine"
    return (
        f"{kind}: {it['cpus']} x {it['cpu']}, {it['memory_mib']} MiB, Linux {it['kernel']}, {it['system']}, "
        f"load {it['load']}"
    )


def _cpu_field(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpu_field("model name") or platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def meminfo(name: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise BenchError(f"/proc/meminfo has no {name}")


def version(*argv: str) -> str:
    """The first line that a program says about itself; empty when it can't be run."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else ""


def _positive(text: str) -> int:
    runs = int(text)
    if runs < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return runs


def parser(doc: str | None, runs: int = 30) -> argparse.ArgumentParser:
    """The options that every bench has."""
    made = argparse.ArgumentParser(description=(doc or "").strip().splitlines()[0])
    made.add_argument("--runs", type=_positive, default=runs, metavar="N", help=f"samples of each (default {runs})")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return made


def finish(report: Report, *, as_json: bool) -> int:
    """Print, keep in bench/results, and say by the exit code whether every promise is met."""
    found = report.to_json()
    RESULTS.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    (RESULTS / f"{report.bench}-{stamp}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1) if as_json else report.text())
    for promise in report.promises:
        if not promise.met:
            print(f"{report.bench}: {promise.line()}", file=sys.stderr)
    return 0 if report.kept else 1


def guarded(main: Callable[[], int]) -> int:
    """The exit code of a bench: 2 when it could not measure, so that this is never taken for a missed promise."""
    try:
        return main()
    except (BenchError, IsolatError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
