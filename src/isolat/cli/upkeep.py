"""``system df``, ``system prune``, ``image prune``, ``system check``."""

from __future__ import annotations

from typing import Any

from isolat.cli import options as o
from isolat.cli import progress, tables
from isolat.cli.system import ask
from isolat.client import connect
from isolat.errors import EXIT_OURS

EXIT_PROBLEMS = 1


def df(parsed: o.Parsed) -> int:
    rows = connect.ask(connect.find_root(parsed.values.get("root")), "usage", {})["usage"]
    if parsed.flag("json"):
        tables.print_json(rows)
    else:
        titles = ("KIND", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE")
        tables.print_table(titles, [_row(row) for row in rows])
    return 0


def _row(row: dict[str, Any]) -> list[str]:
    size, free = int(row["size_bytes"]), int(row["reclaimable_bytes"])
    share = f" ({100 * free // size} %)" if size else ""
    return [row["kind"], str(row["total"]), str(row["active"]), tables.size(size), f"{tables.size(free)}{share}"]


def prune(parsed: o.Parsed) -> int:
    images = "also every image that nothing stands on" if parsed.flag("all") else "images without a name"
    if not parsed.flag("volumes"):
        return _prune(parsed, [], f"Remove what has ended, {images}, caches and templates?")
    kinds = ["environments", "images", "templates", "volumes"]
    question = (
        f"Remove what has ended, {images}, caches, templates, and volumes that nobody uses with all that is in them?"
    )
    return _prune(parsed, kinds, question)


def prune_images(parsed: o.Parsed) -> int:
    what = "every image that nothing stands on" if parsed.flag("all") else "the images without a name"
    return _prune(parsed, ["images"], f"Remove {what}?")


def _prune(parsed: o.Parsed, kinds: list[str], question: str) -> int:
    root = connect.find_root(parsed.values.get("root"))
    if not parsed.flag("yes") and not ask(question):
        tables.print_lines(["nothing was removed"])
        return EXIT_OURS
    rows = []
    with connect.call(root, "prune", {"kinds": kinds, "all": parsed.flag("all")}) as request:
        kind, content, _ = request.next()
        while kind != "ok":
            if kind == "row":
                rows.append(content)
                if not parsed.flag("json"):
                    tables.print_lines([f"removed {content['kind']} {content['name']}".rstrip()])
            kind, content, _ = request.next()
    if parsed.flag("json"):
        tables.print_json({"removed": rows, "bytes": content["bytes"]})
    else:
        tables.print_lines([f"freed {tables.size(int(content['bytes']))}"])
    return 0


def check(parsed: o.Parsed) -> int:
    with connect.call(connect.find_root(parsed.values.get("root")), "check", {"deep": parsed.flag("deep")}) as request:
        problems = progress.watch(request)["problems"]
    if parsed.flag("json"):
        tables.print_json(problems)
    else:
        tables.print_lines(problems or ["all is well"])
    return EXIT_PROBLEMS if problems else 0
