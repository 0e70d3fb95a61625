"""How an environment ends: settled when its application has ended, destroyed when it is removed.

Both revert steps of its handle, and reverting what is absent is fine: so the same code undoes a half-made environment,
one whose daemon was killed in the middle of either, and one whose keeper is gone.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import replace
from pathlib import Path

from isolat.checkpoint import checkpoint
from isolat.deadline import Deadline
from isolat.engine import within
from isolat.engine.carrying import Carried, carry_back, in_all
from isolat.engine.environment import Environment
from isolat.engine.handle import HANDLE, guest_words, read_exit
from isolat.engine.journal import log
from isolat.engine.keepers import Keepers, quit_keeper
from isolat.engine.volumes import Volumes
from isolat.errors import IsolatError
from isolat.layers.base import State
from isolat.linux import cgroup
from isolat.places.base import Exit, Facts
from isolat.places.link import Link
from isolat.places.steps import Cgroup, Idmap, Mount, Step
from isolat.places.wired import WiredPlace
from isolat.trace import mark

_REVERT_S = 60.0


class Endings:
    """Settles and destroys. The caller holds the environment's operation."""

    def __init__(self, keepers: Keepers, facts: Facts, cgroup_parent: str, volumes: Volumes) -> None:
        self._keepers = keepers
        self._volumes = volumes
        self._cgroup_parent = cgroup_parent
        self.facts = facts

    def carry_back(self, env: Environment) -> Carried:
        """Carry back what its machine has changed in its volumes; once that is done there is nothing more to do."""
        return carry_back(env, self.facts, self._volumes)

    def settle(self, env: Environment, exit: Exit | None, reason: str = "", carried: Carried | None = None) -> None:
        """Record how it ended (LOST without ``exit``), and undo all but what outlives the application."""
        handle = env.handle
        carried = carried or self.carry_back(env)
        if exit is not None:
            exit = replace(exit, forced=env.forced or exit.forced, oom=exit.oom or self.oom(env))
        steps = [step for step in handle.frames[0].steps if not _kept(step)]
        try:
            self._revert(env, steps)
        except IsolatError as error:
            log(f"{env.name}: something was left when it ended, `rm` tries again: {error.message}")
        env.save(
            state=State.EXITED if exit is not None else State.LOST,
            exit=exit,
            reason=in_all(reason or env.stop_reason or self.death(env, exit), env.remark, carried.said),
            remove=handle.remove and not carried.kept,
            started_ns=handle.started_ns or (exit.started_ns if exit else 0),
        )
        if handle.around is not None:
            within.forget(env, self.facts)

    def destroy(self, env: Environment) -> None:
        """Remove every trace. Raises what could not be undone; the handle then stays, and it can be tried again."""
        link = env.link
        if env.handle.around is not None:
            within.end(env, self.facts)
        elif link is not None and not link.closed and link.exit_of(env.handle.main_name) is None:
            quit_keeper(link, Deadline(10))
        mark("ended")
        self._revert(env, list(env.handle.frames[0].steps) if env.handle.frames else [])
        mark("steps-reverted")
        checkpoint()
        if env.handle.around is not None:
            within.forget(env, self.facts)
        remove_directory(env.directory)
        mark("directory-removed")
        env.handle = env.handle.with_(state=State.REMOVING)

    def _revert(self, env: Environment, steps: list[Step]) -> None:
        if env.handle.around is not None:
            within.revert(env, steps, self.facts)
            return
        d = Deadline(_REVERT_S)
        if env.link is None or env.link.closed:
            # Its mounts went with its keeper's mount namespace.
            steps = [step for step in steps if not isinstance(step, (Mount, Idmap))]
            if not steps:
                return
            env.link = self._keepers.start(env.directory, env.name, d)
        link: Link = env.link
        try:
            WiredPlace(lambda _: link, self.facts).revert(steps, d)
        finally:
            quit_keeper(link, d)
            env.link = None

    def oom(self, env: Environment) -> bool:
        """Whether the kernel killed something in its control group for want of memory. Asked before that is removed."""
        if env.handle.around is not None:
            return within.oom(env, self.facts)
        if not any(isinstance(step, Cgroup) for step in env.handle.frames[0].steps):
            return False
        usage = cgroup.read_usage(self.facts.cgroups, f"{self._cgroup_parent}/{env.id}")
        return bool(usage.oom_kills)

    def death(self, env: Environment, exit: Exit | None) -> str:
        """What is said where the application ended because its machine, or init, did, unless that was asked for."""
        if env.handle.around is not None:
            return within.fate(env, exit, self.facts)
        if exit is None or not exit.with_guest or exit.forced:
            return ""
        words = guest_words(env.directory)
        return f"what it ran in ended under it{f', its last words: {words}' if words else ''}"


def _kept(step: Step) -> bool:
    return bool(getattr(step, "keep", False))


def recorded_exit(env: Environment) -> Exit | None:
    """The exit record that its keeper wrote, if the application has ended under it."""
    return read_exit(env.directory)


def remove_directory(directory: Path) -> None:
    """The environment's directory, its handle last: until then it can be found and removed again."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(directory.iterdir()):
            if entry.name == HANDLE:
                continue
            if entry.is_dir() and not entry.is_symlink():
                _remove_tree(entry)
            else:
                entry.unlink(missing_ok=True)
        checkpoint()
        (directory / HANDLE).unlink(missing_ok=True)
        directory.rmdir()


def _remove_tree(path: Path) -> None:
    for attempt in range(3):
        try:
            shutil.rmtree(path)
            return
        except FileNotFoundError:
            return
        except OSError:
            if attempt == 2:
                raise
            time.sleep(0.05)  # a keeper that is just ending may still write its log
