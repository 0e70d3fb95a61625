"""Starting a keeper, or finding the one that is there."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from pathlib import Path

from isolat.deadline import Deadline
from isolat.errors import DaemonUnavailable, IsolatError, Lost, StartFailed
from isolat.places.base import CgroupMode, Facts
from isolat.places.link import Link, Reactor
from isolat.wire import kinds as k

OLDEST_VERSION = 1  # N-1 is spoken to: an upgrade leaves older keepers running
KEEPER = "isolat-keeper"
LOCK_HELD = 75


class Keepers:
    """Makes links to keepers, one for each environment."""

    def __init__(self, reactor: Reactor, facts: Facts, native: Path) -> None:
        self._reactor = reactor
        self._facts = facts
        self._program = native / KEEPER
        if not self._program.exists():
            raise DaemonUnavailable(
                f"{self._program} is missing: the C parts are not built",
                hint="run `make` in the source tree, or set ISOLAT_LIBEXEC",
            )

    def start(self, directory: Path, name: str, d: Deadline, idle_s: int = 0) -> Link:
        """A new keeper for the environment in ``directory``; the one that is there when it already has one.

        ``idle_s``: how long it stays without an application and without a daemon; 0: as it does by itself.
        """
        while True:
            link = self._launch(directory, name, idle_s, d) or self.find(directory, name, d)
            if link is not None:
                return link
            # One that is just ending holds the lock but answers no more.
            d.check(f"waiting for the former keeper of {name}")
            time.sleep(0.01)

    def _launch(self, directory: Path, name: str, idle_s: int, d: Deadline) -> Link | None:
        """A new keeper; None when another holds the environment."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        argv = [str(self._program), str(directory)]
        if self._facts.cgroups.mode == CgroupMode.HYBRID:
            argv.append("--hybrid")
        if idle_s:
            argv += ["--idle-s", str(idle_s)]
        try:
            with theirs:
                process = subprocess.Popen(
                    argv,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
                )
        except OSError as error:
            ours.close()
            raise StartFailed(f"{name}: cannot start {self._program}: {error.strerror}", stage="keeper") from error
        link = self._link(ours, name, process)
        try:
            self._greet(link, d)
        except Lost:
            if process.wait(5) == LOCK_HELD:
                return None
            raise StartFailed(
                f"{name}: its keeper ended at once with code {process.returncode}",
                stage="keeper",
                details=_tail(directory / "keeper.log"),
            ) from None
        return link

    def find(self, directory: Path, name: str, d: Deadline) -> Link | None:
        """A link to the keeper that holds this environment, or None when there is none.

        Raises DeadlineExceeded where there is one that does not answer: it lives, and what it holds is not lost.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        at = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        try:
            # Through /proc/self/fd, since a socket's path may be no longer than 107 bytes.
            sock.connect(f"/proc/self/fd/{at}/keeper.sock")
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            return None
        finally:
            os.close(at)
        link = self._link(sock, name, None)
        try:
            self._greet(link, d)
        except Lost:
            return None
        except IsolatError:
            link.close()
            raise
        return link

    def _link(self, sock: socket.socket, name: str, process: subprocess.Popen[bytes] | None) -> Link:
        link = Link(sock, self._reactor, name)
        link.process = process
        return link

    def _greet(self, link: Link, d: Deadline) -> None:
        frame, _ = link.request(k.HELLO, [(k.T_VERSION, k.VERSION), (k.T_ROLE, "daemon")], d)
        version = frame.int(k.T_VERSION)
        link.pid = frame.int(k.T_PID)
        link.flags = frame.int(k.T_FLAGS, k.FIRST_FLAGS)
        if not OLDEST_VERSION <= version <= k.VERSION:
            link.close()
            raise StartFailed(
                f"the keeper of {link.name} speaks version {version} of the protocol, this Isolat {OLDEST_VERSION} to"
                f" {k.VERSION}",
                hint="use the version of Isolat that started it",
                stage="keeper",
            )


def quit_keeper(link: Link, d: Deadline) -> None:
    """Let the keeper kill what it holds and end; reaps it when it is our child."""
    link.on_closed = None
    with contextlib.suppress(IsolatError):
        link.request(k.QUIT, [], d)
    link.close()
    if link.process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            link.process.wait(5)


def _tail(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(errors="replace").splitlines()[-10:])
    except OSError:
        return ()
