"""A real QEMU under test: started with the descriptor plan of ``isolat.qemu.argv``, spoken with over its monitor."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType

from isolat.deadline import Deadline
from isolat.qemu.qmp import Qmp

_F_ADD_SEALS = 1033
_SEALS = 0xF
JAIL_UID = 0x40000000 + 7 * 65536


def memory(mib: int) -> int:
    """A memfd for a machine's memory."""
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, mib << 20)
    return fd


def seal(fd: int) -> None:
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)


class Running:
    """QEMU with its ends. ``held``: what it finds at 4 and on, with None where its monitor goes."""

    def __init__(self, argv: Sequence[str], held: Sequence[int | None], *, jail: str = "", uid: int = JAIL_UID) -> None:
        self.agent, agent = socket.socketpair()
        control, qmp = socket.socketpair()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the machine
        numbers = [agent.fileno(), *(qmp.fileno() if fd is None else fd for fd in held)]
        start = time.monotonic()
        try:
            self.process = subprocess.Popen(
                _at(numbers, [*_jailed(jail, uid), *argv]),
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                pass_fds=numbers,
                start_new_session=True,
            )
        finally:
            agent.close()
            qmp.close()
        try:
            self.qmp = Qmp.connect(control, Deadline(20))
        except Exception as error:
            error.add_note(self.words())
            self.close()
            raise
        self.qmp_s = time.monotonic() - start  # from the start until the monitor answers

    def words(self) -> str:
        self._words.seek(0)
        return self._words.read().decode(errors="replace")

    @property
    def pid(self) -> int:
        """QEMU's own: what is started in namespaces is a grandchild."""
        pid = self.process.pid
        while True:
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                children = file.read().split()
            if not children:
                return pid
            pid = int(children[0])

    def anonymous_mib(self) -> float:
        """What it has of its own, without what it shares with its template."""
        with open(f"/proc/{self.pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("Anonymous:"))

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            self.qmp.close()
        self.agent.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        self._words.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            error.add_note(self.words()[-2000:])
        self.close()


def _at(numbers: Sequence[int], argv: Sequence[str]) -> list[str]:
    """Put the descriptors at 3, 4, …: first out of each other's way, then in their places. bash(1), "Redirections"."""
    away = " ".join(f"{60 + i}<&{number}" for i, number in enumerate(numbers))
    place = " ".join(f"{3 + i}<&{60 + i} {60 + i}<&-" for i in range(len(numbers)))
    closing = " ".join(f"{number}<&-" for number in numbers if number >= 3 + len(numbers))
    return ["bash", "-c", f'exec {away}; exec {place}; exec {closing}; exec "$@"', "bash", *argv]


def _jailed(jail: str, uid: int) -> list[str]:
    """unshare(1): new namespaces, the jail as the root, /proc in it, a user without rights."""
    if not jail:
        return []
    spaces = ["--mount", "--propagation", "slave", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
    user = ["--setuid", str(uid), "--setgid", str(uid)]
    return ["unshare", *spaces, f"--root={jail}", "--mount-proc=/proc", *user]
