"""``ps``, ``stop``, ``kill``, ``wait``, ``rm``, ``inspect``, ``screenshot``: requests whose answers are printed."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from isolat.cli import failure, tables
from isolat.cli import options as o
from isolat.client import connect, times
from isolat.errors import IsolatError, Lost, NotFound

_FILTERS = ("id", "name", "image", "layer", "in", "state", "label")
_COMMAND_CHARACTERS = 40


def ps(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    filters = [_filter(text) for text in parsed.texts("filter")]
    everything = parsed.flag("all") or any(key == "state" for key, _ in filters)
    rows = connect.ask(root, "ps", {"all": everything})["environments"]
    rows = [row for row in rows if _matches(row, filters)]
    if parsed.flag("json"):
        tables.print_json(rows)
    elif parsed.flag("quiet"):
        whole = parsed.flag("no_trunc")
        tables.print_lines(row["id"] if whole else row["id"][: tables.ID_CHARACTERS] for row in rows)
    else:
        titles = ("ID", "NAME", "IMAGE", "LAYER", "IN", "COMMAND", "STATUS", "CREATED")
        tables.print_table(titles, [_row(row, parsed.flag("no_trunc")) for row in rows])
    return 0


def _row(row: dict[str, Any], whole: bool) -> list[str]:
    return [
        row["id"] if whole else row["id"][: tables.ID_CHARACTERS],
        row["name"],
        row["image"],
        row["layer"],
        row.get("in") or "",
        tables.shorten(shlex.join(row["command"]), _COMMAND_CHARACTERS, whole),
        row["status"],
        times.age(row["created_ns"]),
    ]


def _filter(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    key = "state" if key == "status" else key
    if not equals or key not in _FILTERS:
        raise o.usage_error(f"not a filter: {text}", f"KEY=VALUE with one of {', '.join(_FILTERS)}")
    return key, value


def _matches(row: dict[str, Any], filters: Sequence[tuple[str, str]]) -> bool:
    """Filters of one key are alternatives; different keys must all match."""
    keys = {key for key, _ in filters}
    return all(any(_matches_one(row, k, value) for k, value in filters if k == key) for key in keys)


def _matches_one(row: dict[str, Any], key: str, value: str) -> bool:
    if key == "label":
        name, equals, wanted = value.partition("=")
        labels = row.get("labels") or {}
        return name in labels and (not equals or labels[name] == wanted)
    if key in {"id", "name"}:
        return value in row[key] if key == "name" else row[key].startswith(value)
    return bool(row[key] == value)


def each(parsed: o.Parsed, act: Callable[[str, str], str]) -> int:
    """Do it for every environment named; one that fails does not keep the others from it."""
    root = connect.find_root(parsed.values.get("root"))
    code = 0
    for env in parsed.words:
        try:
            tables.print_lines([act(root, env)])
        except IsolatError as error:
            code = failure.tell(error)
    return code


def stop(parsed: o.Parsed) -> int:
    grace_s = times.parse_seconds(parsed.values["time"], "--time") if "time" in parsed.values else None

    def act(root: str, env: str) -> str:
        connect.ask(root, "stop", {"env": env, "grace_s": grace_s})
        return env

    return each(parsed, act)


def kill(parsed: o.Parsed) -> int:
    def act(root: str, env: str) -> str:
        connect.ask(root, "kill", {"env": env, "signal": parsed.text("signal", "KILL")})
        return env

    return each(parsed, act)


def wait(parsed: o.Parsed) -> int:
    def act(root: str, env: str) -> str:
        found = connect.ask(root, "wait", {"env": env})
        if found.get("code") is None:
            raise Lost(f"{env}: it is not known how it ended: {found.get('reason') or 'it was lost'}")
        return str(found["code"])

    return each(parsed, act)


def rm(parsed: o.Parsed) -> int:
    force = parsed.flag("force")

    def act(root: str, env: str) -> str:
        try:
            connect.ask(root, "rm", {"env": env, "force": force})
        except NotFound:
            if not force:
                raise
        return env

    return each(parsed, act)


def inspect(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    found, code = [], 0
    for env in parsed.words:
        try:
            found.append(connect.ask(root, "inspect", {"env": env}))
        except NotFound as error:
            code = failure.tell(_image_instead(root, env, error))
        except IsolatError as error:
            code = failure.tell(error)
    tables.print_json(found)
    return code


def _image_instead(root: str, name: str, error: NotFound) -> NotFound:
    """The same error; where an image is called so, with the verb that was meant."""
    with contextlib.suppress(IsolatError):
        connect.ask(root, "image_inspect", {"images": [name]})
        return NotFound(error.message, hint=f"it is an image: isolat image inspect {name}")
    return error


def screenshot(parsed: o.Parsed) -> int:
    """Written by this process, with the caller's rights; ``-`` is standard output."""
    env, target = parsed.words
    root = connect.find_root(parsed.values.get("root"))
    with connect.call(root, "screenshot", {"env": env}) as request:
        picture = connect.picture(request)
    if target == "-":
        sys.stdout.buffer.write(picture)
        sys.stdout.buffer.flush()
        return 0
    try:
        Path(target).write_bytes(picture)
    except OSError as error:
        raise o.usage_error(f"cannot write {target}: {error.strerror}") from error
    return 0
