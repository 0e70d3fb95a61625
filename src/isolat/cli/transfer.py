"""``pull``, ``push``, ``login``, ``logout``."""

from __future__ import annotations

import os
import shutil
from typing import Any

from isolat.cli import options as o
from isolat.cli import progress, tables
from isolat.client import auths, connect, transports
from isolat.errors import Unsupported
from isolat.images.reference import parse_reference


def pull(parsed: o.Parsed) -> int:
    location = transports.parse(parsed.words[0])
    root = connect.find_root(parsed.values.get("root"))
    found = _pull(parsed, root, location.where) if location.remote else _load(parsed, root, location)
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([str(found["digest"])])
    return 0


def _pull(parsed: o.Parsed, root: str, name: str) -> dict[str, Any]:
    args = {"image": name, "platform": parsed.text("platform"), **_access(parsed, name)}
    with connect.call(root, "pull", args) as request:
        return progress.watch(request, quiet=parsed.flag("quiet"))


def _load(parsed: o.Parsed, root: str, location: transports.Location) -> dict[str, Any]:
    """One image of an archive or a directory."""
    args = {"platform": parsed.text("platform"), "only": location.name}
    with transports.source(location) as descriptor, connect.call(root, "load", args, [descriptor]) as request:
        found: dict[str, Any] = progress.watch(request, quiet=parsed.flag("quiet"))["images"][0]
        return found


def push(parsed: o.Parsed) -> int:
    image = parsed.words[0]
    location = transports.parse(parsed.words[1]) if len(parsed.words) > 1 else transports.registry(image)
    root = connect.find_root(parsed.values.get("root"))
    if not location.remote:
        return _save(parsed, root, image, location)
    args = {"image": image, "target": location.where, **_access(parsed, location.where)}
    with connect.call(root, "push", args) as request:
        found = progress.watch(request, quiet=parsed.flag("quiet"))
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([f"{found['name']} {found['digest']}"])
    return 0


def _save(parsed: o.Parsed, root: str, image: str, location: transports.Location) -> int:
    """Into an archive or a directory. The digest is that of the manifest, as with a registry."""
    if location.transport in transports.ARCHIVES and location.name:
        raise o.usage_error(
            f"{location.transport}: an image goes into an archive under its own name",
            f"isolat tag {image} {location.name}, then push that",
        )
    format = location.transport if location.transport in transports.ARCHIVES else "oci-archive"
    args = {"images": [image], "format": format}
    found = connect.ask(root, "image_inspect", {"images": [image]})["images"][0]
    with transports.target(location) as descriptor, connect.call(root, "save", args, [descriptor]) as request:
        progress.watch(request, quiet=parsed.flag("quiet"))
    if parsed.flag("json"):
        tables.print_json({"name": f"{location.transport}:{location.where}", "digest": found["manifest"]})
    else:
        tables.print_lines([f"{location.transport}:{location.where} {found['manifest']}"])
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
