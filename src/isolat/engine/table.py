"""Which environments there are: by id and by name, and what of theirs nobody else may have.

Every change of an environment is told from here to the index and to whoever listens.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from isolat.engine import admission
from isolat.engine.environment import Environment
from isolat.engine.events import Event, EventBus
from isolat.engine.index import Index, Row
from isolat.engine.names import new_name
from isolat.errors import Conflict, NotFound, UsageError


class Table:
    """Safe for several threads at once."""

    def __init__(self, index: Index, first_uid: int) -> None:
        self.events = EventBus()
        self.index = index
        self.changed = time.monotonic()
        self._first_uid = first_uid
        self._lock = threading.Lock()
        self._by_id: dict[str, Environment] = {}
        self._names: dict[str, str] = {}
        self._uids: set[int] = set()
        self._making: dict[str, str] = {}  # id to image digest, of environments that are not in the table yet
        self._closing = False

    def all(self) -> list[Environment]:
        """Every environment, the oldest first."""
        with self._lock:
            return sorted(self._by_id.values(), key=lambda env: env.handle.created_ns)

    def inside(self, outer: Environment) -> list[Environment]:
        """Those that were put into it, whatever state they are in."""
        return [env for env in self.all() if env.handle.around is not None and env.handle.around.id == outer.id]

    def find(self, ref: str) -> Environment:
        """By id, name, or an unambiguous beginning of the id."""
        with self._lock:
            if ref in self._by_id:
                return self._by_id[ref]
            if ref in self._names and self._names[ref] in self._by_id:
                return self._by_id[self._names[ref]]
            found = [env for id, env in self._by_id.items() if ref and id.startswith(ref)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{ref} is the beginning of {len(found)} ids", hint="give more of it, or the name")
        raise NotFound(f"no environment {ref}", hint="`isolat ps --all` lists them")

    # coming

    def close(self) -> None:
        """From now on nothing new is let in."""
        with self._lock:
            self._closing = True

    def reserve(self, wanted: str, id: str) -> str:
        """A name that nobody else has. Raises Conflict when ``wanted`` is taken, or everything is being reset."""
        with self._lock:
            if self._closing:
                raise Conflict("everything is being reset: nothing new is started")
            name = self._free_name(wanted)
            self._names[name] = id
            return name

    def _free_name(self, wanted: str) -> str:
        if wanted in self._names:
            raise Conflict(
                f"the name {wanted} is taken by {self._names[wanted]}",
                hint=f"remove that one with `isolat rm {wanted}`, or use another name",
            )
        if wanted:
            return wanted
        while (name := new_name()) in self._names:
            name = f"{name}_{os.urandom(2).hex()}"
            if name not in self._names:
                break
        return name

    def take_uids(self) -> int:
        """A uid range that nobody else has. Raises Refused when all are taken."""
        with self._lock:
            index = admission.free_uid_index(self._uids, self._first_uid)
            self._uids.add(index)
            return index

    @contextlib.contextmanager
    def uids(self) -> Iterator[int]:
        """The first uid of a range that nobody else has until then."""
        index = self.take_uids()
        try:
            yield admission.uid_base(index)
        finally:
            self.give_back_uids(index)

    def keep_uids(self, index: int) -> None:
        """This range is somebody's whom the table does not know."""
        with self._lock:
            self._uids.add(index)

    def give_back_uids(self, index: int) -> None:
        with self._lock:
            self._uids.discard(index)

    def making(self, id: str, digest: str) -> None:
        """An environment that is being made stands on this image."""
        with self._lock:
            self._making[id] = digest

    def unmade(self, id: str, name: str = "", uid_index: int = -1) -> None:
        """It came to nothing."""
        with self._lock:
            self._making.pop(id, None)
            if self._names.get(name) == id:
                del self._names[name]
            self._uids.discard(uid_index)

    def enter(self, env: Environment) -> bool:
        """Let it in. False: everything is being reset, and it has to go again."""
        with self._lock:
            self._by_id[env.id] = env
            self._names[env.name] = env.id
            self._uids.add(env.handle.uid_index)
            self._making.pop(env.id, None)
            return not self._closing

    def images_in_use(self) -> set[str]:
        """The digests of images that an environment stands on."""
        with self._lock:
            made = {env.handle.digest for env in self._by_id.values() if env.handle.digest}
            return made | set(self._making.values())

    # going, and being told

    def leave(self, env: Environment) -> None:
        with self._lock:
            self._by_id.pop(env.id, None)
            if self._names.get(env.name) == env.id:
                del self._names[env.name]
            self._uids.discard(env.handle.uid_index)
        self.index.drop(env.id)
        env.ended.set()
        env.gone.set()

    def publish(self, what: str, env: Environment, **details: Any) -> None:
        """Tell everybody what happened to it."""
        event = Event(what, env.id, env.name, details=details)
        self.changed = time.monotonic()
        self.index.event(event)
        if what in ("create", "start"):
            self.index.put(row(env))
        self.events.publish(event)


def row(env: Environment) -> Row:
    """An environment's line in the index."""
    handle = env.handle
    code = handle.exit.code if handle.exit else None
    return (env.id, env.name, str(env.state), handle.image, "/".join(handle.layers), handle.created_ns, code)
