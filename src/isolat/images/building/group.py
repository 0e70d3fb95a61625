"""The control group of one build: what it may take at most, and the certain end of whatever is in it.

Unlike an environment's, nobody but the daemon holds it: no keeper, no runtime. A daemon that is killed leaves the empty
directories, which the next one removes with every other group that it does not know (engine/recovery.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from isolat.errors import StoreError
from isolat.linux import cgroup
from isolat.linux.cgroup import Limits
from isolat.places.base import CgroupFacts, CgroupMode

_JOINED = (*cgroup.PLAIN_V1, "devices")
_OPTIONAL = ("memory.memsw.limit_in_bytes", "memory.swap.max")  # kernels that do not count swap have none
_CONTROLLERS = "+cpu +memory +pids"
_ROUNDS = 200
_ROUND_S = 0.02


class Group:
    """``path``: below every hierarchy's mount point. Idempotent both ways."""

    def __init__(self, facts: CgroupFacts, path: str, limits: Limits, devices: Collection[str]) -> None:
        self._facts = facts
        self._path = path
        self._unified = facts.mode is CgroupMode.V2
        self._writes = (*cgroup.writes(facts, path, limits), *cgroup.device_writes(facts, path, devices))

    def __enter__(self) -> Group:
        try:
            for directory in self._directories():
                directory.mkdir(mode=0o755, parents=True, exist_ok=True)
                if self._unified:
                    _enable(directory)
            for file, value in self._writes:
                _write(file, value)
        except OSError as error:
            self.remove()
            raise StoreError(
                f"could not make the control group of a build: {error.filename}: {error.strerror}",
                stage="control group",
                errno=error.errno or 0,
                hint="`isolat doctor` shows what this machine allows",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def join(self) -> tuple[str, ...]:
        """The files to write "0" to."""
        if not self._facts.mounts:
            return ()
        if self._unified:
            return cgroup.procs_files(self._facts, self._path)
        return cgroup.tasks_files(self._facts, self._path, _JOINED)

    def out_of_memory(self) -> bool:
        """Whether the kernel has killed something of it for its limit of memory."""
        return bool(cgroup.read_usage(self._facts, self._path).oom_kills)

    def out_of_processes(self) -> bool:
        """Whether it ever wanted more processes than it may have (cgroup-v1/pids, pids.events)."""
        for directory in self._directories():
            with contextlib.suppress(OSError):
                if not (directory / "pids.events").read_text().startswith("max 0"):
                    return True
        return False

    def remove(self) -> None:
        """Kill what is left in it, and take it away."""
        for _ in range(_ROUNDS):
            left = set(self._pids())
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_ROUND_S)
        for directory in self._directories():
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _pids(self) -> Iterator[int]:
        for directory in self._directories():
            with contextlib.suppress(OSError):
                yield from map(int, (directory / cgroup.PROCS).read_text().split())

    def _directories(self) -> list[Path]:
        only = () if self._unified else _JOINED
        return [Path(path) for path in cgroup.directories(self._facts, self._path, only)]


def _write(file: str, value: str) -> None:
    """Never makes a file. A limit that can't be set is an error: nothing is built without it."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if Path(file).name in _OPTIONAL:
            return
        raise
    try:
        os.write(descriptor, value.encode())
    except OSError as error:
        error.filename = file
        raise
    finally:
        os.close(descriptor)


def _enable(directory: Path) -> None:
    """On v2 a group has the controllers that those above it give their children (cgroups(7), cgroup.subtree_control).

    A group above that has processes of its own gives none; what is missing then shows when a limit is set.
    """
    above = [parent for parent in directory.parents if (parent / "cgroup.subtree_control").exists()]
    for parent in reversed(above):
        with contextlib.suppress(OSError):
            _write(str(parent / "cgroup.subtree_control"), _CONTROLLERS)
