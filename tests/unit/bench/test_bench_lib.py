"""What benches conclude from samples: medians, ratios, promises, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import lib


def report(**medians: float) -> lib.Report:
    return lib.Report("x", series=[lib.Series(name, (value,)) for name, value in medians.items()])


@pytest.fixture(autouse=True)
def _own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(lib, "PAUSE_S", 0.0)


def test_every_series_is_sampled_once_a_round() -> None:
    order: list[str] = []

    def sample(name: str) -> lib.Sample:
        def take() -> float:
            order.append(name)
            return float(len(order))

        return take

    found = lib.interleave({name: sample(name) for name in "abc"}, runs=4, warm_ups=1)
    assert [sorted(order[at : at + 3]) for at in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert [len(one.samples) for one in found] == [4, 4, 4]


def test_warm_ups_do_not_count() -> None:
    values = iter([100.0, 100.0, 1.0, 2.0])
    (found,) = lib.interleave({"a": lambda: next(values)}, runs=2, warm_ups=2)
    assert found.samples == (1.0, 2.0)


def test_the_order_differs_between_rounds_and_not_between_runs_of_the_bench() -> None:
    orders = [tuple(lib._order(list("abcd"), number)) for number in range(8)]
    assert len(set(orders)) > 1
    assert orders == [tuple(lib._order(list("abcd"), number)) for number in range(8)]


def test_median_and_quartiles() -> None:
    series = lib.Series("a", (4.0, 1.0, 3.0, 2.0, 100.0))
    assert (series.median, series.quartiles) == (3.0, (2.0, 4.0))
    assert lib.Series("one", (5.0,)).quartiles == (5.0, 5.0)


def test_ratio_and_difference_are_of_medians() -> None:
    found = report(isolat=50.0, docker=250.0)
    assert lib.ratio(found, "isolat", "docker") == 0.2
    assert lib.difference(found, "docker", "isolat") == 200.0


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(0.2, False, True), (0.21, False, False), (0.2, True, True), (0.19, True, False)]
)
def test_a_promise_is_met_up_to_its_limit(value: float, at_least: bool, met: bool) -> None:
    promise = lib.Promise("x", value, 0.2, at_least=at_least)
    assert promise.met is met
    assert ("MISSED" in promise.line()) is not met


def test_a_missed_promise_is_exit_code_1_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(a=1.0)
    found.promises = [lib.Promise("a is quick", 2.0, 1.0), lib.Promise("a is small", 1.0, 1.0)]
    assert lib.finish(found, as_json=False) == 1
    said = capsys.readouterr().err
    assert "a is quick" in said
    assert "a is small" not in said


def test_what_was_not_measured_is_no_success() -> None:
    found = report(a=1.0)
    found.missing["docker"] = "not installed"
    assert lib.finish(found, as_json=False) == 1


def test_a_bench_that_could_not_measure_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise lib.BenchError("no image")

    assert lib.guarded(fails) == 2
    assert "no image" in capsys.readouterr().err


def test_results_are_kept_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert lib.finish(report(a=1.5), as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    (kept,) = lib.RESULTS.glob("x-*.json")
    assert json.loads(kept.read_text()) == printed
    assert printed["series"]["a"]["samples"] == [1.5]
    assert {"cpu", "cpus", "kernel", "memory_mib", "system"} <= printed["machine"].keys()


def test_the_table_has_the_ratio_to_its_base() -> None:
    found = report(isolat=50.0, docker=250.0)
    lines = lib.table(found.series, "docker").splitlines()
    assert lines[2].split("|")[1].strip() == "isolat"
    assert lines[2].split("|")[-2].strip() == "0.200"
    assert len({len(line) for line in lines}) == 1


def test_a_command_that_fails_is_no_sample() -> None:
    assert lib.spend(["true"]) > 0
    with pytest.raises(lib.BenchError, match="ended with 3: why"):
        lib.spend(["sh", "-c", "echo why >&2; exit 3"])


def test_the_standard_error_of_a_failure_is_told_from_a_file_too(tmp_path: Path) -> None:
    assert lib.spend_to(["true"], tmp_path / "errors") > 0
    with pytest.raises(lib.BenchError, match="ended with 4: because"):
        lib.spend_to(["sh", "-c", "echo because >&2; exit 4"], tmp_path / "errors")
