"""A volume's description: whole or not there, and what can't be read is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from isolat.errors import StoreError, UsageError
from isolat.volumes import record
from isolat.volumes.record import State, Volume

ONE = Volume("data", 1 << 30, 7, (("of", "test"),), State.READY)


def test_it_is_read_as_it_was_written_and_is_roots_alone(tmp_path: Path) -> None:
    where = tmp_path / "volumes"
    record.write(where, replace(ONE, state=State.NEW))
    record.write(where, ONE)
    assert record.read(where, "data") == ONE
    assert record.names(where) == ["data"]
    assert [path.stat().st_mode & 0o077 for path in (where, *where.iterdir())] == [0, 0]
    record.forget(where, "data")
    record.forget(where, "data")
    assert record.read(where, "data") is None
    assert record.names(where) == []


def test_without_a_directory_there_are_none(tmp_path: Path) -> None:
    assert record.names(tmp_path / "nowhere") == []
    assert record.read(tmp_path / "nowhere", "data") is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 2}', '{"version": 1, "name": "data"}', "\xff"])
def test_what_can_not_be_read_is_said_with_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text, encoding="latin-1")
    with pytest.raises(StoreError, match="the volume data can't be read") as caught:
        record.read(tmp_path, "data")
    assert "isolat volume rm data" in caught.value.hint


def test_a_description_under_another_name_is_none(tmp_path: Path) -> None:
    record.write(tmp_path, ONE)
    (tmp_path / "data.json").rename(tmp_path / "other.json")
    with pytest.raises(StoreError):
        record.read(tmp_path, "other")


@pytest.mark.parametrize("name", ["a", "0", "a.b_c-D", "x" * 128])
def test_names_are_dockers(name: str) -> None:
    record.check_name(name)


@pytest.mark.parametrize("name", ["", ".a", "-a", "_a", "a/b", "..", "ä", "a b", "a\n", "x" * 129])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        record.check_name(name)
