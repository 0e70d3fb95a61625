"""``diff`` and ``commit``."""

from __future__ import annotations

from isolat.cli import options as o
from isolat.cli import progress, tables
from isolat.client import connect


def diff(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    found = connect.ask(root, "diff", {"env": parsed.words[0]})["changes"]
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines(f"{one['kind']} {one['path']}" for one in found)
    return 0


def commit(parsed: o.Parsed) -> int:
    pause = parsed.text("pause", "true")
    if pause not in ("true", "false"):
        raise o.usage_error(f"--pause: {pause!r} is neither true nor false")
    args = {
        "env": parsed.words[0],
        "names": parsed.words[1:],
        "message": parsed.text("message"),
        "author": parsed.text("author"),
        "change": parsed.texts("change"),
        "pause": pause == "true",
    }
    with connect.call(connect.find_root(parsed.values.get("root")), "commit", args) as request:
        found = progress.watch(request, quiet=parsed.flag("quiet"))
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([str(found["digest"])])
    return 0
