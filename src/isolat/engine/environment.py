"""One environment in the daemon's memory: its handle, the link to its keeper, and the operation that holds it.

One that was put into another has no keeper of its own: its link is that one's.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from isolat.deadline import Deadline
from isolat.engine.handle import Handle, write_handle
from isolat.errors import Busy, Lost
from isolat.layers.base import State
from isolat.places.link import Link
from isolat.spec.model import Spec
from isolat.spec.parse import parse

_LOOK_AGAIN_S = 0.5


class Environment:
    """What the engine knows of one environment. ``handle`` is replaced whole, under the operation that changes it."""

    def __init__(self, handle: Handle, directory: Path, outer: Environment | None = None) -> None:
        """``outer``: the one that it is in; None also where that is gone."""
        self.handle = handle
        self.directory = directory
        self.outer = outer
        self.hosting = threading.Lock()  # held while another one is let in, and while it must hold none
        self.brought: set[str] = set()  # what has been brought in for those by this daemon: CanHost
        self._link: Link | None = None
        self.ended = threading.Event()  # settled: EXITED or LOST, and on disk
        self.gone = threading.Event()  # removed, nothing left
        self.forced = False  # a stop had to kill it
        self.stop_reason = ""  # why the engine itself ended it
        self.remark = ""  # what else is to be said when it has ended
        self.parting = ""  # what is said of its end to those that are in it
        self._condition = threading.Condition()
        self._operation = ""
        if not handle.state.alive:
            self.ended.set()

    @property
    def id(self) -> str:
        return self.handle.id

    @property
    def name(self) -> str:
        return self.handle.name

    @property
    def state(self) -> State:
        return self.handle.state

    @property
    def link(self) -> Link | None:
        """The connection to the keeper that holds it."""
        if self.handle.around is None:
            return self._link
        return self.outer.link if self.outer else None

    @link.setter
    def link(self, link: Link | None) -> None:
        assert self.handle.around is None, "its link is another one's"
        self._link = link

    @cached_property
    def spec(self) -> Spec:
        """The spec of its handle, read again after a restart of the daemon."""
        return parse(self.handle.spec)

    @contextmanager
    def operation(self, what: str, wait: Deadline | None = None) -> Iterator[None]:
        """Hold the environment for one operation.

        Raises Busy, naming the other operation, at once or when ``wait`` has passed.
        """
        with self._condition:
            if self._operation and (
                wait is None or not self._condition.wait_for(lambda: not self._operation, wait.left_s())
            ):
                raise Busy(f"{self.name} is busy: {self._operation}", hint="try again when that has ended")
            self._operation = what
        try:
            yield
        finally:
            with self._condition:
                self._operation = ""
                self._condition.notify_all()

    def finished(self, seconds: float) -> bool:
        """Wait for its end; where it is to be removed then, for that. False: not within this time."""
        end = time.monotonic() + seconds
        while True:
            # What has ended may be kept after all: ``Carried.kept``.
            done = self.gone if self.handle.remove else self.ended
            left_s = end - time.monotonic()
            if done.wait(max(0.0, min(left_s, _LOOK_AGAIN_S))):
                return True
            if left_s <= 0:
                return False

    @staticmethod
    def new_exec_key() -> str:
        """A key that no exec had, under this daemon or one before it: the same key would be the same process."""
        return f"exec-{os.urandom(8).hex()}"

    def save(self, **changes: object) -> None:
        """Replace the handle, on disk first."""
        handle = self.handle.with_(**changes) if changes else self.handle
        write_handle(self.directory, handle)
        self.handle = handle

    def live_link(self, _: Deadline) -> Link:
        """The link to the keeper that holds it. Raises Lost when there is none."""
        if self.link is None or self.link.closed:
            raise Lost(f"the keeper of {self.name} is gone", hint=f"`isolat rm {self.name}` removes what is left")
        return self.link
