"""Named volumes as environments use them: who has which, what may be removed, and who may write one now.

Who uses a volume is read from the handles of environments and snapshots, never counted. What is being made and has no
handle yet has a *claim*: it is taken before anything is touched, so that no volume goes under an environment that is
just being made, and two that must not write one volume both are not both let in.

A volume that does not exist is made when an environment with it is started, with the default size, and stays whatever
becomes of that environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from isolat.deadline import Deadline
from isolat.engine.handle import HANDLE, Handle
from isolat.engine.journal import log
from isolat.engine.names import new_id
from isolat.engine.paths import StateRoot
from isolat.errors import Conflict, NotFound, StoreError, Unsupported
from isolat.images.pool import Pool
from isolat.layers import registry
from isolat.layers.base import State
from isolat.layers.volumes import are_copied
from isolat.linux import resolve
from isolat.spec import model
from isolat.spec.mounts import named_volumes
from isolat.volumes import record, transfer
from isolat.volumes.record import DEFAULT_BYTES, Volume
from isolat.volumes.store import Fill, Store

ENVIRONMENT, SNAPSHOT = "environment", "snapshot"
_PLAIN = (0, 0, 0o755)  # owner, group and mode of a volume that nothing was put into


@dataclass(frozen=True)
class User:
    """One use of a volume. ``copies``: it works on a copy, which is brought back when it has ended."""

    volume: str
    kind: str
    id: str
    name: str
    state: str
    read_only: bool
    copies: bool

    @property
    def alive(self) -> bool:
        return self.state in (State.CREATING, State.RUNNING)

    def describe(self) -> str:
        return f"the {self.kind} {self.name}" + (f" ({self.state})" if self.state else "")


def users_of(handle: Handle, snapshot: str = "") -> Iterator[User]:
    """What an environment uses, or the snapshot of that name."""
    layer = registry.LAYERS.get(handle.frames[0].layer) if handle.frames else None
    copies = layer is not None and are_copied(layer.capabilities, handle.spec)
    kind, name, state = (SNAPSHOT, snapshot, "") if snapshot else (ENVIRONMENT, handle.name, str(handle.state))
    for volume in named_volumes(handle.spec.get("volumes")):
        yield User(volume.source, kind, handle.id, name, state, volume.read_only, copies)


def unread_users(directory: Path) -> tuple[User, ...]:
    """What the environment of this directory uses, whose handle can't be read whole: as far as it can be told."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        data = json.loads((directory / HANDLE).read_text(encoding="utf-8", errors="surrogateescape"))
        found = named_volumes(data["spec"]["volumes"])
        name = str(data.get("name", directory.name))
        return tuple(User(one.source, ENVIRONMENT, directory.name, name, "", one.read_only, False) for one in found)
    return ()


@dataclass(eq=False)
class Claim:
    """What an environment that is being made will use. ``open`` makes it true."""

    volumes: tuple[model.Volume, ...]  # all of them, in order; directories of this machine are nobody's concern
    copies: bool
    opened: set[str] = field(default_factory=set)  # what its application may be writing to already

    def writes(self, name: str) -> bool:
        return any(volume.source == name and not volume.read_only for volume in self.volumes)

    def names(self) -> list[str]:
        return list(dict.fromkeys(volume.source for volume in self.volumes if volume.named))


class Volumes:
    """All named volumes of one state root. Safe for several threads at once."""

    def __init__(self, paths: StateRoot, pool: Pool, users: Callable[[], Iterable[User]]) -> None:
        self.store = Store(paths.volumes, pool)
        self._users = users
        self._lock = threading.Lock()  # claims, and what is decided by who uses what
        self._claims: set[Claim] = set()
        self._held: dict[str, threading.Lock] = {}

    def start(self) -> None:
        """Complete what a daemon that was killed had begun."""
        for line in self.store.sweep():
            log(line)

    @contextlib.contextmanager
    def _alone_at(self, name: str) -> Iterator[None]:
        """One at a time makes, fills or removes a volume; others of that name wait."""
        with self._lock:
            held = self._held.setdefault(name, threading.Lock())
        with held:
            yield

    # looking

    def find(self, name: str) -> Volume:
        """Raises NotFound, and StoreError for what can't be read."""
        return self.store.get_ready(name)

    def users(self) -> dict[str, tuple[User, ...]]:
        """Who uses which volume, whether that is there or not."""
        found: dict[str, list[User]] = {}
        for user in self._users():
            found.setdefault(user.volume, []).append(user)
        return {name: tuple(users) for name, users in found.items()}

    def usage(self) -> dict[str, int]:
        """What each volume takes, in bytes. What was just deleted counts for up to 30 s more."""
        found = {volume.name: self.store.used_bytes(volume.name) for volume in self.list()}
        return {name: size for name, size in found.items() if size is not None}

    def unused(self) -> tuple[Volume, ...]:
        """Those that nobody uses."""
        taken = self._taken()
        return tuple(volume for volume in self.list() if volume.name not in taken)

    def _taken(self) -> set[str]:
        with self._lock:
            return {user.volume for user in self._users()} | {name for claim in self._claims for name in claim.names()}

    def check(self) -> Sequence[str]:
        """What does not fit together, a line each. Changes nothing."""
        there = {volume.name for volume in self.list()}
        lost = [
            f"{user.describe()} uses the volume {name}, which is not there"
            for name, users in sorted(self.users().items())
            if name not in there and not self._is_claimed(name)
            for user in users
        ]
        return [*self.store.problems(), *lost]

    def _is_claimed(self, name: str) -> bool:
        with self._lock:
            return any(name in claim.names() for claim in self._claims)

    # making and removing

    def create(self, name: str = "", size_bytes: int = 0, labels: tuple[tuple[str, str], ...] = ()) -> Volume:
        """Make it; the one that is there already is as good, where it has this size. 0: the default one.

        Raises UsageError for a name that is none, Conflict for another size, Refused without a pool, StoreError.
        """
        name = name or new_id()
        record.check_name(name)
        with self._alone_at(name):
            found = self._whole(name)
            if found is None:
                self.store.require_pool()
                return self.store.make(Volume(name, size_bytes or DEFAULT_BYTES, time.time_ns(), labels))
        if size_bytes not in (0, found.size_bytes):
            raise Conflict(
                f"there is a volume {name}, of {found.size_bytes} bytes and not {size_bytes}",
                hint="use that one, or another name",
            )
        return found

    def _whole(self, name: str) -> Volume | None:
        """The volume, after what was left half-way by a failure before is completed; None where there is none."""
        found = self.store.get(name)
        if found is None or found.state is record.State.READY:
            return found
        if found.state is record.State.NEW:
            self.store.require_pool()
            return self.store.make(found)
        self.store.unmake(name)
        return None

    def remove(self, name: str) -> int:
        """Remove it with all that is in it; how many bytes that was.

        Raises NotFound, Conflict that names who uses it, StoreError. One whose description is damaged goes as well.
        """
        if not record.NAME.fullmatch(name) or not self.store.known(name):
            raise NotFound(f"no volume {name}", hint="`isolat volume ls` lists them")
        with self._alone_at(name):
            size = self.store.used_bytes(name) or 0
            with self._lock:
                self._check_unused(name)
                self.store.bury(name)
            self.store.unmake(name)
        return size

    def _check_unused(self, name: str) -> None:
        users = [user for user in self._users() if user.volume == name]
        if users:
            said = ", ".join(dict.fromkeys(user.describe() for user in users))
            first = users[0]
            remedy = f"isolat rm {first.name}" if first.kind == ENVIRONMENT else f"isolat snapshot rm {first.name}"
            raise Conflict(f"the volume {name} is used by {said}", hint=remedy)
        if any(name in claim.names() for claim in self._claims):
            raise Conflict(f"the volume {name} is used by an environment that is just being made")

    def prune(self, names: Sequence[str] | None = None) -> Sequence[tuple[Volume, int]]:
        """Remove those that nobody uses, or of these those; each with the bytes that it had."""
        gone = []
        for volume in self.unused():
            if names is None or volume.name in names:
                with contextlib.suppress(NotFound, Conflict):  # somebody else was quicker
                    gone.append((volume, self.remove(volume.name)))
        return gone

    # using

    @contextlib.contextmanager
    def claim(self, volumes: Iterable[model.Volume], *, copies: bool) -> Iterator[Claim]:
        """For as long as an environment with these volumes is being made. ``copies``: it works on copies of them.

        Raises Conflict where another one writes what this one would, Refused where there is no pool. Makes nothing.
        """
        claim = Claim(tuple(volumes), copies)
        if claim.names():
            self.store.require_pool()
            _check_copies(claim)
        with self._lock:
            for name in claim.names():
                self._check_writers(claim, name)
            self._claims.add(claim)
        try:
            yield claim
        finally:
            with self._lock:
                self._claims.discard(claim)

    def _check_writers(self, claim: Claim, name: str) -> None:
        """Copies are merged file by file at the end, so nobody else may write while one is away that will come back."""
        if not claim.writes(name):
            return
        others = [
            *((user.describe(), user.copies) for user in self._users()
              if user.volume == name and user.alive and not user.read_only),
            *(("an environment that is just being made", other.copies) for other in self._claims if other.writes(name)),
        ]  # fmt: skip
        for other, copies in others:
            if copies or claim.copies:
                whose = "it" if copies else "a machine"
                raise Conflict(
                    f"the volume {name} is written by {other}, and {whose} works on a copy that comes back at its end",
                    hint=f"wait until that one has ended, or only read it: -v {name}:TARGET:ro",
                )

    def open(
        self, claim: Claim, given: Sequence[int], image: str, d: Deadline, opened: ExitStack
    ) -> tuple[Sequence[int], Sequence[str]]:
        """A descriptor for each volume of the claim, in order; and what of the image was left out, in words.

        ``given``: those of directories, which came with the request. ``opened`` closes the others. What does not exist
        is made; what is empty, and nobody has yet, gets what the image has at its place. ``image``: where that is
        mounted, or empty. Raises StoreError.
        """
        found, left, theirs = [], list[str](), iter(given)
        for volume in claim.volumes:
            if not volume.named:
                found.append(next(theirs))
                continue
            fd = self._use(claim, volume, image, left, d)
            opened.callback(os.close, fd)
            found.append(fd)
        return found, left

    def _use(self, claim: Claim, volume: model.Volume, image: str, left: MutableSequence[str], d: Deadline) -> int:
        name = volume.source
        with self._alone_at(name), _content(image, volume.target) as content:
            fill = self._fill(name, content, left, d) if content >= 0 else None
            found = self._whole(name)
            if found is None:
                self.store.require_pool()
                self.store.make(Volume(name, DEFAULT_BYTES, time.time_ns()), fill)
            elif fill is not None and self._is_first(claim, name) and self.store.is_empty(name):
                self.store.make(found, fill)
            fd = self.store.open(name)
            with self._lock:
                claim.opened.add(name)
            return fd

    def _fill(self, name: str, content: int, left: MutableSequence[str], d: Deadline) -> Fill:
        def fill(target: int) -> None:
            try:
                left.extend(transfer.seed(content, target, d))
            except StoreError as error:
                raise StoreError(
                    f"what the image has there can't be put into the volume {name}: {error.message}",
                    hint="a larger one can be made before it is used: isolat volume create --size",
                ) from error

        return fill

    def _is_first(self, claim: Claim, name: str) -> bool:
        """Whether nobody else can be writing to it by now."""
        with self._lock:
            has_it = any(user.volume == name and user.state == State.RUNNING for user in self._users())
            return not has_it and not any(name in one.opened for one in self._claims if one is not claim)

    @contextlib.contextmanager
    def room(self, name: str, more_bytes: int) -> Iterator[tuple[int, int]]:
        """Its descriptor, and how many bytes there is still room for, to bring back what a machine has written.

        A file that is replaced is there twice for a moment, so meanwhile it may hold ``more_bytes`` more: whoever
        writes keeps to the room. Raises NotFound, StoreError.
        """
        size, fd = self.find(name).size_bytes, self.store.open(name)
        try:
            used = self.store.used_bytes(name, exact=True) or 0
            self.store.set_limit(name, size + more_bytes)
            try:
                yield fd, size - used
            finally:
                self.store.set_limit(name, size)
        finally:
            os.close(fd)

    def list(self) -> list[Volume]:
        """Every volume, by name. What can't be read is left to ``check``."""
        return sorted(self.store.ready(), key=lambda volume: volume.name)


def _check_copies(claim: Claim) -> None:
    names = [volume.source for volume in claim.volumes]
    for name in claim.names():
        if claim.copies and names.count(name) > 1 and claim.writes(name):
            raise Unsupported(
                f"a machine can't have the volume {name} twice: it would be two copies of it",
                hint="give it once, or only to be read (:ro)",
            )


@contextlib.contextmanager
def _content(image: str, target: str) -> Iterator[int]:
    """The directory that an image has at this place, opened; -1 where there is none, or nothing about it."""
    fd = -1
    if image:
        with contextlib.suppress(OSError):
            fd = resolve.open_directory(image, target)
    try:
        yield fd if fd >= 0 and _is_something(fd) else -1
    finally:
        if fd >= 0:
            os.close(fd)


def _is_something(fd: int) -> bool:
    st = os.fstat(fd)
    if (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) != _PLAIN:
        return True
    with os.scandir(f"/proc/self/fd/{fd}") as entries:
        return next(entries, None) is not None
