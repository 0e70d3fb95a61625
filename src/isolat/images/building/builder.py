"""``isolat build``: a Containerfile becomes an image of the store. buildah builds, in a sandbox of ours.

In this order: what is missing or too much is refused; a turn, a uid range, a workplace and a control group are taken;
the images that it stands on are found; the sandbox is made, buildah builds in it, and it ends (job.py); the result is
read, verified and taken into the store; what buildah leaves becomes the cache. Whatever ends it earlier, everything
that was taken is given back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from isolat.errors import Conflict
from isolat.images.building.group import Group
from isolat.images.building.job import CacheDamaged, Job, Pull, Request, Telling
from isolat.images.building.sandbox import Cancelled
from isolat.images.building.storage import Storage
from isolat.images.building.tools import Tools, find_tools
from isolat.images.image import Image
from isolat.images.pool import Pool
from isolat.images.reference import parse_name
from isolat.images.store import ImageStore
from isolat.linux.cgroup import Limits
from isolat.oci.config import device_rules
from isolat.places.base import Facts
from isolat.spec.model import DEFAULT_CPUS, DEFAULT_PIDS

MEMORY_BYTES = 2 << 30
MOST_AT_ONCE = 4
_TURN_S = 0.5
_CLOSE_S = 10.0


class Uids:
    """How a uid range is taken: ``take`` gives its number, ``base`` its first uid."""

    def __init__(self, take: Callable[[], int], give_back: Callable[[int], None], base: Callable[[int], int]) -> None:
        self._take, self._give_back, self._base = take, give_back, base

    @contextlib.contextmanager
    def taken(self) -> Iterator[int]:
        index = self._take()
        try:
            yield self._base(index)
        finally:
            self._give_back(index)


class Builder:
    """The builds of one state root. Safe for several threads."""

    def __init__(self, root: Path, store: ImageStore, pool: Pool, facts: Facts, cgroup: str, uids: Uids) -> None:
        """``cgroup``: the control group of the state root, below which each build has its own."""
        self.storage = Storage(root, pool)
        self.pull: Pull | None = None  # how an image comes from a registry, where that can be done
        self._store = store
        self._facts = facts
        self._cgroup = cgroup
        self._uids = uids
        self._turns = threading.BoundedSemaphore(MOST_AT_ONCE)
        self._closing = threading.Event()
        self._alive = 0
        self._changed = threading.Condition()

    def build(self, id: str, request: Request, telling: Telling) -> Image:
        """Raises BuildFailed when the Containerfile does not build, Cancelled when the caller has gone."""
        found_tools = find_tools()
        request = replace(
            request, names=[parse_name(name) for name in request.names], memory_bytes=self.memory(request)
        )
        heard = replace(telling, gone=lambda: self._closing.is_set() or telling.gone())
        try:
            with self._turn(heard), self._uids.taken() as uid_base:
                return self._twice(id, request, heard, uid_base, found_tools)
        except Cancelled:
            if self._closing.is_set():
                raise Conflict("the daemon ends, and with it every build") from None
            raise

    def _twice(self, id: str, request: Request, telling: Telling, uid_base: int, found_tools: Tools) -> Image:
        """A damaged cache is no reason not to build."""
        try:
            return self._in_place(id, request, telling, uid_base, found_tools)
        except CacheDamaged:
            self.storage.prune()
            telling.line("note: the cache of builds was damaged; it is gone, and the build begins anew")
            return self._in_place(id, request, telling, uid_base, found_tools)

    def memory(self, request: Request) -> int:
        """The limit that was asked for, else the default, or half of this machine's where that is less."""
        return request.memory_bytes or min(MEMORY_BYTES, self._facts.memory_bytes // 2)

    def _in_place(self, id: str, request: Request, telling: Telling, uid_base: int, found_tools: Tools) -> Image:
        path = f"{self._cgroup}/build-{id}"
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(self.storage.workplace(id, request.disk_bytes, request.memory_bytes))
            build = stack.enter_context(self._store.build())
            group = stack.enter_context(Group(self._facts.cgroups, path, self._limits(request), device_rules()))
            job = Job(self._store, request, telling, place, build, group, self._facts.machine, self.pull)
            try:
                return job.run(self.storage.dir, uid_base, found_tools)
            finally:
                group.remove()
                if job.settled:
                    self.storage.keep(place)

    def _limits(self, request: Request) -> Limits:
        return Limits(
            memory_bytes=request.memory_bytes,
            memory_swap_bytes=request.memory_bytes,
            cpus=min(DEFAULT_CPUS, float(self._facts.cpus)),
            pids=DEFAULT_PIDS,
        )

    @contextlib.contextmanager
    def _turn(self, telling: Telling) -> Iterator[None]:
        """One of a few at a time; the others say that they wait."""
        if not self._turns.acquire(blocking=False):
            telling.progress(f"waiting: {MOST_AT_ONCE} builds are under way", 0, 0)
            while not self._turns.acquire(timeout=_TURN_S):
                if telling.gone():
                    raise Cancelled
        with self._changed:
            self._alive += 1
        try:
            yield
        finally:
            self._turns.release()
            with self._changed:
                self._alive -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """End every build that is under way, and wait until it has cleaned up."""
        self._closing.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._alive, _CLOSE_S)

    @property
    def alive_count(self) -> int:
        return self._alive
