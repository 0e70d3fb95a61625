"""``pull``, ``push``, ``login``, ``logout``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from isolat.cli import options as o
from isolat.cli import progress, tables
from isolat.client import auths, connect, registries
from isolat.errors import IsolatError, Unsupported


def pull(parsed: o.Parsed) -> int:
    found = registries.pull(_ask(parsed), _watch(parsed), parsed.words[0], parsed.text("platform"), _verify(parsed))
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([str(found["digest"])])
    return 0


def pull_to_run(root: str, image: str, missing: IsolatError | None) -> None:
    """With its progress on standard error. ``missing``: why it is pulled; None: it may be here already."""

    def ask(verb: str, args: Mapping[str, Any], fds: Sequence[int]) -> connect.Call:
        return connect.call(root, verb, args, fds)

    registries.pull_to_run(ask, lambda request: progress.watch(request, quiet=False), image, missing)


def push(parsed: o.Parsed) -> int:
    target = parsed.words[1] if len(parsed.words) > 1 else ""
    found = registries.push(_ask(parsed), _watch(parsed), parsed.words[0], target, _verify(parsed))
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([f"{found['name']} {found['digest']}"])
    return 0


def _ask(parsed: o.Parsed) -> registries.Ask:
    root = connect.find_root(parsed.values.get("root"))
    return lambda verb, args, fds: connect.call(root, verb, args, fds)


def _watch(parsed: o.Parsed) -> registries.Watch:
    def watch(request: connect.Call) -> Any:
        return progress.watch(request, quiet=parsed.flag("quiet"))

    return watch


def _verify(parsed: o.Parsed) -> bool | None:
    text = parsed.text("tls_verify")
    if text not in ("", "true", "false"):
        raise o.usage_error(f"--tls-verify: {text!r} is neither true nor false")
    return text == "true" if text else None


def login(parsed: o.Parsed) -> int:
    """skopeo asks, tries, and writes; as the caller, whose credentials they are."""
    words = ["login", "--authfile", _auth_file()]
    for dest in ("username", "password"):
        if dest in parsed.values:
            words += [f"--{dest}", parsed.text(dest)]
    if parsed.flag("password_stdin"):
        words.append("--password-stdin")
    return _skopeo([*words, *_plain(parsed), parsed.words[0]])


def logout(parsed: o.Parsed) -> int:
    return _skopeo(["logout", "--authfile", _auth_file(), parsed.words[0]])


def _plain(parsed: o.Parsed) -> list[str]:
    from isolat.images.registries.skopeo import Access

    return [] if Access(_verify(parsed)).verifies(parsed.words[0]) else ["--tls-verify=false"]


def _auth_file() -> str:
    path = auths.default_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(path)


def _skopeo(words: list[str]) -> int:
    program = shutil.which("skopeo")
    if program is None:
        raise Unsupported("could not find skopeo, which is required to log in", hint="apt-get install skopeo")
    os.execv(program, [program, *words])
