"""Every help text, as one golden file; ``ISOLAT_GOLDEN=write`` writes it anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isolat.cli import help, verbs
from isolat.cli.main import main
from isolat.errors import UsageError

GOLDEN = Path(__file__).parents[2] / "golden" / "help.txt"


def every_help() -> str:
    names = ["", *sorted(verbs.GROUPS), *verbs.VERBS]
    return "\n".join(f"$ isolat {name} --help".replace("  ", " ") + "\n" + help.text(name) for name in names)


def test_the_texts_are_as_reviewed() -> None:
    if os.environ.get("ISOLAT_GOLDEN") == "write":
        GOLDEN.write_text(every_help())
    assert every_help() == GOLDEN.read_text()


def test_no_line_is_wider_than_a_terminal() -> None:
    assert [line for line in every_help().splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("words", [[], ["--help"], ["run", "-h"], ["help", "run"], ["system", "reset", "--help"]])
def test_help_is_printed_and_is_no_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("usage: isolat")


def test_help_of_what_is_no_verb() -> None:
    with pytest.raises(UsageError, match="no help for x"):
        help.text("x")
