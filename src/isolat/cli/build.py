"""``build`` and ``builder prune``.

What the build writes goes to standard error as it comes, so that standard output has the image and nothing else.
"""

from __future__ import annotations

import sys
from typing import Any

from isolat.cli import options as o
from isolat.cli import tables
from isolat.client import build as sources
from isolat.client import connect


def build(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    source = sources.source(parsed.words[0], parsed.text("file"), sys.stdin.buffer)
    try:
        with connect.call(root, "build", {**_args(parsed), **source.args}, source.descriptors) as request:
            source.close()
            found = _watch(request, quiet=parsed.flag("quiet"))
    finally:
        source.close()
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([str(found["digest"])])
    return 0


def _args(parsed: o.Parsed) -> dict[str, Any]:
    return {
        "names": parsed.texts("tag"),
        "arguments": sources.arguments(parsed.texts("build_arg")),
        "labels": parsed.texts("label"),
        "target": parsed.text("target"),
        "platform": parsed.text("platform"),
        "network": parsed.text("network", "none"),
        "pull": parsed.text("pull", "missing"),
        "memory": parsed.text("memory"),
        "disk": parsed.text("disk"),
        "no_cache": parsed.flag("no_cache"),
        "timestamp": sources.timestamp(),
    }


def _watch(request: connect.Call, *, quiet: bool) -> dict[str, Any]:
    """Print lines and progress until the answer is there."""
    last = ""
    while True:
        kind, content, _ = request.next()
        if kind == "ok":
            found: dict[str, Any] = content
            return found
        text = str(content.get("line" if kind == "row" else "text", ""))
        if quiet or (kind == "progress" and text == last):
            continue
        last = text if kind == "progress" else ""
        sys.stderr.write(f"{tables.clean(text.expandtabs())}\n")
        sys.stderr.flush()


def prune(parsed: o.Parsed) -> int:
    found = connect.ask(connect.find_root(parsed.values.get("root")), "builder_prune", {})
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([f"freed {tables.size(int(found['bytes']))}"])
    return 0
