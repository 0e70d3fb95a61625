"""Many microVMs at once, most of them parked: how quickly they start and answer, what each costs, and that all go."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.integration.test_microvm import pipe_through
from tests.support import traces
from tests.support.microvms import anonymous_mib, cpu_s, is_parked, machines, qemu, spec
from tests.support.roots import REPOSITORY, Root

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800)]

AT_ONCE = 2
PARK_S = 2
MEMORY_MIB = 40.0
ANSWER_MS = 30.0
LATE_MOST = 1  # something else runs on every machine now and then
ASKED = 20
EXERCISED = 2
LOOK_S = 5.0


@dataclass(frozen=True)
class Figures:
    """What was measured. Memory is anonymous memory of each QEMU, without what it shares with its template."""

    machines: int
    started_per_s: float
    parked: int
    memory_mib_median: float
    memory_mib_most: float
    available_mib_each: float
    first_ms_median: float  # the first exec in a machine's life
    first_ms_most: float
    late: int  # of first and further ones together, those that took longer than promised
    answer_ms_median: float
    answer_ms_most: float
    cpu_share: float
    removed_per_s: float

    def table(self) -> str:
        rows = (
            ("microVMs at once", f"{self.machines}", ""),
            ("started per second", f"{self.started_per_s:.2f}", ""),
            ("of them parked", f"{self.parked}", "most"),
            ("anonymous memory each", f"{self.memory_mib_median:.1f} MiB", f"at most {MEMORY_MIB:g} MiB"),
            ("of the largest", f"{self.memory_mib_most:.1f} MiB", ""),
            ("the host has less, each", f"{self.available_mib_each:.1f} MiB", ""),
            ("first exec, parked", f"{self.first_ms_median:.1f} ms", ""),
            (f"the slowest of {ASKED}", f"{self.first_ms_most:.1f} ms", ""),
            ("further ones, parked", f"{self.answer_ms_median:.1f} ms", ""),
            (f"the slowest of {ASKED}", f"{self.answer_ms_most:.1f} ms", ""),
            (f"slower than {ANSWER_MS:g} ms", f"{self.late}", f"at most {LATE_MOST} of {2 * ASKED}"),
            ("CPU while all are parked", f"{100 * self.cpu_share:.2f} %", "of one processor"),
            ("removed per second", f"{self.removed_per_s:.1f}", ""),
        )
        return "\n".join(f"{name:<26}{value:>14}   {promised}".rstrip() for name, value, promised in rows)


def measure(root: Root, count: int) -> Figures:
    """Start so many, let them be parked, ask some, remove all. Asserts that all are there, and afterwards gone."""
    root.ensure_daemon()
    asked = spec("sleep", "infinity", x_microvm={"park_s": PARK_S})
    root.ask(
        "rm", {"env": root.run_detached(asked), "force": True}
    )  # the template is booted, and behind it the image's
    _until_image_template(root)
    before = _available_mib()
    with ThreadPoolExecutor(AT_ONCE) as users:
        began = time.monotonic()
        ids = list(users.map(lambda _: root.run_detached(asked), range(count)))
        rate = count / (time.monotonic() - began)
        assert len(set(ids)) == count
        pids = [qemu(root, id) for id in ids]
        _until_all_parked(pids)
        memory = [anonymous_mib(pid) for pid in pids]
        available = (before - _available_mib()) / count
        share, parked = _cpu_share(pids), sum(map(is_parked, pids))
        some = ids[:: max(1, count // ASKED)][:ASKED]
        first = _answers_ms(root, some)
        for _ in range(EXERCISED):
            _answers_ms(root, some)
        answers = _answers_ms(root, some)
        assert {root.state(id) for id in ids} == {"running"}
        began = time.monotonic()
        list(users.map(lambda id: root.ask("rm", {"env": id, "force": True}), ids))
        removed = count / (time.monotonic() - began)
    root.close_all()
    assert root.environments() == []
    assert traces.none_of_environments(root.path, 20) == []
    assert machines(root) == []
    return Figures(
        count,
        rate,
        parked,
        statistics.median(memory),
        max(memory),
        available,
        statistics.median(first),
        max(first),
        sum(ms > ANSWER_MS for ms in (*first, *answers)),
        statistics.median(answers),
        max(answers),
        share,
        removed,
    )


def _available_mib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024


def _until_image_template(root: Root) -> None:
    end = time.monotonic() + 30
    while not any(row["image"] for row in root.ask("templates")["templates"]):
        assert time.monotonic() < end, "there is no template of the image"
        time.sleep(0.1)


def _until_all_parked(pids: list[int]) -> None:
    """Each is asked when it was silent for ``PARK_S``; one that was busy just then, later and later."""
    end = time.monotonic() + 60
    while not all(map(is_parked, pids)) and time.monotonic() < end:
        time.sleep(0.2)


def _cpu_share(pids: list[int]) -> float:
    """What all of them use together, of one processor."""
    before = sum(map(cpu_s, pids))
    time.sleep(LOOK_S)
    return (sum(map(cpu_s, pids)) - before) / LOOK_S


def _answers_ms(root: Root, ids: list[str]) -> list[float]:
    """Of each, once all of them are parked."""
    _until_all_parked([qemu(root, id) for id in ids])
    return [_answer_ms(root, id) for id in ids]


def _answer_ms(root: Root, id: str) -> float:
    """From asking a machine that is parked for an exec of ``true`` until its end is known."""
    began = time.monotonic()
    assert root.exec(id, ["true"]).ended() == 0
    return (time.monotonic() - began) * 1000


@pytest.fixture
def crowd_root(fresh_root: Root) -> Iterator[Root]:
    fresh_root.start_daemon()
    yield fresh_root


def test_twelve_microvms_are_there_and_then_gone(crowd_root: Root) -> None:
    figures = measure(crowd_root, 12)
    assert figures.memory_mib_median <= MEMORY_MIB
    assert figures.parked == 12
    assert figures.cpu_share < 0.01


@pytest.mark.soak
def test_three_hundred_microvms_as_promised(crowd_root: Root) -> None:
    figures = measure(crowd_root, 300)
    results = REPOSITORY / "bench" / "results"
    results.mkdir(exist_ok=True)
    about = {"kernel": os.uname().release, "cpus": os.cpu_count(), **asdict(figures)}
    (results / "microvms.json").write_text(json.dumps(about, indent=1) + "\n")
    (results / "microvms.txt").write_text(figures.table() + "\n")
    print(f"\n{figures.table()}")
    assert figures.parked >= 290
    assert figures.memory_mib_median <= MEMORY_MIB
    assert figures.late <= LATE_MOST


@pytest.mark.soak
def test_a_gibibyte_comes_through_a_machine_unchanged(crowd_root: Root, tmp_path: Path) -> None:
    seconds = pipe_through(crowd_root, tmp_path, 1024)
    print(f"\n1 GiB in and out in {seconds:.1f} s: {(1 << 30) / 1e6 / seconds:.1f} MB/s")
