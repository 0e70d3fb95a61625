"""``cp``: what is in an environment and what is the caller's."""

from __future__ import annotations

import pytest

from isolat.cli import files, options
from isolat.errors import UsageError


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("web:/etc", ("web", "/etc")),
        ("web:etc", ("web", "etc")),
        ("web:/a:b", ("web", "/a:b")),
        ("/etc", ("", "/etc")),
        ("etc", ("", "etc")),
        ("-", ("", "-")),
        ("./a:b", ("", "./a:b")),
        ("../a:b", ("", "../a:b")),
        ("/a:b", ("", "/a:b")),
        ("dir/a:b", ("", "dir/a:b")),
        (":/etc", ("", ":/etc")),
    ],
)
def test_where_a_word_is(word: str, place: tuple[str, str]) -> None:
    assert files._place(word) == place


@pytest.mark.parametrize(("words", "why"), [(("a:/x", "b:/x"), "both are"), (("x", "./y:z"), "neither is")])
def test_one_end_is_inside_and_one_is_not(words: tuple[str, str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        files.cp(options.parse(["cp", *words]))
