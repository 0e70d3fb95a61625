"""``isolat exec`` and ``isolat attach``: the caller's streams to a process inside."""

from __future__ import annotations

from isolat.cli import options as o
from isolat.cli import run
from isolat.client import connect, terminal


def exec_(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    detach, tty, stdin = parsed.flag("detach"), parsed.flag("tty"), parsed.flag("interactive")
    env, *command = parsed.words
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise o.usage_error("exec: no command", "isolat exec ENV COMMAND…")
    args = {
        "env": env,
        "command": command,
        "environment": run.environment(parsed.texts("env")),
        "working_dir": parsed.text("workdir"),
        "user": parsed.text("user"),
        "tty": tty,
        "stdin": stdin and not detach,
        "detach": detach,
    }
    if detach:
        connect.ask(root, "exec", args)
        return 0
    run.check_terminal(parsed)
    with terminal.Relay(tty=tty) as relay:
        if tty:
            args["rows"], args["cols"] = terminal.size()
        with connect.call(root, "exec", args) as request:
            ending, broken = run.pump(request, relay, stdin, tty)
        return 0 if ending.kind == "detached" else run.exit_code(ending, broken, {})


def attach(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    env = parsed.words[0]
    spec = connect.ask(root, "inspect", {"env": env}).get("spec", {})
    tty = bool(spec.get("tty"))
    stdin = bool(spec.get("stdin_open")) and not parsed.flag("no_stdin")
    if tty and stdin and not terminal.is_terminal(0):
        raise o.usage_error("the input device is not a TTY", "attach without it: --no-stdin")
    with terminal.Relay(tty=tty) as relay:
        with connect.call(root, "attach", {"env": env, "stdin": stdin}) as request:
            ending, broken = run.pump(request, relay, stdin, tty)
        return 0 if ending.kind == "detached" else run.exit_code(ending, broken, {})
