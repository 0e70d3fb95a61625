"""The index is rebuilt from what it is given, whatever happened to its file."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from isolat.engine.events import Event, EventBus
from isolat.engine.index import Index, Row

ROW: Row = ("id1", "calm_teal", "running", "debian", "container", 5, None)


def rows(path: Path) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("select * from environments order by id").fetchall()


@pytest.mark.parametrize("before", [None, b"", b"not a database at all" * 100])
def test_a_missing_or_damaged_index_is_made_anew(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "index.sqlite"
    if before is not None:
        path.write_bytes(before)
    index = Index(path)
    index.start([ROW])
    index.put(("id2", "b", "exited", "debian", "container", 6, 3))
    index.drop("id1")
    index.close()
    assert rows(path) == [("id2", "b", "exited", "debian", "container", 6, 3)]


def test_past_events_are_told_in_order(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.sqlite")
    index.start([])
    for n in range(5):
        index.event(Event("start", f"id{n}", "x", time_ns=100 + n, details={"n": n}))
    assert [event.details["n"] for event in index.events_since(102)] == [2, 3, 4]
    index.close()


def test_a_listener_that_does_not_read_is_cut_off_and_the_others_go_on() -> None:
    bus = EventBus()
    slow, quick = bus.listen(), bus.listen()
    for n in range(10_001):
        bus.publish(Event("start", str(n), "x"))
        event = quick.get_nowait()
        assert event is not None and event.id == str(n)
    assert slow.qsize() == 10_000
    bus.publish(Event("die", "last", "x"))
    assert slow.qsize() == 10_000
