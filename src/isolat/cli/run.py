"""``isolat run``: from words to a spec, to a running environment, to its exit code."""

from __future__ import annotations

import posix
import sys

from isolat.cli import options as o
from isolat.client import connect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from isolat.client.streams import Ending

EXIT_OURS = 125
EXIT_SIGPIPE = 141
_FINAL_S = 10.0
_PULL = ("missing", "always", "never")
_CARRIED_S = 600.0  # with volumes: a machine's are carried back by the daemon

# option → key of the spec, where the value is passed on as it was given
_PLAIN = {
    "name": "container_name",
    "layer": "runtime",
    "in": "x-in",
    "user": "user",
    "hostname": "hostname",
    "memory": "mem_limit",
    "memory_swap": "memswap_limit",
    "cpus": "cpus",
    "cpu_shares": "cpu_shares",
    "pids_limit": "pids_limit",
    "tmpfs": "tmpfs",
    "network": "network_mode",
    "label": "labels",
    "oci_runtime": "x-oci-runtime",
    "accel": "x-accel",
    "kernel": "x-kernel",
    "workdir": "working_dir",
    "tty": "tty",
    "interactive": "stdin_open",
    "read_only": "read_only",
    "rm": "x-remove",
    "stop_signal": "stop_signal",
}


def run(parsed: o.Parsed) -> int:
    if "from_snapshot" in parsed.values:
        from isolat.cli import snapshots

        return snapshots.restore(parsed)
    root = connect.find_root(parsed.values.get("root"))
    if parsed.flag("plan"):
        return _plan(root, parsed)
    if parsed.flag("json"):
        raise o.usage_error("run: --json is only for --plan")
    when = parsed.text("pull", "missing")
    if when not in _PULL:
        raise o.usage_error(f"--pull: {when!r} is none of {', '.join(_PULL)}")
    service, fds = build(parsed)
    try:
        return _pulling(root, service, fds, parsed, when)
    finally:
        for fd in fds:
            posix.close(fd)


def _pulling(root: str, service: dict[str, Any], fds: list[int], parsed: o.Parsed, when: str) -> int:
    """As Docker does: what is not here is pulled, and then it is tried once more."""
    start = _detached if parsed.flag("detach") else _attached
    missing: Any = None
    if when != "always":
        try:
            return start(root, service, fds, parsed)
        except Exception as error:  # of the class IsolatError, whose import would cost those who don't need it
            if when == "never" or getattr(error, "code", "") != "image-not-found":
                raise
            missing = error
    from isolat.cli import transfer

    transfer.pull_to_run(root, parsed.words[0], missing)
    return start(root, service, fds, parsed)


def _detached(root: str, service: dict[str, Any], fds: list[int], _: o.Parsed) -> int:
    with connect.call(root, "run", {"spec": service, "attach": False}, fds) as request:
        print_line(request.result()["id"])
    return 0


def _attached(root: str, service: dict[str, Any], fds: list[int], parsed: o.Parsed) -> int:
    from isolat.client import terminal

    check_terminal(parsed)
    tty = parsed.flag("tty")
    with terminal.Relay(tty=tty) as relay:
        rows, cols = terminal.size() if tty else (0, 0)
        args = {"spec": service, "attach": True, "rows": rows, "cols": cols}
        with connect.call(root, "run", args, fds) as request:
            ending, broken = pump(request, relay, parsed.flag("interactive"), tty)
            if ending.kind == "detached":
                return 0
            seconds = _CARRIED_S if "volumes" in service else _FINAL_S
            return exit_code(ending, broken, final(root, request, parsed.flag("rm"), ending, seconds))


def build(parsed: o.Parsed) -> tuple[dict[str, Any], list[int]]:
    """The service, and a descriptor for each volume in order that is a directory or file."""
    values = parsed.values
    service: dict[str, Any] = {"image": parsed.words[0]}
    if len(parsed.words) > 1:
        service["command"] = parsed.words[1:]
    for dest, key in _PLAIN.items():
        if dest in values:
            service[key] = values[dest]
    if "entrypoint" in values:
        service["entrypoint"] = [values["entrypoint"]] if values["entrypoint"] else []
    if "env" in values:
        service["environment"] = environment(values["env"])
    if "init" in values or "no_init" in values:
        service["init"] = values.get("init", True) and not values.get("no_init", False)
    for dest, key in (("timeout", "x-timeout"), ("stop_timeout", "stop_grace_period")):
        if dest in values:
            service[key] = f"{values[dest]}s" if values[dest].isdecimal() else values[dest]
    if "log_driver" in values:
        service["logging"] = {"driver": values["log_driver"]}
    if "disk" in values:
        service["storage_opt"] = {"size": values["disk"]}
    if "layer_opt" in values:
        from isolat.cli import layer_options

        service.update(layer_options.parse(values["layer_opt"], values.get("layer", "container")))
    fds: list[int] = []
    if "volume" in values:
        from isolat.client import volumes

        opened = [volumes.open_source(*volumes.parse(text)) for text in values["volume"]]
        service["volumes"] = [volume for volume, _ in opened]
        fds = [fd for _, fd in opened if fd >= 0]
    return service, fds


def environment(given: list[str]) -> list[str]:
    """``NAME=value`` as it is; ``NAME`` with the caller's value, left out where the caller has none."""
    found = []
    for item in given:
        if not item or item.startswith("="):
            raise o.usage_error(f"not a variable: {item!r}", "NAME=VALUE, or NAME for the caller's value")
        if "=" in item:
            found.append(item)
            continue
        value = posix.environ.get(item.encode("utf-8", "surrogateescape"))
        if value is not None:
            found.append(f"{item}={value.decode('utf-8', 'surrogateescape')}")
    return found


def check_terminal(parsed: o.Parsed) -> None:
    from isolat.client import terminal

    if parsed.flag("tty") and parsed.flag("interactive") and not terminal.is_terminal(0):
        raise o.usage_error("the input device is not a TTY", "leave out --tty, or run this in a terminal")


def print_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def pump(request: connect.Call, relay: Any, stdin: bool, tty: bool) -> tuple[Ending, str]:
    """Wait for the stream and pump it. The ending, and ``pipe`` or ``output`` where our output broke."""
    import _socket

    from isolat.client import streams, terminal

    while True:
        kind, content, fds = request.next()
        if kind == "stream" and fds:
            break
        if kind == "ok":
            raise o.usage_error("the daemon gave no stream", "its version may differ from this command's")
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fds[0])
    try:
        raw = tty and stdin and terminal.is_terminal(0)
        source = 0 if stdin else None
        one = streams.Pump(sock, key=str(content.get("key", "")), source=source, detach_keys=raw)
        return relay.run(one, raw), one.broken
    finally:
        sock.close()


def final(root: str, request: connect.Call, remove: bool, ending: Ending, seconds: float = _FINAL_S) -> dict[str, Any]:
    """The daemon's last word: by then the environment is settled, and gone where it was to be removed."""
    request.sock.settimeout(seconds)
    try:
        result: dict[str, Any] = request.result()
        return result
    except TimeoutError:
        if remove:
            complain(f"it ended, but was not removed within {seconds:g} s; the daemon goes on with that")
    except Exception as error:
        if ending.kind != "exited":
            raise
        if remove:
            _let_sweep(root, error)
    return {}


def _let_sweep(root: str, error: Exception) -> None:
    """The daemon died while it removed the environment: its successor finishes that before it answers."""
    try:
        connect.ask(root, "ping", {})
    except Exception as another:
        complain(f"it ended, but it is not known whether it was removed: {error}; {another}")


def exit_code(ending: Ending, broken: str, result: dict[str, Any]) -> int:
    """The command's exit code, after a word on whatever else ended it."""
    reason = result.get("reason")
    if result.get("oom"):
        complain("the kernel killed it for want of memory (--memory)")
    if ending.kind in {"lost", "failed"}:
        if isinstance(result.get("code"), int):
            return int(result["code"])
        complain(str(reason or ending.message))
        return ending.code if ending.kind == "failed" and ending.code else EXIT_OURS
    if reason:
        complain(str(reason))
    if broken:
        return EXIT_SIGPIPE if broken == "pipe" else EXIT_OURS
    return ending.code


def complain(message: str) -> None:
    try:
        sys.stderr.write(f"isolat: {message}\n")
        sys.stderr.flush()
    except OSError:
        pass


def _plan(root: str, parsed: o.Parsed) -> int:
    service, fds = build(parsed)
    for fd in fds:
        posix.close(fd)
    found = connect.ask(root, "plan", {"spec": service})
    if parsed.flag("json"):
        import json

        print_line(json.dumps(found["plan"], indent=2))
    else:
        print_line(found["text"].rstrip("\n"))
    return 0
