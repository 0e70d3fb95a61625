"""A small pool of machines that are made before anybody asks: cloned, exercised once, and stopped.

Under emulation a machine's first second is spent translating code, and what is translated lives in its process: only
one that has already done what will be asked of it answers in milliseconds. A machine of the pool is an environment
that is half made, with a handle that says so: a daemon that is killed leaves what the next one undoes like any other
half-made environment. Each is given away once, with its id, and never comes back.

Each kind (template, limits) that was asked for is kept ``most`` in number, for as long as it is asked for again and
memory is plenty. They are made one after the other, at the lowest priority.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from isolat.engine import admission
from isolat.engine.aside import Aside, Work
from isolat.engine.environment import Environment
from isolat.engine.journal import log

DEFAULT_MOST = 2
KINDS_MOST = 8  # so many kinds have machines ready at once; the one that nobody has asked for the longest makes room
UNUSED_S = 600.0
MEMORY_FREE_BYTES = 2 << 30  # with less than this available nothing is made in advance
_PAUSE_S = 0.06  # after one was taken: who took it goes first
_FAILED_S = 30.0
_IDLE = os.SCHED_IDLE if hasattr(os, "SCHED_IDLE") else os.SCHED_OTHER

Make = Callable[[], Environment]
Undo = Callable[[Environment], None]


@dataclass
class _Kind:
    make: Make
    ready: list[Environment] = field(default_factory=list)
    asked_s: float = 0.0
    not_before_s: float = 0.0


class WarmPool:
    """``undo`` removes a machine that nobody took."""

    def __init__(self, undo: Undo, most: int) -> None:
        self._undo = undo
        self._most = most
        self._kinds: dict[str, _Kind] = {}
        self._aside = Aside("warm", self._next, self._wait_s)

    def take(self, key: str, make: Make) -> Environment | None:
        """One that is ready, or None. Either way more of this kind are made, with ``make``."""
        if not self._most or not key:
            return None
        with self._aside.condition:
            if self._aside.closed:
                return None
            kind = self._kinds.setdefault(key, _Kind(make))
            kind.make, kind.asked_s = make, time.monotonic()
            kind.not_before_s = max(kind.not_before_s, time.monotonic() + _PAUSE_S)
            taken = kind.ready.pop(0) if kind.ready else None
            self._aside.wake()
        return taken

    def count(self) -> int:
        """How many are ready."""
        with self._aside.condition:
            return sum(len(kind.ready) for kind in self._kinds.values())

    def close(self) -> None:
        """Undo all that are ready, and make no more."""
        self._aside.close()
        self.drain()

    def drain(self) -> None:
        """Undo all that are ready now."""
        with self._aside.condition:
            ready = [env for kind in self._kinds.values() for env in kind.ready]
            self._kinds.clear()
        for env in ready:
            self._undo(env)

    # making them

    def _wait_s(self) -> float:
        now = time.monotonic()
        soon = [kind.not_before_s - now for kind in self._kinds.values() if len(kind.ready) < self._most]
        return max(0.005, min([*soon, 30.0]))

    def _next(self) -> Work | None:
        """What is to be done next, if anything; with the lock held."""
        now = time.monotonic()
        for key, kind in list(self._kinds.items()):
            if now - kind.asked_s > UNUSED_S or kind is self._oldest():
                del self._kinds[key]
                return partial(self._undo_all, kind)
            if len(kind.ready) < self._most and kind.not_before_s <= now:
                return partial(self._make, key, kind)
        return None

    def _oldest(self) -> _Kind | None:
        """The kind that has to go because there are too many; with the lock held."""
        if len(self._kinds) <= KINDS_MOST:
            return None
        return min(self._kinds.values(), key=lambda kind: kind.asked_s)

    def _undo_all(self, kind: _Kind) -> None:
        for env in kind.ready:
            self._undo(env)

    def _make(self, key: str, kind: _Kind) -> None:
        if admission.memory_available_bytes() < MEMORY_FREE_BYTES:
            kind.not_before_s = time.monotonic() + _FAILED_S
            return
        try:
            env = kind.make()
        except Exception as error:  # what ends this thread would be the end of the pool
            log(f"a machine could not be made in advance: {error}")
            kind.not_before_s = time.monotonic() + _FAILED_S
            return
        with self._aside.condition:
            if not self._aside.closed and self._kinds.get(key) is kind:
                kind.ready.append(env)
                return
        self._undo(env)


def lowest_priority(pid: int) -> None:
    """Of a keeper, which what it starts inherits. Not ours: a thread that waits for its turn holds up all others."""
    _schedule(pid, _IDLE)


def normal_priority(pid: int) -> None:
    """Every thread of this process is scheduled like others again (sched(7))."""
    _schedule(pid, os.SCHED_OTHER)


def _schedule(pid: int, policy: int) -> None:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                os.sched_setscheduler(int(task.name), policy, os.sched_param(0))
