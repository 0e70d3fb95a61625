"""The daemon's verbs on named volumes (docs/api.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from isolat.daemon.arguments import Arguments
from isolat.daemon.call import Answer, Call
from isolat.engine.volumes import User
from isolat.spec import values
from isolat.spec.mounts import VOLUME_SIZE
from isolat.spec.problems import Problems
from isolat.volumes.record import Volume

_LABELS = values.pairs(True)


def volume_create(call: Call) -> Answer:
    size_bytes, labels = _given(call.args)
    return _row(call, call.engine.volumes.create(call.args.text("name", ""), size_bytes, labels))


def _given(args: Arguments) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Size, or 0, and labels. Raises SpecError."""
    problems = Problems()
    size = args.raw("size", None)
    size_bytes = 0 if size is None else VOLUME_SIZE.read(size, ".size", problems)
    labels = _LABELS.read(args.raw("labels", {}), ".labels", problems)
    problems.check()
    return size_bytes, labels


def volumes(call: Call) -> Answer:
    users = call.engine.volumes.users()
    return {"volumes": [_row(call, volume, users) for volume in call.engine.volumes.list()]}


def volume_inspect(call: Call) -> Answer:
    return _row(call, call.engine.volumes.find(call.args.text("volume")))


def volume_rm(call: Call) -> Answer:
    return {"bytes": call.engine.volumes.remove(call.args.text("volume"))}


def volume_prune(call: Call) -> Answer:
    """Of all that nobody uses, or of these those."""
    names = call.args.texts("names") if call.args.raw("names", None) is not None else None
    removed = call.engine.volumes.prune(names)
    rows = [{"name": volume.name, "bytes": size} for volume, size in removed]
    return {"removed": rows, "bytes": sum(size for _, size in removed)}


def _row(call: Call, volume: Volume, users: Mapping[str, Iterable[User]] | None = None) -> Answer:
    store = call.engine.volumes.store
    found = call.engine.volumes.users() if users is None else users
    return {
        "name": volume.name,
        "size_bytes": volume.size_bytes,
        "used_bytes": store.used_bytes(volume.name),
        "created_ns": volume.created_ns,
        "labels": dict(volume.labels),
        "path": str(store.path(volume.name)),
        "used_by": [_use(user) for user in found.get(volume.name, ())],
    }


def _use(user: User) -> Answer:
    return {"kind": user.kind, "id": user.id, "name": user.name, "state": user.state, "read_only": user.read_only}
