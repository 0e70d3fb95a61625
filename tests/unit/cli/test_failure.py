"""What a user sees of an error: message, details, hint; never a traceback, never a control character."""

from __future__ import annotations

from pathlib import Path

import pytest

from isolat.cli import failure
from isolat.cli.main import main
from isolat.errors import CommandNotFound, InternalError, IsolatError, NotExecutable, NotFound, SpecError


def test_message_details_and_hint() -> None:
    error = IsolatError("it failed", details=("first\nsecond", "third"), hint="do this", stage="mounting")
    assert failure.render(error) == [
        "isolat: it failed (while: mounting)",
        "  first",
        "  second",
        "  third",
        "  hint: do this",
    ]


def test_a_spec_error_of_run_names_options() -> None:
    error = SpecError(
        "the spec has 3 errors", details=(".mem_limit: too small", ".environment.A: x", ".volumes[0]: y", ".x-fake: z")
    )
    assert failure.render(error, "run")[1:] == ["  --memory: too small", "  --env: x", "  --volume: y", "  .x-fake: z"]
    assert failure.render(error)[1] == "  .mem_limit: too small"


@pytest.mark.parametrize(
    ("error", "code"),
    [(NotFound("x"), 125), (NotExecutable("x"), 126), (CommandNotFound("x"), 127), (InternalError("x"), 125)],
)
def test_exit_codes(error: IsolatError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure.tell(error) == code
    assert capsys.readouterr().err == "isolat: x\n"


def test_control_characters_cannot_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    failure.tell(NotFound("no \x1b[31m\r such\udcff"))
    assert capsys.readouterr().err == "isolat: no \\x1b[31m\\x0d such\\xdcff\n"


def test_a_defect_is_one_line_and_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert failure.tell(ValueError("oops")) == 125
    shown = capsys.readouterr().err
    assert "isolat: a defect of Isolat: ValueError: oops" in shown
    assert "Traceback" not in shown
    (report,) = tmp_path.iterdir()
    assert "ValueError: oops" in report.read_text()
    assert str(report) in shown


def test_an_operating_system_error_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert failure.tell(FileNotFoundError(2, "No such file or directory", "/x")) == 125
    assert capsys.readouterr().err == "isolat: /x: No such file or directory\n"


def test_a_usage_error_ends_with_125(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--nmae", "x", "debian"]) == 125
    assert capsys.readouterr().err == ("isolat: run: unknown option --nmae\n  hint: did you mean --name?\n")
