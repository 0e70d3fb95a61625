"""The daemon's verbs on what an environment has changed (docs/api.md)."""

from __future__ import annotations

from isolat.daemon.call import Answer, Call
from isolat.engine import changes


def diff(call: Call) -> Answer:
    env = call.engine.find(call.args.text("env"))
    return {"changes": changes.lines(changes.diff(call.engine, env, call.gone))}


def commit(call: Call) -> Answer:
    def progress(text: str, done: int = 0, total: int = 0) -> None:
        call.send({"progress": {"text": text, "done": done, "total": total}}, [])

    args = call.args
    wanted = changes.Wanted(
        names=tuple(args.texts("names")),
        message=args.text("message", ""),
        author=args.text("author", ""),
        change=tuple(args.texts("change")),
        pause=args.raw("pause", True) is not False,
    )
    return changes.commit(call.engine, call.engine.find(args.text("env")), wanted, progress, call.gone).to_json()
