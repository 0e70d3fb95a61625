"""``doctor``, ``setup``, ``system reset``, ``system shutdown``, ``version``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import isolat
from isolat.cli import options as o
from isolat.cli import tables
from isolat.client import connect
from isolat.errors import EXIT_OURS, DaemonUnavailable, IsolatError, Refused

_DOCTOR_S = 120.0


def doctor(parsed: o.Parsed) -> int:
    """In this process: it must tell most where no daemon can run."""
    from isolat.deadline import Deadline
    from isolat.evidence import doctor as evidence
    from isolat.linux.facts import record_facts
    from isolat.places.wired import WiredPlace

    def no_link(_: Deadline) -> Any:
        raise Refused("a probe must not touch its place")

    root = Path(connect.find_root(parsed.values.get("root")))
    report = evidence.examine(WiredPlace(no_link, record_facts()), root, Deadline(_DOCTOR_S))
    if parsed.flag("json"):
        tables.print_json(report.to_json())
    else:
        sys.stdout.write(evidence.render(report))
    return 0 if report.ready else EXIT_OURS


def setup(parsed: o.Parsed) -> int:
    from isolat.setup import packages

    return packages.setup(parsed.flag("yes"), ask, lambda line: tables.print_lines([line]))


def ask(question: str) -> bool:
    """Yes, or anything else; without a terminal nobody can say yes."""
    if not sys.stdin.isatty():
        raise o.usage_error(f"{question}: there is no terminal to ask on", "say yes with --yes")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def reset(parsed: o.Parsed) -> int:
    from isolat.client import leftovers

    root = connect.find_root(parsed.values.get("root"))
    if not Path(root).exists():
        tables.print_lines([f"there is nothing: {root} does not exist"])
        return 0
    if os.geteuid() != 0:
        raise Refused("system reset needs root", hint="run it with sudo")
    if not parsed.flag("yes") and not ask(f"Remove every environment, image and volume of {root}?"):
        tables.print_lines(["nothing was removed"])
        return EXIT_OURS
    with connect.call(root, "reset", {}) as request:
        kind, content, _ = request.next()
        while kind != "ok":
            if kind == "row":
                tables.print_lines([f"removed {content.get('what', '')} {content.get('id', '')}".rstrip()])
            kind, content, _ = request.next()
    with leftovers.alone(root):
        leftovers.release(root)
        found = leftovers.wait_for_none(root)
        if found:
            raise IsolatError(f"something is left of {root}", details=tuple(found), hint="end it, then reset again")
        kept = leftovers.remove_root(root)
    tables.print_lines(["nothing is left: no process, mount, loop device or control group"])
    if kept:
        tables.print_lines([f"not ours, so kept: {path}" for path in kept])
    else:
        tables.print_lines([f"removed {root}"])
    return 0


def shutdown(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    try:
        connect.ask(root, "shutdown", {}, start=False)
    except DaemonUnavailable:
        tables.print_lines([f"no daemon runs for {root}"])
    return 0


def version(parsed: o.Parsed) -> int:
    found: dict[str, Any] = {"version": isolat.__version__, "daemon": None}
    try:
        found["daemon"] = connect.ask(connect.find_root(parsed.values.get("root")), "ping", {}, start=False)
    except IsolatError:
        pass  # none runs, or it is not for this caller: the command's own version is told anyway
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([f"isolat {isolat.__version__}"])
        if found["daemon"]:
            tables.print_lines([f"daemon {found['daemon'].get('version')}, process {found['daemon'].get('pid')}"])
    return 0
