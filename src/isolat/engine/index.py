"""The index: environments and past events in SQLite, for questions that the state table cannot answer.

Truth is in handles and exit records; this file may be deleted at any time and is rebuilt from them (past events
excepted: their history starts anew). Writes go through one thread, off the hot path; without fsync, since nothing
depends on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isolat.engine.events import Event

_SCHEMA = """
create table if not exists environments (
    id text primary key, name text, state text, image text, layer text, created_ns integer, exit_code integer
);
create table if not exists events (
    time_ns integer, event text, id text, name text, details text
);
create index if not exists events_time on events (time_ns);
"""
_KEPT_EVENTS = 100_000
Row = tuple[str, str, str, str, str, int, int | None]


class Index:
    """One writer thread; readers open their own connection."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | threading.Event | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write, name="index", daemon=True)

    def start(self, rows: Iterable[Row]) -> None:
        """Open, making the file anew where it is missing or damaged, and fill it from the handles."""
        known = list(rows)
        try:
            self._rebuild(known)
        except sqlite3.DatabaseError:
            self._path.unlink(missing_ok=True)
            self._rebuild(known)
        self._thread.start()

    def _rebuild(self, rows: list[Row]) -> None:
        # Events hold command lines, which are nobody else's business; SQLite gives its further files the same mode.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with contextlib.closing(self._connect()) as db, db:
            db.executescript(_SCHEMA)
            db.execute("delete from environments")
            db.executemany("insert or replace into environments values (?,?,?,?,?,?,?)", rows)
            db.execute("delete from events where rowid <= (select max(rowid) from events) - ?", (_KEPT_EVENTS,))

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=5)
        db.execute("pragma journal_mode=wal")
        db.execute("pragma synchronous=off")
        return db

    def put(self, row: Row) -> None:
        self._queue.put(("insert or replace into environments values (?,?,?,?,?,?,?)", row))

    def drop(self, id: str) -> None:
        self._queue.put(("delete from environments where id=?", (id,)))

    def event(self, event: Event) -> None:
        values = (event.time_ns, event.event, event.id, event.name, json.dumps(event.details))
        self._queue.put(("insert into events values (?,?,?,?,?)", values))

    def events_since(self, since_ns: int) -> list[Event]:
        done = threading.Event()
        self._queue.put(done)
        done.wait(5)
        with contextlib.closing(self._connect()) as db:
            rows = db.execute(
                "select event, id, name, time_ns, details from events where time_ns >= ? order by time_ns, rowid",
                (since_ns,),
            ).fetchall()
        return [Event(event, id, name, time_ns, json.loads(details)) for event, id, name, time_ns, details in rows]

    def close(self) -> None:
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(5)

    def _write(self) -> None:
        db = self._connect()
        while True:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < 1000:
                    batch.append(self._queue.get_nowait())
            # The index is no truth: a write that fails (disk full) costs history, never an environment.
            with contextlib.suppress(sqlite3.Error), db:
                for item in batch:
                    if isinstance(item, tuple):
                        db.execute(*item)
            for item in batch:
                if isinstance(item, threading.Event):
                    item.set()
            if None in batch:
                db.close()
                return
