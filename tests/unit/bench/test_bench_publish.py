"""What a bench kept comes into the docs as it was printed, in its own place, and nothing else of them changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import lib, publish

PAGE = """# Promises

<!-- figures: bench/a.py -->
old
<!-- end of figures -->

<!-- figures: bench/b.py -->
b's
<!-- end of figures -->
"""


def kept(name: str, median: float) -> lib.Report:
    report = lib.Report(
        name, series=[lib.Series("ours", (median,)), lib.Series("theirs", (2 * median,))], base="theirs"
    )
    report.figures["images"] = 3
    report.promises.append(lib.Promise("ours", median, 10, unit=" ms"))
    report.versions["accelerator"] = "tcg (of these: reasons)"
    return report


@pytest.fixture(autouse=True)
def _own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib, "RESULTS", tmp_path / "results")


def test_a_result_takes_the_place_of_the_one_before(capsys: pytest.CaptureFixture[str]) -> None:
    lib.finish(kept("a", 5.0), as_json=False)
    text = publish.placed(PAGE, publish.newest("a"))
    assert "old" not in text and text.endswith(PAGE[PAGE.index("<!-- figures: bench/b.py") :])
    assert "| ours   |  5.0 ms |   5.0 to 5.0 |  5.0 |    1 |    0.500 |" in text
    assert "- met ours: 5 ms (promised <= 10 ms)" in text and "- images: 3" in text
    assert "accelerator tcg\n" in text
    assert publish.placed(text, publish.newest("a")) == text
    capsys.readouterr()


def test_a_new_one_stands_at_the_end() -> None:
    found = json.loads(json.dumps(kept("c", 20.0).to_json()))
    text = publish.placed(PAGE, found)
    assert text.startswith(PAGE.rstrip()) and text.endswith("<!-- end of figures -->\n")
    assert "- MISSED ours: 20 ms (promised <= 10 ms)" in text


def test_the_newest_is_taken(tmp_path: Path) -> None:
    lib.RESULTS.mkdir()
    for stamp, value in (("20260102T000000Z", 2), ("20260101T000000Z", 1)):
        (lib.RESULTS / f"a-{stamp}.json").write_text(json.dumps({"value": value}))
    assert publish.newest("a")["value"] == 2


def test_without_a_result_it_is_said_which_bench_to_run() -> None:
    with pytest.raises(lib.BenchError, match=r"python -m bench\.a"):
        publish.newest("a")
