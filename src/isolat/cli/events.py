"""``isolat events``: what happens, one line an event."""

from __future__ import annotations

import json
import sys
from typing import Any

from isolat.cli import options as o
from isolat.cli import tables
from isolat.client import times
from isolat.client.sdk import Client


def events(parsed: o.Parsed) -> int:
    since_s = times.parse_since(parsed.values["since"]) / times.NS if "since" in parsed.values else None
    follow = not parsed.flag("no_follow")
    if not follow and since_s is None:
        since_s = 1e-9  # the whole past: without it there would be nothing to show
    for row in Client(parsed.values.get("root")).events(since_s=since_s, follow=follow):
        line = json.dumps(row) if parsed.flag("json") else tables.clean(_line(row))
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


def _line(row: dict[str, Any]) -> str:
    details = " ".join(f"{name}={_value(value)}" for name, value in (row.get("details") or {}).items())
    id = str(row.get("id", ""))[: tables.ID_CHARACTERS]
    return f"{times.show(row['time_ns'])} {row['event']:8} {row.get('name', '')} ({id}) {details}".rstrip()


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
