"""``template create``, ``ls``, ``rm`` and ``prune``."""

from __future__ import annotations

from typing import Any

from isolat.cli import manage, progress, tables
from isolat.cli import options as o
from isolat.client import connect, times


def create(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    spec: dict[str, Any] = {"image": "none", "runtime": parsed.text("layer", "microvm")}
    for dest, key in (("memory", "mem_limit"), ("cpus", "cpus")):
        if dest in parsed.values:
            spec[key] = parsed.values[dest]
    with connect.call(root, "template_create", {"spec": spec}) as request:
        found = progress.watch(request)
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([found["id"]])
    return 0


def ls(parsed: o.Parsed) -> int:
    found = connect.ask(connect.find_root(parsed.values.get("root")), "templates", {})
    if parsed.flag("json"):
        tables.print_json(found)
    elif parsed.flag("quiet"):
        tables.print_lines(str(row["id"]) for row in found["templates"])
    else:
        titles = ("ID", "MEMORY", "CPUS", "ACCEL", "KERNEL", "IMAGE", "USES", "CREATED")
        tables.print_table(titles, [_row(row) for row in found["templates"]])
    return 0


def _row(row: dict[str, Any]) -> list[str]:
    return [
        str(row["id"]),
        tables.size(int(row["memory_bytes"])),
        str(row["cpus"]),
        str(row["accel"]),
        str(row["release"]),
        str(row["image"])[:12] or "-",
        tables.size(int(row["used_bytes"])),
        times.age(int(row["created_ns"])),
    ]


def rm(parsed: o.Parsed) -> int:
    def act(root: str, template: str) -> str:
        return str(connect.ask(root, "template_rm", {"template": template})["id"])

    return manage.each(parsed, act)


def prune(parsed: o.Parsed) -> int:
    removed = connect.ask(connect.find_root(parsed.values.get("root")), "template_prune", {})["removed"]
    tables.print_lines(str(row["id"]) for row in removed)
    return 0
