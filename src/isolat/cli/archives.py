"""``save``, ``load``, ``import``: images to and from archives."""

from __future__ import annotations

import sys
from typing import Any

from isolat.cli import options as o
from isolat.cli import progress, tables
from isolat.client import archives, connect


def save(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    args = {"images": parsed.words, "format": parsed.text("format", "docker-archive")}
    with (
        archives.target(parsed.text("output", archives.STANDARD)) as descriptor,
        connect.call(root, "save", args, [descriptor]) as request,
    ):
        progress.watch(request)
    return 0


def load(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    args = {"platform": parsed.text("platform")}
    with (
        archives.source(parsed.text("input", archives.STANDARD)) as descriptor,
        connect.call(root, "load", args, [descriptor]) as request,
    ):
        quiet = parsed.flag("quiet") or parsed.flag("json")

        def told(row: dict[str, Any]) -> None:
            for name, old in row.get("moved", {}).items():
                sys.stderr.write(f"note: {tables.clean(name)} has meant {old} until now, which stays without it\n")
            if not quiet:
                tables.print_lines(_loaded(row))

        found = progress.watch(request, quiet, told)["images"]
    if parsed.flag("json"):
        tables.print_json(found)
    elif parsed.flag("quiet"):
        tables.print_lines(f"sha256:{image['digest']}" for image in found)
    return 0


def _loaded(row: dict[str, Any]) -> list[str]:
    return [f"Loaded image: {name}" for name in row["names"]] or [f"Loaded image ID: {row['id']}"]


def import_(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    args = {
        "name": parsed.words[1] if len(parsed.words) > 1 else "",
        "changes": parsed.texts("change"),
        "message": parsed.text("message"),
        "platform": parsed.text("platform"),
    }
    with (
        archives.source(parsed.words[0]) as descriptor,
        connect.call(root, "import", args, [descriptor]) as request,
    ):
        found = progress.watch(request)
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([f"sha256:{found['digest']}"])
    return 0
