"""isolatd: the engine of one state root behind its socket.

Started by the first command that needs it, or by systemd (contrib/isolatd.service). Killing it harms nothing:
environments go on under their keepers, and its successor finds them again.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

from isolat.daemon.server import Server
from isolat.deadline import Deadline
from isolat.engine.behind import DEFAULT_MOST as TEMPLATES_DEFAULT
from isolat.engine.engine import Engine, group_id
from isolat.engine.journal import log, log_defect
from isolat.engine.paths import DEFAULT_ROOT, StateRoot
from isolat.engine.warm import DEFAULT_MOST as WARM_DEFAULT
from isolat.errors import Conflict, DaemonUnavailable, InternalError, IsolatError, Refused, UsageError
from isolat.linux import confine, mounts

IDLE_S = 600.0
_SWITCH_S = 0.0005
_BACKLOG = 1024
ADVANCE_MOST = 256
_HANDOVER_S = 10.0


def main(argv: list[str] | None = None) -> int:
    options = _options(sys.argv[1:] if argv is None else argv)
    try:
        serve(Path(options["root"]), float(options["idle"]), int(options["ready_fd"]))
    except IsolatError as error:
        _tell(int(options["ready_fd"]), error)
        print(f"isolatd: {error.message}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        log_defect("the start", error)
        _tell(int(options["ready_fd"]), InternalError(f"the daemon failed: {type(error).__name__}: {error}"))
        return 125
    return 0


def _options(argv: list[str]) -> dict[str, str]:
    import argparse

    parser = argparse.ArgumentParser(prog="isolatd", description="The daemon of Isolat.")
    parser.add_argument("--root", default=os.environ.get("ISOLAT_ROOT", DEFAULT_ROOT), help="the state root")
    parser.add_argument("--idle", default=str(IDLE_S), help="seconds with nothing running after which it stops")
    parser.add_argument("--ready-fd", default="-1", help="told 'ok' when the socket answers")
    parser.add_argument("--foreground", action="store_true", help="never stop by itself (for a service manager)")
    found = parser.parse_args(argv)
    for name in ("idle", "ready_fd"):
        try:
            float(getattr(found, name))
        except ValueError:
            raise UsageError(f"--{name.replace('_', '-')} takes a number") from None
    idle = "inf" if found.foreground else found.idle
    return {"root": found.root, "idle": idle, "ready_fd": found.ready_fd}


def serve(root: Path, idle_s: float, ready_fd: int) -> None:
    """Hold the root's lock, recover, answer until told to stop or idle."""
    if os.geteuid() != 0:
        raise Refused("the daemon needs root for now", hint="start it with sudo, or use the service")
    os.umask(0o022)
    confine.leave_keys()  # before there are threads: each has its own
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one for each environment; the usual 1024 end soon
    paths = StateRoot(root)
    _make_root(root)
    _hold(paths)
    engine = Engine(root, _number("ISOLAT_WARM", WARM_DEFAULT), _number("ISOLAT_IMAGE_TEMPLATES", TEMPLATES_DEFAULT))
    engine.start()
    listener = _listen(paths)
    server = Server(engine, listener, idle_s)

    def stop(_: int, __: FrameType | None) -> None:
        server.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()  # what was imported is never garbage: later collections need not look at it
    log(f"isolatd {os.getpid()} serves {root}")
    _ready(ready_fd)
    try:
        server.serve()
        paths.socket.unlink(missing_ok=True)  # who comes now starts the next daemon, which waits for the lock
        server.finish()
    finally:
        paths.socket.unlink(missing_ok=True)
        listener.close()
        engine.close()
        log(f"isolatd {os.getpid()} ends")


def _number(name: str, default: int) -> int:
    """How many are made in advance, machines of each kind or templates of images; 0 for none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) > ADVANCE_MOST:
        raise UsageError(f"{name} is {text!r}", hint=f"it is a number from 0 to {ADVANCE_MOST}")
    return int(text)


def _hold(paths: StateRoot) -> None:
    """The root's lock, until this process ends. A daemon that has taken its socket away is ending: it is waited for."""
    lock = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    d = Deadline(_HANDOVER_S)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if d.passed or paths.socket.exists():
                os.close(lock)
                raise Conflict(
                    f"another daemon holds {paths.root}", hint="use that one: it answers on its socket"
                ) from None
        time.sleep(0.01)


def _make_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o711)
        os.chmod(root, 0o711)
        (root / "mounts").mkdir(exist_ok=True)
        os.chmod(root / "mounts", 0o700)  # an image may hold what only its environments should read
    except OSError as error:
        raise DaemonUnavailable(f"cannot make the state root {root}: {error.strerror}") from error
    mounts.share(str(root))


def _listen(paths: StateRoot) -> socket.socket:
    """The socket, for root and the group isolat only. That group is equivalent to root."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    paths.socket.unlink(missing_ok=True)
    old = os.umask(0o177)
    at = os.open(paths.root, os.O_PATH | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{at}/{paths.socket.name}")  # a socket's path may have 107 bytes
    finally:
        os.umask(old)
        os.close(at)
    group = group_id()
    if group is not None:
        os.chown(paths.socket, 0, group)
        os.chmod(paths.socket, 0o660)
    listener.listen(_BACKLOG)
    return listener


def _ready(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.write(fd, b"ok\n")
        os.close(fd)


def _tell(fd: int, error: IsolatError) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.write(fd, json.dumps(error.to_json()).encode() + b"\n")
            os.close(fd)


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
