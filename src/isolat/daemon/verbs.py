"""The daemon's verbs: arguments checked, the engine called, the answer put into its JSON form (docs/api.md)."""

from __future__ import annotations

import contextlib
import os
import signal as signals
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import asdict

from isolat import __version__
from isolat.daemon import archives as a
from isolat.daemon import build as b
from isolat.daemon import changes, files, transfer, upkeep
from isolat.daemon import snapshots as s
from isolat.daemon import templates as t
from isolat.daemon import volumes as v
from isolat.daemon.arguments import Arguments
from isolat.daemon.call import Answer, Call
from isolat.deadline import Deadline
from isolat.engine import states
from isolat.engine.engine import ExecRequest
from isolat.engine.environment import Environment
from isolat.engine.states import Verb
from isolat.errors import Conflict, UsageError
from isolat.images.bootstrap import bootstrap
from isolat.images.reference import parse_name
from isolat.layers.base import State
from isolat.places.base import Io

_NAMES_TOLD = 10


def ping(call: Call) -> Answer:
    return {"version": __version__, "pid": os.getpid(), "root": str(call.engine.paths.root)}


def run(call: Call) -> Answer:
    args = call.args
    service = args.mapping("spec")
    attach = args.flag("attach")
    env, sock = call.engine.run(
        service,
        call.caller,
        attach=attach,
        stdin=bool(service.get("stdin_open")),
        rows=args.integer("rows", 0, 0, 0xFFFF),
        cols=args.integer("cols", 0, 0, 0xFFFF),
        descriptors=call.descriptors,
    )
    return _followed(call, env, sock)


def restore(call: Call) -> Answer:
    """``run`` for what goes on from a snapshot."""
    args = call.args
    env, sock = call.engine.run_snapshot(
        args.text("snapshot"),
        s.wanted(args),
        call.caller,
        attach=args.flag("attach"),
        stdin=args.flag("stdin"),
    )
    return _followed(call, env, sock)


def _followed(call: Call, env: Environment, sock: socket.socket | None) -> Answer:
    """Give the caller the streams and wait for its end; without streams, don't wait."""
    if sock is None:
        return {"id": env.id, "name": env.name}
    stream = {"id": env.id, "name": env.name, "key": env.handle.main_name, "tty": bool(env.handle.spec.get("tty"))}
    with sock:
        try:
            call.send({"stream": stream}, [sock.fileno()])
        except OSError:
            # Nobody was ever told of it: whoever asked has gone while it was being made.
            call.engine.remove(env.id, force=True)
            raise
    while not env.finished(1.0):
        if call.gone():
            break
    return {"id": env.id, "name": env.name, "removed": env.gone.is_set(), **_end(env)}


def plan(call: Call) -> Answer:
    data, text = call.engine.plan(call.args.mapping("spec"), call.caller)
    return {"plan": data, "text": text}


def exec_(call: Call) -> Answer:
    args = call.args
    command = args.texts("command")
    if not command:
        raise UsageError("command: nothing to execute", hint="isolat exec ENV COMMAND")
    io = Io(
        tty=args.flag("tty"),
        stdin=args.flag("stdin"),
        rows=args.integer("rows", 0, 0, 0xFFFF),
        cols=args.integer("cols", 0, 0, 0xFFFF),
    )
    request = ExecRequest(
        tuple(command), tuple(_variables(args)), args.text("working_dir", ""), args.text("user", ""), io
    )
    detach = args.flag("detach")
    key, sock = call.engine.exec(args.text("env"), request, attach=not detach)
    if sock is not None:
        with sock:
            call.send({"stream": {"key": key, "tty": io.tty}}, [sock.fileno()])
    return {"key": key}


def _variables(args: Arguments) -> list[tuple[str, str]]:
    found = []
    for n, item in enumerate(args.texts("environment")):
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise UsageError(f"environment[{n}]: {item!r} is not NAME=value")
        found.append((name, value))
    return found


def attach(call: Call) -> Answer:
    env, sock = call.engine.attach(call.args.text("env"), call.args.flag("stdin"))
    tty = bool(env.handle.spec.get("tty"))
    with sock:
        call.send(
            {"stream": {"id": env.id, "name": env.name, "key": env.handle.main_name, "tty": tty}}, [sock.fileno()]
        )
    return {"id": env.id}


def ps(call: Call) -> Answer:
    everything = call.args.flag("all")
    rows = [_row(env) for env in call.engine.environments() if everything or env.state.alive]
    return {"environments": rows}


def _around(env: Environment) -> str:
    """The name of the environment that it is in; empty where it is in none."""
    around = env.handle.around
    return (env.outer.name if env.outer else around.name) if around else ""


def _row(env: Environment) -> Answer:
    handle = env.handle
    main = handle.frames[-1].main
    return {
        "id": env.id,
        "name": env.name,
        "image": handle.image,
        "layer": "/".join(handle.layers),
        "in": _around(env),
        "command": list(main.argv) if main else [],
        "state": str(env.state),
        "status": _status(env),
        "created_ns": handle.created_ns,
        "started_ns": handle.started_ns,
        "exit_code": handle.exit.code if handle.exit else None,
        "labels": dict(handle.labels),
    }


def _status(env: Environment) -> str:
    handle = env.handle
    if env.state == State.RUNNING:
        return f"up {_age((time.time_ns() - handle.started_ns) / 1e9)}"
    if handle.exit is not None:
        notes = [word for word, true in (("oom", handle.exit.oom), ("forced", handle.exit.forced)) if true]
        more = f", {', '.join(notes)}" if notes else ""
        return f"exited ({handle.exit.code}{more}) {_age((time.time_ns() - handle.exit.ended_ns) / 1e9)} ago"
    return f"{env.state}: {handle.reason}" if handle.reason else str(env.state)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def inspect(call: Call) -> Answer:
    env = call.engine.find(call.args.text("env"))
    handle = env.handle
    data = handle.to_json()
    data["layer"] = "/".join(handle.layers)
    data["inside"] = [inner.id for inner in call.engine.table.inside(env)]
    data["plan"] = [[step.describe() for step in frame.steps] for frame in handle.frames]
    data["uid_base"] = call.engine.uid_base(handle.uid_index)
    data["directory"] = str(env.directory)
    data["keeper_pid"] = env.link.pid if env.link is not None and not env.link.closed else None
    return data


def logs(call: Call) -> Answer:
    env = call.engine.find(call.args.text("env"))
    states.check(Verb.LOGS, env.state, env.name)
    directory = os.open(env.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    call.closing.append(directory)
    return {"id": env.id, "name": env.name, "running": env.state.alive, "kept": env.handle.spec.get("logging")}


def screenshot(call: Call) -> Answer:
    """The picture comes as a descriptor, so that nothing of ours is ever written to a file of the caller's choosing."""
    picture = call.engine.screenshot(call.args.text("env"))
    call.closing.append(picture)
    return {"bytes": os.fstat(picture).st_size}


def stop(call: Call) -> Answer:
    grace_s = call.args.number("grace_s", None, 0, 86400)
    return _end(call.engine.stop(call.args.text("env"), grace_s))


def kill(call: Call) -> Answer:
    call.engine.kill(call.args.text("env"), _signal(call.args))
    return {}


def _signal(args: Arguments) -> int:
    value = args.raw("signal", "KILL")
    if isinstance(value, str) and not value.isdigit():
        name = value.upper().removeprefix("SIG")
        try:
            return int(signals.Signals[f"SIG{name}"])
        except KeyError:
            raise UsageError(f"signal: {value!r} is no signal", hint="as in `kill -l`: TERM, KILL, HUP, …") from None
    number = int(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else 0
    if not 1 <= number <= signals.NSIG - 1:
        raise UsageError(f"signal: {value!r} is no signal", hint="a name, or a number from 1 to 64")
    return number


def wait(call: Call) -> Answer:
    env = call.engine.find(call.args.text("env"))
    while not call.gone():
        if env.ended.wait(0.5):
            break
    return _end(env)


def _end(env: Environment) -> Answer:
    exit = env.handle.exit
    return {
        "code": exit.code if exit else None,
        "signal": exit.signal if exit else 0,
        "oom": exit.oom if exit else False,
        "forced": exit.forced if exit else False,
        "state": str(env.state),
        "reason": env.handle.reason,
    }


def rm(call: Call) -> Answer:
    call.engine.remove(call.args.text("env"), call.args.flag("force"))
    return {}


def events(call: Call) -> Answer:
    since_ns = call.args.integer("since_ns", 0, 0, 1 << 62)
    follow = call.args.flag("follow")
    listener = call.engine.events.listen()
    try:
        last = 0
        if since_ns:
            for event in call.engine.events_since(since_ns):
                call.send({"row": event.to_json()}, [])
                last = event.time_ns
        while follow and not call.gone():
            for heard in call.engine.next_events(listener, 0.5):
                if heard is None:
                    return {}
                if heard.time_ns > last:
                    call.send({"row": heard.to_json()}, [])
    finally:
        call.engine.events.leave(listener)
    return {}


def images(call: Call) -> Answer:
    return {"images": [image.to_json() for image in call.engine.images.list()]}


def rmi(call: Call) -> Answer:
    name, force = call.args.text("image"), call.args.flag("force")
    image = call.engine.images.resolve(name)
    if len(image.names) > 1 and not force and not _is_name(name, image.names):
        raise Conflict(
            f"image {name} has several names: {', '.join(image.names[:_NAMES_TOLD])}",
            hint="remove them by name, or all of them with `isolat rmi -f`",
        )
    call.engine.remove_image(name)
    return {}


def _is_name(text: str, names: Collection[str]) -> bool:
    """Whether it is one of these names, and no digest."""
    with contextlib.suppress(UsageError):
        return parse_name(text) in names
    return False


def bootstrap_(call: Call) -> Answer:
    def progress(text: str, done: int = 0, total: int = 0) -> None:
        call.send({"progress": {"text": text, "done": done, "total": total}}, [])

    image = bootstrap(
        call.engine.images,
        call.args.text("image"),
        include=tuple(call.args.texts("include")) or None,
        arch=call.args.text("arch", ""),
        progress=progress,
    )
    return image.to_json()


def reset(call: Call) -> Answer:
    call.engine.reset(lambda id, what: call.send({"row": {"id": id, "what": what}}, []))
    call.shutdown()
    return {"removed": True}


def shutdown(call: Call) -> Answer:
    call.shutdown()
    return {}


def probe(call: Call) -> Answer:
    """Every layer as this machine allows it now, asked by ``doctor``."""
    found = {}
    for name, layer, place in call.engine.layers():
        found[name] = asdict(call.engine.probe(layer, place, Deadline(30)))
    return {"layers": found}


VERBS: dict[str, Callable[[Call], Answer]] = {
    "ping": ping,
    "run": run,
    "plan": plan,
    "restore": restore,
    "fork": s.fork,
    "snapshot": s.snapshot,
    "snapshots": s.snapshots,
    "snapshot_rm": s.snapshot_rm,
    "exec": exec_,
    "copy_in": files.copy_in,
    "copy_out": files.copy_out,
    "export": files.export,
    "attach": attach,
    "ps": ps,
    "inspect": inspect,
    "logs": logs,
    "screenshot": screenshot,
    "stop": stop,
    "kill": kill,
    "wait": wait,
    "rm": rm,
    "events": events,
    "images": images,
    "rmi": rmi,
    "tag": a.tag,
    "save": a.save,
    "load": a.load,
    "import": a.import_,
    "image_inspect": a.inspect,
    "history": a.history,
    "image_tree": a.tree,
    "bootstrap": bootstrap_,
    "build": b.build,
    "builder_prune": b.prune,
    "template_create": t.template_create,
    "templates": t.templates,
    "template_rm": t.template_rm,
    "template_prune": t.template_prune,
    "volume_create": v.volume_create,
    "volumes": v.volumes,
    "volume_inspect": v.volume_inspect,
    "volume_rm": v.volume_rm,
    "volume_prune": v.volume_prune,
    "diff": changes.diff,
    "commit": changes.commit,
    "pull": transfer.pull,
    "push": transfer.push,
    "usage": upkeep.usage,
    "prune": upkeep.prune,
    "check": upkeep.check,
    "reset": reset,
    "shutdown": shutdown,
    "probe": probe,
}
