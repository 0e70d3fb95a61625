"""Which images a Containerfile stands on: stages, variables, continued lines, and what is left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.errors import IsolatError, UsageError
from isolat.images.building.containerfile import Base, bases, has_heredoc, substitute
from isolat.images.oci import Platform

AMD64 = Platform("linux", "amd64")


def names(text: str, target: str = "", **arguments: str) -> list[str]:
    return [base.name for base in bases(text, arguments, target, AMD64)]


def test_one_stage_stands_on_what_its_from_names() -> None:
    assert names("FROM debian\nRUN true\n") == ["debian"]


@pytest.mark.parametrize(
    "text",
    [
        "from debian",
        "  FROM   debian:latest  AS  x ".replace(":latest", ""),
        "\ufeffFROM debian",
        "# a comment\n\nFROM debian",
        "FROM --platform=linux/amd64 debian AS x",
        "FROM \\\n  debian",
        "FROM \\\n# a comment\n\n  debian \\\n  AS x",
        "# escape=`\nFROM `\n debian",
        'FROM "debian"',
        "FROM debian\r\nRUN true\r\n",
        "FROM \\\r\n debian\r\n",
        "FROM debian\nRUN a\x0cFROM other\x85FROM other\u2028FROM other\n",
    ],
)
def test_the_same_from_in_other_spellings(text: str) -> None:
    assert names(text) == ["debian"]


def test_what_was_written_is_kept_beside_what_it_means() -> None:
    assert bases("ARG V=12\nFROM debian:${V}\n", {}) == [Base("debian:${V}", "debian:12")]


def test_arguments_before_the_first_stage_count_in_from() -> None:
    text = "ARG NAME=debian\nARG TAG\nFROM $NAME:${TAG:-12}\nARG NAME=other\nFROM $NAME AS b\nCOPY --from=0 / /\n"
    assert names(text) == ["debian", "debian:12"] or names(text) == ["debian:12", "debian"]
    assert names(text, TAG="13", NAME="x") == ["x:13", "x"]


def test_an_argument_nobody_declares_is_empty_and_a_from_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="names no image"):
        names("FROM $NAME\n", NAME="debian")
    assert names("ARG NAME\nFROM $NAME\n", NAME="debian") == ["debian"]


def test_the_platform_is_known_as_buildkit_names_it() -> None:
    text = "FROM base-$TARGETARCH\n"
    assert [base.name for base in bases(text, {}, "", Platform("linux", "arm64"))] == ["base-arm64"]


def test_stages_are_no_images() -> None:
    text = "FROM debian AS build\nFROM scratch\nCOPY --from=build /a /b\nCOPY --from=0 /c /d\nCOPY --from=BUILD /e /f\n"
    assert names(text) == ["debian"]


def test_a_stage_may_be_called_as_its_image() -> None:
    assert names("FROM debian AS debian\nFROM debian\n") == ["debian"]
    assert names("FROM alpine AS debian\nFROM scratch\nCOPY --from=debian / /\n") == ["alpine"]


def test_a_later_stage_is_no_stage_yet() -> None:
    assert names("FROM a AS one\nCOPY --from=two / /\nFROM one AS two\n") == ["a", "two"]


def test_copies_and_mounts_from_images_count() -> None:
    text = (
        "FROM scratch\nCOPY --chown=1:1 --from=tools:1 /a /b\nADD --from=more /a /b\n"
        "RUN --mount=type=bind,from=sources,target=/s --mount=type=cache,target=/c true\n"
    )
    assert names(text) == ["tools:1", "more", "sources"]


def test_a_copy_from_a_variable_of_its_stage() -> None:
    text = "ARG V=1\nFROM scratch\nARG V\nARG W=two\nCOPY --from=a:$V / /\nCOPY --from=$W / /\n"
    assert names(text) == ["a:1", "two"]


def test_stages_that_the_target_does_not_need_are_left_out() -> None:
    text = "FROM a AS one\nFROM b AS two\nFROM c AS three\nCOPY --from=one / /\nFROM two AS four\n"
    assert names(text) == ["b"]
    assert names(text, "three") == ["a", "c"]
    assert names(text, "0") == ["a"]
    with pytest.raises(UsageError, match="no stage 'five'"):
        names(text, "five")


@pytest.mark.parametrize("text", ["", "RUN true\n", "# FROM debian\n", "ARG X=1\n"])
def test_without_a_from_nothing_can_be_built(text: str) -> None:
    with pytest.raises(UsageError, match="no FROM"):
        names(text)


@pytest.mark.parametrize("text", ["FROM", "FROM a b", "FROM a is b", "FROM a AS b c", "FROM ${x", "FROM ${x?y}"])
def test_a_malformed_from_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        names(text)


def test_ten_thousand_stages_are_too_many() -> None:
    with pytest.raises(UsageError, match="stages"):
        names("FROM a\n" * 10_000)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("plain", "plain"),
        ("$a", "1"),
        ("${a}", "1"),
        ("x$a-y", "x1-y"),
        ("$none", ""),
        ("${none:-other}", "other"),
        ("${a:-other}", "1"),
        ("${a:+other}", "other"),
        ("${none:+other}", ""),
        ("${none:-${a}}", "1"),
        ("${empty:-x}", "x"),
        (r"\$a", "$a"),
        ("'$a'", "$a"),
        ('"$a"', "1"),
        ("$", "$"),
        ("$-", "$-"),
        ('"a b"', "a b"),
    ],
)
def test_variables_are_replaced_as_by_a_shell(word: str, value: str) -> None:
    assert substitute(word, {"a": "1", "empty": ""}) == value


def test_here_documents_are_noticed() -> None:
    assert has_heredoc("FROM a\nRUN <<EOF\necho\nEOF\n")
    assert has_heredoc("FROM a\nCOPY <<-'END' /x\n")
    assert not has_heredoc("FROM a\nRUN cat < file; echo $((1<<2))\n# RUN <<EOF\n")


@given(st.text())
def test_whatever_is_read_ends_in_names_or_an_error_of_ours(text: str) -> None:
    try:
        found = bases(text, {"A": "x"}, "", AMD64)
    except IsolatError:
        return
    assert all(base.name for base in found)


@given(
    st.lists(st.sampled_from(["FROM ", "ARG A=", "$A", "${A:-", "}", "x", " AS ", "\\\n", "\n", "COPY --from=", " "]))
)
def test_no_combination_of_its_words_is_a_defect(words: list[str]) -> None:
    try:
        bases("".join(words), {"A": "x"}, "", AMD64)
    except IsolatError:
        pass
