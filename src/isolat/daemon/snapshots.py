"""The daemon's verbs on forks and snapshots."""

from __future__ import annotations

from typing import Any

from isolat.daemon.arguments import Arguments
from isolat.daemon.call import Answer, Call
from isolat.engine.copying import CHILDREN_MOST
from isolat.engine.snapshots import Snapshot
from isolat.layers.base import Copied


def fork(call: Call) -> Answer:
    count = call.args.integer("count", 1, 1, CHILDREN_MOST)
    found = call.engine.fork(call.args.text("env"), count, call.args.text("name", ""), call.caller)
    children = [{"id": child.id, "name": child.name} for child in found.children]
    return {"environments": children, **_cost(found.copied)}


def snapshot(call: Call) -> Answer:
    found, copied = call.engine.snapshot(call.args.text("env"), call.args.text("name"))
    return {**_row(found), **_cost(copied)}


def snapshots(call: Call) -> Answer:
    return {"snapshots": [_row(found) for found in call.engine.snapshots.all()]}


def snapshot_rm(call: Call) -> Answer:
    call.engine.snapshots.remove(call.args.text("snapshot"))
    return {}


def wanted(args: Arguments) -> dict[str, Any]:
    """The keys of the spec that what goes on from a snapshot has of its own."""
    found: dict[str, Any] = {"x-remove": args.flag("remove")}
    if args.text("name", ""):
        found["container_name"] = args.text("name")
    return found


def _row(found: Snapshot) -> Answer:
    handle = found.handle
    main = handle.frames[-1].main
    return {
        "name": found.name,
        "id": found.id,
        "created_ns": found.created_ns,
        "of": handle.name,
        "image": handle.image,
        "digest": handle.digest,
        "layer": "/".join(frame.layer for frame in handle.frames),
        "command": list(main.argv) if main else [],
        "used_bytes": found.used_bytes,
    }


def _cost(copied: Copied) -> Answer:
    return {"stopped_ms": round(copied.stopped_ms, 3), "own_bytes": copied.own_bytes}
