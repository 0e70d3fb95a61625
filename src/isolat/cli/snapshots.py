"""``fork``, ``snapshot``, ``snapshots``, ``snapshot ls``, ``snapshot rm``, and ``run --from-snapshot``."""

from __future__ import annotations

import shlex
from typing import Any

from isolat.cli import manage, run, tables
from isolat.cli import options as o
from isolat.client import connect, terminal, times

_OWN = frozenset({"root", "from_snapshot", "detach", "interactive", "tty", "rm", "name"})
_COMMAND_CHARACTERS = 40
_CHILDREN_MOST = 100  # of the daemon's, which this command does not load


def fork(parsed: o.Parsed) -> int:
    text = parsed.text("number", "1")
    if not text.isdecimal() or not 1 <= int(text) <= _CHILDREN_MOST:
        raise o.usage_error(f"fork: -n {text}", f"how many children: from 1 to {_CHILDREN_MOST}")
    args = {"env": parsed.words[0], "count": int(text), "name": parsed.text("name")}
    found = connect.ask(connect.find_root(parsed.values.get("root")), "fork", args)
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines(str(child["id"]) for child in found["environments"])
    return 0


def snapshot(parsed: o.Parsed) -> int:
    env, name = parsed.words
    found = connect.ask(connect.find_root(parsed.values.get("root")), "snapshot", {"env": env, "name": name})
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([name])
    return 0


def ls(parsed: o.Parsed) -> int:
    found = connect.ask(connect.find_root(parsed.values.get("root")), "snapshots", {})["snapshots"]
    if parsed.flag("json"):
        tables.print_json(found)
    elif parsed.flag("quiet"):
        tables.print_lines(str(row["name"]) for row in found)
    else:
        titles = ("NAME", "OF", "IMAGE", "LAYER", "COMMAND", "SIZE", "CREATED")
        tables.print_table(titles, [_row(row, parsed.flag("no_trunc")) for row in found])
    return 0


def _row(row: dict[str, Any], whole: bool) -> list[str]:
    return [
        str(row["name"]),
        str(row["of"]),
        str(row["image"]),
        str(row["layer"]),
        tables.shorten(shlex.join(row["command"]), _COMMAND_CHARACTERS, whole),
        tables.size(int(row["used_bytes"])),
        times.age(int(row["created_ns"])),
    ]


def rm(parsed: o.Parsed) -> int:
    def act(root: str, name: str) -> str:
        connect.ask(root, "snapshot_rm", {"snapshot": name})
        return name

    return manage.each(parsed, act)


def restore(parsed: o.Parsed) -> int:
    """``run --from-snapshot``: the machine is as it was, so nothing else of it can be chosen."""
    others = sorted(name.replace("_", "-") for name in parsed.values if name not in _OWN)
    if parsed.words or others:
        what = parsed.words[0] if parsed.words else f"--{others[0]}"
        raise o.usage_error(
            f"run --from-snapshot: {what} can't be chosen: everything is as it was",
            "--name, --rm, --detach and --interactive can",
        )
    root = connect.find_root(parsed.values.get("root"))
    detach, remove = parsed.flag("detach"), parsed.flag("rm")
    args = {"snapshot": parsed.text("from_snapshot"), "name": parsed.text("name"), "remove": remove}
    if detach:
        run.print_line(connect.ask(root, "restore", args)["id"])
        return 0
    run.check_terminal(parsed)
    stdin, tty = parsed.flag("interactive"), parsed.flag("tty")
    args |= {"attach": True, "stdin": stdin}
    with terminal.Relay(tty=tty) as relay, connect.call(root, "restore", args) as request:
        ending, broken = run.pump(request, relay, stdin, tty)
        if ending.kind == "detached":
            return 0
        return run.exit_code(ending, broken, run.final(root, request, remove, ending))
