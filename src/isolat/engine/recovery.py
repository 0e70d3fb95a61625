"""What a daemon does first: find every environment again, whatever killed its predecessor, and sweep the rest.

The truth is in handles, exit records and in who holds what now (keepers). What no handle knows is nobody's:
directories, control groups and runtime states with no handle are removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from isolat.deadline import Deadline
from isolat.engine.endings import Endings, recorded_exit, remove_directory
from isolat.engine.environment import Environment
from isolat.engine.handle import HANDLE, Handle, read_handle
from isolat.engine.journal import log
from isolat.engine.keepers import Keepers, quit_keeper
from isolat.engine.paths import StateRoot
from isolat.errors import IsolatError, StoreError
from isolat.layers.base import State
from isolat.places.base import Facts
from isolat.places.wired import WiredPlace

_FIND_S = 3.0


class Recovery:
    def __init__(self, paths: StateRoot, keepers: Keepers, endings: Endings, boot_id: str) -> None:
        self._paths = paths
        self._keepers = keepers
        self._endings = endings
        self._boot_id = boot_id
        self.unread: dict[str, int] = {}  # ids whose handle could not be read, with their uid range: nothing is swept

    def find(self) -> Iterator[Environment]:
        """Every environment that is there, with the state it really is in; after that the ones that are in it."""
        found: dict[str, Environment] = {}
        for handle, directory in _outer_first(self._read()):
            env = Environment(handle, directory, found.get(handle.around.id) if handle.around else None)
            if self.recover(env):
                found[env.id] = env
                yield env

    def _read(self) -> Iterator[tuple[Handle, Path]]:
        for directory in sorted(self._paths.envs.iterdir()):
            try:
                handle = read_handle(directory)
            except StoreError as error:
                log(f"{error.message}; it is left as it is")
                self.unread[directory.name] = _uid_index(directory)
                continue
            if handle is None:
                self._sweep_directory(directory)
            else:
                yield handle, directory

    def recover(self, env: Environment) -> bool:
        """Bring the environment up to what is true. False: it was half-made or half-removed, and is gone now."""
        try:
            rebooted = env.handle.boot_id != self._boot_id
            if env.handle.around is not None:
                return self._recover_inner(env, rebooted)
            link = None if rebooted else self._keepers.find(env.directory, env.name, Deadline(_FIND_S))
            env.link = link
            if env.state == State.REMOVING:
                self._endings.destroy(env)
                return False
            if env.state.alive:
                return self._recover_alive(env, rebooted)
            if link is not None:
                quit_keeper(link, Deadline(_FIND_S))
                env.link = None
        except (IsolatError, OSError) as error:
            log(f"{env.name}: recovering it failed, `rm` tries again: {error}")
        return True

    def _recover_inner(self, env: Environment, rebooted: bool) -> bool:
        """One that is in another: its keeper is that one's, which has been found before."""
        if env.outer is not None and env.outer.state.alive and env.outer.link is None:
            return True  # a keeper that does not answer yet: it is asked again, and then for this one, too
        if env.state == State.REMOVING:
            self._endings.destroy(env)
            return False
        return not env.state.alive or self._recover_alive(env, rebooted)

    def _recover_alive(self, env: Environment, rebooted: bool) -> bool:
        exit = recorded_exit(env)
        if exit is None and env.link is not None:
            place = WiredPlace(env.live_link, self._endings.facts)
            main = env.handle.main_name
            found = [proc for proc in place.procs(main, Deadline(_FIND_S)) if proc.key == main]
            if found and found[0].exit is None:
                if env.state == State.CREATING:
                    env.save(state=State.RUNNING, started_ns=found[0].started_ns or time.time_ns())
                return True
            exit = found[0].exit if found else None
        if exit is not None:
            if env.link is not None:
                env.link.record_exit(env.handle.main_name, exit)
            self._endings.settle(env, exit)
            env.ended.set()
            return True
        if env.state == State.CREATING:
            self._endings.destroy(env)
            return False
        reason = "" if env.handle.around else "its keeper was killed, so it is not known how it ended"
        self._endings.settle(env, None, "the host was restarted" if rebooted else reason)
        env.ended.set()
        return True

    def _sweep_directory(self, directory: Path) -> None:
        """A directory whose handle was never written, or was already deleted."""
        with contextlib.suppress(IsolatError, OSError):
            link = self._keepers.find(directory, directory.name, Deadline(_FIND_S))
            if link is not None:
                quit_keeper(link, Deadline(_FIND_S))
        with contextlib.suppress(OSError):
            remove_directory(directory)

    def sweep(self, known: set[str], facts: Facts) -> None:
        """Remove control groups and runtime states of environments that no handle knows."""
        nobodys = [group for group in _groups(self._paths, facts) if group.name not in known]
        for group in nobodys:
            _thaw(group)
        for group in nobodys:
            _remove_group(group)
        for state in self._paths.runtime.iterdir():
            if state.is_dir() and state.name not in known and not state.name.startswith("."):
                shutil.rmtree(state, ignore_errors=True)

    @staticmethod
    def remove_cgroups(paths: StateRoot, facts: Facts) -> None:
        """Every control group of this root, and the common parent where no other root uses it."""
        groups = _groups(paths, facts)
        for group in groups:
            _thaw(group)
        for group in groups:
            _remove_group(group)
        Recovery.leave_cgroups(paths, facts)

    @staticmethod
    def leave_cgroups(paths: StateRoot, facts: Facts) -> None:
        """The parents of this root's control groups, where nothing is in them."""
        for parent in _parents(paths, facts):
            for path in (parent, parent.parent):
                with contextlib.suppress(OSError):
                    path.rmdir()


def _outer_first(found: Iterable[tuple[Handle, Path]]) -> list[tuple[Handle, Path]]:
    """In an order in which none comes before the one that it is in."""
    every = list(found)
    around = {handle.id: handle.around.id for handle, _ in every if handle.around}

    def depth(id: str) -> int:
        return 1 + depth(around[id]) if id in around else 0

    return sorted(every, key=lambda one: depth(one[0].id))


def _uid_index(directory: Path) -> int:
    """The uid range that a handle names which cannot be read whole, or -1: it must not be given to another."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return int(json.loads((directory / HANDLE).read_text(encoding="utf-8"))["uid_index"])
    return -1


def _parents(paths: StateRoot, facts: Facts) -> list[Path]:
    mounts = {mount for _, mount in facts.cgroups.mounts}
    base = facts.cgroups.base.strip("/")
    return [Path(mount) / base / paths.cgroup.strip("/") for mount in sorted(mounts)]


def _groups(paths: StateRoot, facts: Facts) -> list[Path]:
    found = []
    for parent in _parents(paths, facts):
        with contextlib.suppress(OSError):
            found += [entry for entry in parent.iterdir() if entry.is_dir()]
    return found


def _thaw(group: Path) -> None:
    """What is frozen does not even die (freezer-subsystem.rst); it is waited for in all hierarchies."""
    with contextlib.suppress(OSError):
        (group / "freezer.state").write_text("THAWED")


def _remove_group(group: Path) -> None:
    """Kill what is still inside and remove the directory, children first (cgroups(7))."""
    for _ in range(100):
        pids = []
        for procs in group.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                pids += procs.read_text().split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if not pids:
            break
        time.sleep(0.02)
    for path in sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        group.rmdir()
