"""Starting the daemon when a command finds none.

Commands that start it at the same moment take turns by a lock of their own (``ROOT/start.lock``): the first starts
it, the others then find it. Readiness comes through an inherited pipe, so nothing polls for a socket. Where a daemon
that a service manager is just starting holds the root, and only there, the connection is tried again for a while.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import fcntl
import grp
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from isolat.client import connect
from isolat.errors import Conflict, DaemonUnavailable, IsolatError, Refused, from_json
from isolat.wire import fastjson

START_S = 15.0
GROUP = "isolat"
_RETRY_S = 0.05
_READY_FD = 3
_KEPT = {"PATH", "HOME", "LANG", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR"}
_RESET = {signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP, signal.SIGPIPE, signal.SIGCHLD}


def connect_or_start(root: str) -> _socket.socket:
    """Start the daemon of ``root``, or let another command do so, and connect to it."""
    if os.geteuid() != 0:
        give_up(root)
    end_s = time.monotonic() + START_S
    with _turn(root):
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return connect.reach(root)
        try:
            _start(root, end_s)
        except Conflict:
            return _wait_for_other(root, end_s)
        try:
            return connect.reach(root)
        except OSError as error:
            raise unreachable(root, error) from error


@contextlib.contextmanager
def _turn(root: str) -> Iterator[None]:
    """Hold the lock of those who start a daemon. Each holds it for START_S at most."""
    try:
        Path(root).mkdir(0o711, parents=True, exist_ok=True)
        fd = os.open(f"{root}/start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DaemonUnavailable(
            f"the state root {root} cannot be used: {error.strerror}",
            hint="choose another with --root or ISOLAT_ROOT",
            errno=error.errno or 0,
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _start(root: str, end_s: float) -> None:
    ready, theirs = os.pipe()
    try:
        _spawn(root, theirs)
    finally:
        os.close(theirs)
    try:
        answer = _read_until_closed(ready, end_s)
    finally:
        os.close(ready)
    if answer.startswith(b"ok"):
        return
    raise _failure(root, answer)


def command(root: str) -> list[str]:
    """How the daemon of a root is started, without its --ready-fd."""
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("daemonize.py")), "--root", root]


def _spawn(root: str, ready: int) -> None:
    """A session of its own, nothing of ours but the pipe; what it says before it has a log goes to daemon.log."""
    argv = [*command(root), "--ready-fd", str(_READY_FD)]
    log = os.open(f"{root}/daemon.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    high = fcntl.fcntl(ready, fcntl.F_DUPFD_CLOEXEC, 10)
    try:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
            (os.POSIX_SPAWN_DUP2, high, _READY_FD),
        ]
        pid = os.posix_spawn(argv[0], argv, _environment(), file_actions=actions, setsid=True, setsigdef=_RESET)
    except OSError as error:
        raise DaemonUnavailable(f"the daemon cannot be started: {argv[0]}: {error.strerror}") from error
    finally:
        os.close(high)
        os.close(log)
    os.waitpid(pid, 0)  # it forks at once, so that the daemon is nobody's child


def _environment() -> dict[str, str]:
    def kept(name: str) -> bool:
        return name in _KEPT or name.startswith(("ISOLAT_", "LC_")) or name.lower().endswith("_proxy")

    return {name: value for name, value in os.environ.items() if kept(name)}


def _read_until_closed(fd: int, end_s: float) -> bytes:
    """What the daemon tells: ``ok``, or an error, or nothing when it died. Raises DaemonUnavailable when it is late."""
    told = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not told.endswith(b"\n"):
        left_s = end_s - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise DaemonUnavailable(f"the daemon was not ready within {START_S:g} s", hint="its log may say why")
        data = os.read(fd, 65536)
        if not data:
            break
        told += data
    return told


def _failure(root: str, answer: bytes) -> IsolatError:
    with contextlib.suppress(ValueError, RecursionError):
        told = fastjson.loads(answer.decode("utf-8", "replace"))
        if isinstance(told, dict):
            error = from_json(told)
            if isinstance(error, Conflict):
                return error
            return DaemonUnavailable(f"the daemon could not start: {error.message}", hint=error.hint)
    log = f"{root}/daemon.log"
    return DaemonUnavailable("the daemon died while it started", hint=f"see {log}", details=_tail(log))


def _tail(path: str, lines: int = 8) -> tuple[str, ...]:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        return tuple(file.read().decode("utf-8", "replace").splitlines()[-lines:])
    return ()


def _wait_for_other(root: str, end_s: float) -> _socket.socket:
    while True:
        try:
            return connect.reach(root)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > end_s:
                break
            time.sleep(_RETRY_S)
    raise DaemonUnavailable(
        f"a daemon holds {root} but does not answer", hint=f"see {root}/daemon.log, or end that process"
    )


def give_up(root: str) -> NoReturn:
    """There is no daemon, and this caller cannot start one."""
    if os.geteuid() == 0:
        raise DaemonUnavailable(f"no daemon runs for {root}", hint="any other command starts it")
    raise Refused(
        f"no daemon runs for {root}, and only root can start it for now",
        hint="run this with sudo, or ask an administrator to start the isolatd service",
    )


def unreachable(root: str, error: OSError) -> IsolatError:
    if error.errno in {errno.EACCES, errno.EPERM}:
        return Refused(f"no right to use the daemon of {root}", hint=_remedy(), errno=error.errno or 0)
    return DaemonUnavailable(
        f"the daemon of {root} cannot be reached: {error.strerror or error}", errno=error.errno or 0
    )


def _remedy() -> str:
    with contextlib.suppress(KeyError):
        grp.getgrnam(GROUP)
        return f"run this with sudo, or join the group {GROUP} (which is equivalent to root)"
    return f"run this with sudo, or have a group {GROUP} made and join it (it is equivalent to root)"
