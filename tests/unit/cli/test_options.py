"""The command line is read as Docker reads it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.cli import options as o
from isolat.cli import verbs
from isolat.errors import UsageError


def values(*words: str) -> dict[str, Any]:
    return o.parse(list(words)).values


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-it", "x"], {"interactive": True, "tty": True}),
        (["-itd", "--rm", "x"], {"interactive": True, "tty": True, "detach": True, "rm": True}),
        (["--rm=false", "x"], {"rm": False}),
        (["--name", "web", "x"], {"name": "web"}),
        (["--name=web", "x"], {"name": "web"}),
        (["-m64m", "x"], {"memory": "64m"}),
        (["-m=64m", "x"], {"memory": "64m"}),
        (["-itm", "64m", "x"], {"interactive": True, "tty": True, "memory": "64m"}),
        (["-e", "A=1", "-e", "B", "x"], {"env": ["A=1", "B"]}),
        (["-e", "-x=1", "x"], {"env": ["-x=1"]}),
        (["--env=A==", "x"], {"env": ["A=="]}),
        (["--runtime", "host", "x"], {"layer": "host"}),
        (["--layer", "a/b", "x"], {"layer": "a/b"}),
        (["--net", "host", "x"], {"network": "host"}),
        (["--root", "/r", "x"], {"root": "/r"}),
        (["--name", "", "x"], {"name": ""}),
    ],
)
def test_options_of_run(words: list[str], expected: dict[str, Any]) -> None:
    assert values("run", *words) == expected


def test_options_of_run_end_at_the_image() -> None:
    parsed = o.parse(["run", "--rm", "debian", "ls", "-l", "--rm", "--", "x"])
    assert parsed.values == {"rm": True}
    assert parsed.words == ["debian", "ls", "-l", "--rm", "--", "x"]


def test_options_of_exec_end_at_the_environment() -> None:
    parsed = o.parse(["exec", "-i", "web", "sh", "-c", "true"])
    assert parsed.words == ["web", "sh", "-c", "true"]


def test_two_dashes_end_options_anywhere() -> None:
    assert o.parse(["rm", "-f", "--", "-odd-", "b"]).words == ["-odd-", "b"]
    assert o.parse(["run", "--", "debian"]).words == ["debian"]


def test_options_of_other_verbs_stand_anywhere() -> None:
    parsed = o.parse(["logs", "web", "-f", "--tail", "5"])
    assert parsed.words == ["web"]
    assert parsed.values == {"follow": True, "tail": "5"}


def test_the_root_stands_before_or_behind_the_verb() -> None:
    assert values("--root", "/r", "ps") == {"root": "/r"}
    assert values("ps", "--root=/r") == {"root": "/r"}
    assert values("--root", "/a", "ps", "--root", "/b") == {"root": "/b"}


def test_verbs_of_two_words() -> None:
    assert o.parse(["system", "reset", "-f"]).verb.name == "system reset"
    assert values("system", "reset", "--yes") == {"yes": True}
    assert o.parse(["image", "bootstrap", "debian"]).words == ["debian"]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["run", "--memroy", "1g", "x"], "run: unknown option --memroy", "did you mean --memory?"),
        (["run", "-z", "x"], "run: unknown option -z", "see `isolat run --help`"),
        (["run", "-rm", "x"], "run: unknown option -rm", "did you mean --rm?"),
        (["run", "-ix", "x"], "run: unknown option -x", "see `isolat run --help`"),
        (["run", "--name"], "run: --name needs a value: --name NAME", ""),
        (["run", "-m"], "run: -m needs a value: -m SIZE", ""),
        (["run", "--rm=1", "x"], "run: --rm takes no value, or true or false", ""),
        (["run"], "run: too few words", "isolat run [OPTIONS] IMAGE [COMMAND…]"),
        (["exec", "web"], "exec: too few words", "isolat exec [OPTIONS] ENV COMMAND…"),
        (["ps", "web"], "ps: unexpected: web", "isolat ps [OPTIONS]"),
        (["pss"], "unknown verb: pss", "did you mean ps?"),
        (["frobnicate"], "unknown verb: frobnicate", "`isolat --help` lists them"),
        (["system", "rest"], "unknown verb: system rest", "did you mean system reset?"),
        (["--rot", "x"], "unknown option --rot", "did you mean --root?"),
    ],
)
def test_what_is_wrong_is_said_with_what_was_meant(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        o.parse(words)
    assert caught.value.message == message
    assert caught.value.hint == hint


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"], ["run", "--help"], ["system"], ["image", "-h"]])
def test_help_is_asked_for_in_many_ways(words: list[str]) -> None:
    assert o.parse(words).verb is o.HELP


def test_no_option_is_given_twice_in_one_verb() -> None:
    for verb in verbs.VERBS.values():
        names = [name for option in (*verb.options, *o.COMMON) for name in option.names]
        assert len(names) == len(set(names)), verb.name


def test_every_verb_has_its_function() -> None:
    for verb in (*verbs.VERBS.values(), o.HELP):
        module, _, name = verb.target.partition(":")
        assert callable(getattr(__import__(f"isolat.cli.{module}", fromlist=[name]), name)), verb.name


@given(
    st.lists(
        st.sampled_from(["run", "exec", "ps", "-it", "-e", "--rm", "--", "-", "--name=", "x", "", "--=", "-=", "ü"])
    )
)
def test_any_words_are_read_or_refused(words: list[str]) -> None:
    try:
        o.parse(words)
    except UsageError:
        pass
