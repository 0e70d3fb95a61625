"""The daemon's verbs on a whole state root: what it takes, what of it can go, whether it is well (docs/api.md)."""

from __future__ import annotations

from isolat.daemon.call import Answer, Call
from isolat.engine import upkeep
from isolat.errors import UsageError

_PRUNED = ("environments", "images", "templates", "builds")  # unless something else is said: nothing of anybody's own
_PRUNABLE = (*_PRUNED, "volumes")


def usage(call: Call) -> Answer:
    return {"usage": [one.to_json() for one in upkeep.usage(call.engine)]}


def prune(call: Call) -> Answer:
    """A row for each thing that went, then the bytes of all."""
    kinds = call.args.texts("kinds") or list(_PRUNED)
    unknown = sorted(set(kinds) - set(_PRUNABLE))
    if unknown:
        raise UsageError(f"kinds: {', '.join(unknown)} can't be pruned", hint=f"what can be: {', '.join(_PRUNABLE)}")
    freed = 0

    def told(kind: str, name: str, size: int) -> None:
        nonlocal freed
        freed += size
        call.send({"row": {"kind": kind, "name": name, "bytes": size}}, [])

    if "environments" in kinds:
        upkeep.prune_environments(call.engine, told)
    if "images" in kinds:
        upkeep.prune_images(call.engine, call.args.flag("all"), told)
    if "templates" in kinds:
        upkeep.prune_templates(call.engine, told)
    if "builds" in kinds:
        upkeep.prune_builds(call.engine, told)
    if "volumes" in kinds:
        upkeep.prune_volumes(call.engine, told)
    return {"bytes": freed}


def check(call: Call) -> Answer:
    def progress(text: str, done: int = 0, total: int = 0) -> None:
        call.send({"progress": {"text": text, "done": done, "total": total}}, [])

    return {"problems": upkeep.check(call.engine, deep=call.args.flag("deep"), progress=progress)}
