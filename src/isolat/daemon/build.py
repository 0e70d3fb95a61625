"""The daemon's verbs on building images (docs/api.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from isolat.daemon.arguments import Arguments
from isolat.daemon.call import Answer, Call
from isolat.engine import admission
from isolat.engine.names import new_id
from isolat.errors import UsageError
from isolat.images.oci import Platform, parse_platform
from isolat.spec.model import Spec
from isolat.spec.units import parse_bytes

if TYPE_CHECKING:
    from isolat.images.building.job import Request

CONTEXTS = ("none", "directory", "archive")
COMPRESSIONS = ("", "gzip", "bzip2", "xz", "zstd")
PULLS = ("missing", "never", "always")
NETWORKS = ("none", "host")


def build(call: Call) -> Answer:
    """Rows of lines as they come, progress between them, then the image."""
    from isolat.images.building.job import Telling  # most daemons build nothing
    from isolat.images.building.sandbox import Cancelled

    request = _request(call)
    builder = call.engine.builder
    memory_bytes = builder.memory(request)
    facts = call.engine.facts
    admission.check(Spec("", memory_bytes=memory_bytes), facts.memory_bytes, facts.cpus, call.engine.paths.root)

    def progress(text: str, done: int, total: int) -> None:
        call.send({"progress": {"text": text, "done": done, "total": total}}, [])

    telling = Telling(lambda line: call.send({"row": {"line": line}}, []), progress, call.gone)
    try:
        return builder.build(new_id(), replace(request, memory_bytes=memory_bytes), telling).to_json()
    except Cancelled:
        return {}  # nobody is there to read it


def prune(call: Call) -> Answer:
    return {"bytes": call.engine.builder.storage.prune()}


def _request(call: Call) -> Request:
    from isolat.images.building import interior
    from isolat.images.building.job import Request
    from isolat.images.building.storage import DISK_BYTES

    args = call.args
    kind = _one_of(args, "context", CONTEXTS)
    text = args.text("containerfile", None)
    if text is None and kind != "archive":
        raise UsageError("build: containerfile is missing", hint="only an archive may bring it")
    if len(call.descriptors) != (kind != "none"):
        raise UsageError(f"build: a context of the kind {kind} came with {len(call.descriptors)} descriptors")
    return Request(
        names=args.texts("names"),
        text=text,
        path=_inside(args.text("file", "")),
        context=call.descriptors[0] if kind == "directory" else -1,
        archive=call.descriptors[0] if kind == "archive" else -1,
        compression=_one_of(args, "compression", COMPRESSIONS),
        pull=_one_of(args, "pull", PULLS),
        host_network=_one_of(args, "network", NETWORKS) == "host",
        memory_bytes=_size(args, "memory", 0),
        disk_bytes=_size(args, "disk", DISK_BYTES),
        caller_uid=call.caller.uid,
        options=interior.Options(
            target=args.text("target", ""),
            platform=_platform(args),
            no_cache=args.flag("no_cache"),
            arguments=dict(_pairs(args, "arguments")),
            labels=[f"{name}={value}" for name, value in _pairs(args, "labels")],
            timestamp=args.integer("timestamp", -1, -1, 1 << 40),
        ),
    )


def _one_of(args: Arguments, name: str, known: tuple[str, ...]) -> str:
    found = args.text(name, known[0])
    if found not in known:
        raise UsageError(f"build: {name} can't be {found!r}", hint=f"it is one of {', '.join(filter(None, known))}")
    return found


def _inside(path: str) -> str:
    """A Containerfile's path in an archive."""
    if path.startswith("/") or ".." in path.split("/"):
        raise UsageError(f"build: file {path!r} is not in the context")
    return path


def _size(args: Arguments, name: str, default: int) -> int:
    text = args.text(name, "")
    try:
        size = parse_bytes(text) if text else default
    except ValueError as error:
        raise UsageError(f"build: {name} {error}, not {text!r}") from None
    if text and size < 64 << 20:
        raise UsageError(f"build: {name} must be at least 64m, not {text}")
    return size


def _platform(args: Arguments) -> Platform | None:
    text = args.text("platform", "")
    found = parse_platform(text) if text else None
    if text and found is None:
        raise UsageError(f"build: {text!r} is no platform", hint="OS/ARCHITECTURE, as linux/arm64")
    return found


def _pairs(args: Arguments, name: str) -> list[tuple[str, str]]:
    found = []
    for text in args.texts(name):
        key, _, value = text.partition("=")
        if not key:
            raise UsageError(f"build: {name}: {text!r} is not NAME=VALUE")
        found.append((key, value))
    return found
