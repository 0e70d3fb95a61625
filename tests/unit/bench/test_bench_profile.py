"""From marks of many runs to where the time goes; and the marks themselves."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from bench import profile_run as profile

SOURCE = Path(__file__).resolve().parents[3] / "src"
MARKS = "from isolat.trace import mark\nmark('one')\nmark('two')\n"


def run(code: str, **env: str) -> str:
    argv = [sys.executable, "-S", "-c", code]
    done = subprocess.run(argv, env={"PYTHONPATH": str(SOURCE), **env}, capture_output=True, text=True, check=True)
    return done.stdout


def test_marks_are_read_in_the_order_of_time_and_repeated_names_told_apart() -> None:
    assert profile.parse("b 20 1\na 10 1\nb 30 2\nbroken\n") == [("a", 10), ("b", 20), ("b#2", 30)]


def test_offsets_leave_out_what_few_runs_passed() -> None:
    runs = [[("a", 1.0), ("b", 5.0)], [("a", 3.0), ("b", 7.0), ("rare", 4.0)], [("a", 2.0), ("b", 6.0)]]
    assert profile.offsets(runs) == {"a": [1.0, 3.0, 2.0], "b": [5.0, 7.0, 6.0]}


def test_rows_have_what_came_after_the_mark_before() -> None:
    assert profile.rows({"a": [2.0], "b": [6.0, 8.0, 7.0]}) == [("a", 2.0, 2.0), ("b", 7.0, 5.0)]


def test_a_mark_is_a_line_with_its_time(tmp_path: Path) -> None:
    before = time.monotonic_ns()
    run(MARKS, ISOLAT_TRACE=str(tmp_path / "trace"))
    marks = profile.parse((tmp_path / "trace").read_text())
    assert [name for name, _ in marks] == ["one", "two"]
    assert before <= marks[0][1] <= marks[1][1] <= time.monotonic_ns()


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    for _ in range(2):
        run(MARKS, ISOLAT_TRACE=str(tmp_path / "trace"))
    assert len((tmp_path / "trace").read_text().splitlines()) == 4


def test_without_the_variable_or_with_a_bad_path_a_mark_does_nothing(tmp_path: Path) -> None:
    run(MARKS)
    run(MARKS, ISOLAT_TRACE=str(tmp_path / "absent" / "trace"))
    assert list(tmp_path.iterdir()) == []


def test_marks_import_nothing_that_is_not_built_in() -> None:
    code = "import sys; before = set(sys.modules); import isolat.trace; print(*sorted(set(sys.modules) - before))"
    assert set(run(code).split()) <= {"__future__", "isolat", "isolat.trace", "time", "posix"}
