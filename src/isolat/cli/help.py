"""Help texts, made from the table of options."""

from __future__ import annotations

import sys

from isolat.cli import options as o
from isolat.cli.verbs import GROUPS, SECOND, VERBS


def show(parsed: o.Parsed) -> int:
    sys.stdout.write(text(" ".join(parsed.words)))
    return 0


def text(name: str = "") -> str:
    """The help of a verb, of a group of verbs, or of all."""
    if name in VERBS:
        return _of_verb(VERBS[name]) + _below(name)
    if name and name not in GROUPS:
        raise o.usage_error(f"no help for {name}: there is no such verb", "`isolat --help` lists them")
    if name:
        verbs = [verb for verb in VERBS.values() if verb.name.startswith(f"{name} ")]
    else:
        verbs = [verb for verb in VERBS.values() if verb.name not in SECOND]
    lines = [f"usage: isolat {name} VERB [OPTIONS] …" if name else "usage: isolat [--root DIR] VERB [OPTIONS] …", ""]
    if not name:
        lines += ["Isolated execution environments at every kind of virtualization.", ""]
    lines += _columns([(f"  {verb.name}", verb.summary) for verb in verbs])
    if not name:
        lines += ["", *_options(o.GLOBAL)]
        lines += [
            "",
            "`isolat VERB --help` tells more about a verb. Exit codes: the command's own; 128+n where",
        ]
        lines += ["signal n ended it; 125 Isolat failed; 126 not executable; 127 not found inside."]
    return "\n".join(lines) + "\n"


def _below(name: str) -> str:
    """The verbs of the group that has the verb's own name: `snapshot ls` beside `snapshot`."""
    below = [(f"  {verb.name}", verb.summary) for verb in VERBS.values() if verb.name.startswith(f"{name} ")]
    return "\n".join(["", *_columns(below)]) + "\n" if below else ""


def _of_verb(verb: o.Verb) -> str:
    usage = f"usage: isolat {verb.name} [OPTIONS] {verb.usage}".rstrip()
    summary = verb.summary[0].upper() + verb.summary[1:]
    return "\n".join([usage, "", f"{summary}.", "", *_options((*verb.options, *o.COMMON))]) + "\n"


def _options(options: tuple[o.Option, ...]) -> list[str]:
    return _columns([(_names(option), option.help) for option in options])


def _names(option: o.Option) -> str:
    names = ", ".join(option.names)
    indent = "  " if len(option.names[0]) == 2 else "      "
    return f"{indent}{names} {option.metavar}".rstrip()


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    width = min(34, max(len(left) for left, _ in rows) + 2)
    lines = []
    for left, right in rows:
        lines.append(f"{left:<{width}}{right}" if len(left) < width else f"{left}\n{'':<{width}}{right}")
    return lines
