"""``pull``, ``push``, ``login``, ``logout``."""

from __future__ import annotations

import os
import shutil
from typing import Any

from isolat.cli import options as o
from isolat.cli import progress, tables
from isolat.client import auths, connect
from isolat.errors import Unsupported
from isolat.images.reference import parse_reference


def pull(parsed: o.Parsed) -> int:
    name = parsed.words[0].removeprefix("docker://")
    args = {"image": name, "platform": parsed.text("platform"), **_access(parsed, name)}
    with connect.call(connect.find_root(parsed.values.get("root")), "pull", args) as request:
        found = progress.watch(request, quiet=parsed.flag("quiet"))
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([str(found["digest"])])
    return 0


def push(parsed: o.Parsed) -> int:
    name = parsed.words[0]
    target = parsed.words[1] if len(parsed.words) > 1 else ""
    target = target.removeprefix("docker://")
    args = {"image": name, "target": target, **_access(parsed, target or name)}
    with connect.call(connect.find_root(parsed.values.get("root")), "push", args) as request:
        found = progress.watch(request, quiet=parsed.flag("quiet"))
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([f"{found['name']} {found['digest']}"])
    return 0


def _access(parsed: o.Parsed, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"auths": auths.of(parse_reference(name).registry)}
    if "tls_verify" in parsed.values:
        text = parsed.text("tls_verify")
        if text not in ("true", "false"):
            raise o.usage_error(f"--tls-verify: {text!r} is neither true nor false")
        found["tls_verify"] = text == "true"
    return found


def login(parsed: o.Parsed) -> int:
    """skopeo asks, tries, and writes; as the caller, whose credentials they are."""
    words = ["login", "--authfile", _auth_file()]
    for dest in ("username", "password"):
        if dest in parsed.values:
            words += [f"--{dest}", parsed.text(dest)]
    if parsed.flag("password_stdin"):
        words.append("--password-stdin")
    return _skopeo([*words, *_verify(parsed), parsed.words[0]])


def logout(parsed: o.Parsed) -> int:
    return _skopeo(["logout", "--authfile", _auth_file(), parsed.words[0]])


def _verify(parsed: o.Parsed) -> list[str]:
    from isolat.images.registries.skopeo import Access

    verify = {"true": True, "false": False}.get(parsed.text("tls_verify"))
    return [] if Access(verify).verifies(parsed.words[0]) else ["--tls-verify=false"]


def _auth_file() -> str:
    path = auths.default_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(path)


def _skopeo(words: list[str]) -> int:
    program = shutil.which("skopeo")
    if program is None:
        raise Unsupported("could not find skopeo, which is required to log in", hint="apt-get install skopeo")
    os.execv(program, [program, *words])
