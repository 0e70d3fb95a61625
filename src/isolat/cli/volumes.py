"""``volume create``, ``ls``, ``inspect``, ``rm`` and ``prune``."""

from __future__ import annotations

from typing import Any

from isolat.cli import failure, manage, tables
from isolat.cli import options as o
from isolat.cli.system import ask
from isolat.client import connect, times
from isolat.errors import EXIT_OURS, IsolatError, NotFound


def create(parsed: o.Parsed) -> int:
    name = parsed.words[0] if parsed.words else ""
    args = {"name": name, "size": parsed.values.get("size"), "labels": parsed.texts("label")}
    found = connect.ask(connect.find_root(parsed.values.get("root")), "volume_create", args)
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([str(found["name"])])
    return 0


def ls(parsed: o.Parsed) -> int:
    found = connect.ask(connect.find_root(parsed.values.get("root")), "volumes", {})["volumes"]
    if parsed.flag("json"):
        tables.print_json(found)
    elif parsed.flag("quiet"):
        tables.print_lines(str(row["name"]) for row in found)
    else:
        tables.print_table(("NAME", "SIZE", "USED", "CREATED", "USED BY"), [_row(row) for row in found])
    return 0


def _row(row: dict[str, Any]) -> list[str]:
    used = row["used_bytes"]
    return [
        str(row["name"]),
        tables.size(int(row["size_bytes"])),
        "?" if used is None else tables.size(int(used)),
        times.age(int(row["created_ns"])),
        ", ".join(dict.fromkeys(str(user["name"]) for user in row["used_by"])),
    ]


def inspect(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    found, code = [], 0
    for name in parsed.words:
        try:
            found.append(connect.ask(root, "volume_inspect", {"volume": name}))
        except IsolatError as error:
            code = failure.tell(error)
    tables.print_json(found)
    return code


def rm(parsed: o.Parsed) -> int:
    force = parsed.flag("force")

    def act(root: str, name: str) -> str:
        try:
            connect.ask(root, "volume_rm", {"volume": name})
        except NotFound:
            if not force:
                raise
        return name

    return manage.each(parsed, act)


def prune(parsed: o.Parsed) -> int:
    """Only what was asked about is removed, whatever comes meanwhile."""
    root = connect.find_root(parsed.values.get("root"))
    unused = [row for row in connect.ask(root, "volumes", {})["volumes"] if not row["used_by"]]
    names = [str(row["name"]) for row in unused]
    size = tables.size(sum(int(row["used_bytes"] or 0) for row in unused))
    if names and not parsed.flag("yes") and not ask(f"Remove {', '.join(names)} with all that is in them ({size})?"):
        tables.print_lines(["nothing was removed"])
        return EXIT_OURS
    found = connect.ask(root, "volume_prune", {"names": names})
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines(f"removed volume {row['name']}" for row in found["removed"])
        tables.print_lines([f"freed {tables.size(int(found['bytes']))}"])
    return 0
