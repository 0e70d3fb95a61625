"""Forks and snapshots: from an environment that runs to others that go on where it was.

A fork's copy never touches the disk, but for its disk: state and difference are memory of the daemon's until every
child has them. Children map the very memory that their parent's machine began with, fetched from its keeper: the
template may be gone by now, and one made anew would have other pages.

While a machine is copied it stands still for some milliseconds, and its directory has a mark: a daemon that is killed
in that moment leaves it standing, and the next one finds the mark and lets it go on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from isolat.checkpoint import checkpoint
from isolat.deadline import Deadline
from isolat.engine import admission, states
from isolat.engine.creation import Planned
from isolat.engine.environment import Environment
from isolat.engine.handle import Handle
from isolat.engine.hosting import Hosting
from isolat.engine.journal import log
from isolat.engine.keepers import Keepers
from isolat.engine.maker import START_S, Caller, Maker
from isolat.engine.snapshots import DISK, STATE, Snapshot, Snapshots, allocated_bytes, load_memory
from isolat.engine.starting import adopt
from isolat.engine.states import Verb
from isolat.engine.supervisor import OPERATION_WAIT_S, Supervisor
from isolat.engine.table import Table
from isolat.errors import IllegalState, IsolatError, NotFound, Unsupported, UsageError
from isolat.layers import registry
from isolat.layers.base import CanSnapshot, Copied, Copy, Frame, Room, State
from isolat.places.base import Facts, Io, Place, Starting
from isolat.places.wired import WiredPlace
from isolat.qemu import forks
from isolat.spec.model import Spec
from isolat.spec.parse import parse

CHILDREN_MOST = 100
_MARK = "copying"
_GO_ON_S = 10.0
_CHILDREN = ("the children", "make fewer of them, or fork before so much is written")
_SNAPSHOT = ("the snapshot", "stop or remove an environment, or take it before so much is written")
_OWN = ("ram", "state")  # held descriptors that are not what the plan says


@dataclass(frozen=True)
class Forked:
    children: tuple[Environment, ...]
    copied: Copied


@dataclass
class _Child:
    env: Environment
    planned: Planned
    disk: int  # its disk's file


class Copying:
    """The verbs ``fork``, ``snapshot`` and ``run --from-snapshot``."""

    def __init__(
        self,
        facts: Facts,
        keepers: Keepers,
        table: Table,
        supervisor: Supervisor,
        maker: Maker,
        snapshots: Snapshots,
        hosting: Hosting,
    ) -> None:
        self._facts = facts
        self._keepers = keepers
        self._table = table
        self._supervisor = supervisor
        self._maker = maker
        self._snapshots = snapshots
        self._hosting = hosting

    # verbs

    def fork(self, env: Environment, count: int, name: str, caller: Caller) -> Forked:
        """So many environments that go on where this one is. All of them run, or there is none."""
        if name and count > 1:
            raise UsageError("a name is for one child", hint="leave out --name, or -n")
        layer, frame = self._copyable(Verb.FORK, env)
        d = Deadline(START_S)
        with ExitStack() as open_, self._unless_it_fails() as made:
            for _ in range(count):
                made.append(self._prepare(env.handle, layer, frame, name, {}, caller, open_, d))
                checkpoint()
            copy = self._copy_in_memory(env, made[0].disk, open_, d, room=_for_children(count, made[0].disk))
            begun = self._begin(made[0], layer, copy)  # its QEMU starts while the copy is made
            with env.hosting, env.operation("being copied", Deadline(OPERATION_WAIT_S)):
                copied = self._take(env, layer, copy, d)
            admission.check_memory(count * copied.own_bytes, *_CHILDREN)
            for child in made[1:]:
                forks.copy_disk(made[0].disk, child.disk, Deadline(START_S))
            for child, following in zip(made, (*made[1:], None), strict=True):
                this, begun = begun, self._begin(following, layer, copy) if following else begun
                self._finish(child, layer, this, copy)
        children = tuple(child.env for child in made)
        self._table.publish("fork", env, children=[child.id for child in children])
        return Forked(children, copied)

    def snapshot(self, env: Environment, name: str) -> tuple[Snapshot, Copied]:
        """Keep a copy of this environment as it is now."""
        layer, _ = self._copyable(Verb.SNAPSHOT, env)
        d = Deadline(START_S)
        with self._snapshots.making(name, env.handle) as files, ExitStack() as open_:
            with env.hosting, env.operation("being copied", Deadline(OPERATION_WAIT_S)):
                copy = replace(self._copy_in_memory(env, files.disk, open_, d), state=files.state)
                copy = replace(copy, room=_for_snapshot(copy))
                copied = self._take(env, layer, copy, d)
            checkpoint()
            files.keep_memory(copy, d)
            checkpoint()
        self._table.publish("snapshot", env, snapshot=name)
        return self._snapshots.find(name), copied

    def run(
        self, name: str, wanted: Mapping[str, Any], caller: Caller, attach: bool, stdin: bool
    ) -> tuple[Environment, socket.socket | None]:
        """An environment that goes on where the snapshot was. ``wanted``: keys of the spec that are its own.

        Returns the client's end of the streams when attached.
        """
        snapshot = self._snapshots.find(name)
        then = snapshot.handle
        layer = registry.LAYERS[then.frames[0].layer]
        if not isinstance(layer, CanSnapshot):
            raise Unsupported(f"the layer {then.frames[0].layer} has no snapshots")
        d = Deadline(START_S)
        with ExitStack() as open_, self._unless_it_fails() as made:
            try:
                child = self._prepare(then, layer, then.frames[0], "", wanted, caller, open_, d, base=snapshot.id)
            except NotFound as error:
                raise NotFound(f"the snapshot {name} stands on an image that is gone: {error.message}") from error
            made.append(child)
            checkpoint()
            copy = self._opened(snapshot, child, open_, d)
            begun = self._begin(child, layer, copy)
            ours = self._finish(child, layer, begun, copy, attach=attach, stdin=stdin)
        return child.env, ours

    # taking copies

    def _copyable(self, verb: Verb, env: Environment) -> tuple[CanSnapshot, Frame]:
        states.check(verb, env.state, env.name)
        frame = env.handle.frames[0]
        layer = registry.LAYERS[frame.layer]
        if len(env.handle.frames) > 1 or not isinstance(layer, CanSnapshot):
            raise Unsupported(
                f"{env.name} can't be copied: its layer is {env.spec.layer}",
                hint="the layer microvm can; nothing that is stacked can be copied yet",
            )
        if env.spec.volumes:
            raise Unsupported(
                f"{env.name} can't be copied: it has volumes, whose contents would be of several machines",
                hint="run it without volumes",
            )
        self._check_alone(env)
        layer.check_snapshot(frame)
        return layer, frame

    def _check_alone(self, env: Environment) -> None:
        """What others in it have there would come back from a copy that knows nothing of them."""
        inner = sorted(other.name for other in self._table.inside(env))
        if inner:
            raise Unsupported(
                f"{env.name} can't be copied: others are in it: {', '.join(inner)}",
                hint="remove them with `isolat rm`, or copy it before they are put in",
            )

    def _copy_in_memory(
        self, env: Environment, disk: int, open_: ExitStack, d: Deadline, room: Room | None = None
    ) -> Copy:
        ram = WiredPlace(env.live_link, self._facts).fetch("ram", d)
        open_.callback(os.close, ram)
        state, delta = (_memory(name, open_) for name in ("state", "delta"))
        return Copy(state=state, delta=delta, disk=disk, ram=ram, room=room)

    def _take(self, env: Environment, layer: CanSnapshot, copy: Copy, d: Deadline) -> Copied:
        if env.state != State.RUNNING:
            raise IllegalState(f"{env.name} has just ended")
        self._check_alone(env)
        self._hosting.leave_bare(env, d)
        mark = env.directory / _MARK
        mark.touch(0o600)
        try:
            checkpoint()
            copied = layer.snapshot(env.handle.frames[0], WiredPlace(env.live_link, self._facts), copy, d)
            checkpoint()
            return copied
        finally:
            mark.unlink(missing_ok=True)

    def mend(self, env: Environment) -> None:
        """Let it go on, where a daemon was killed while it copied it."""
        mark = env.directory / _MARK
        if not mark.exists():
            return
        frame = env.handle.frames[0]
        layer = registry.LAYERS[frame.layer]
        if isinstance(layer, CanSnapshot):
            try:
                layer.go_on(frame, WiredPlace(env.live_link, self._facts), Deadline(_GO_ON_S))
            except IsolatError as error:
                log(f"{env.name}: it was being copied, and could not be told to go on: {error.message}")
                return
        mark.unlink(missing_ok=True)

    # what goes on from them

    def _prepare(
        self,
        then: Handle,
        layer: CanSnapshot,
        frame: Frame,
        name: str,
        wanted: Mapping[str, Any],
        caller: Caller,
        open_: ExitStack,
        d: Deadline,
        base: str = "",
    ) -> _Child:
        """An environment with an empty disk, of which nothing runs."""
        service = {key: value for key, value in then.spec.items() if key not in ("container_name", "hostname")}
        service |= {"container_name": name} if name else {}
        service |= wanted
        env, planned = self._maker.prepare(parse(service), service, caller, then.digest, d)
        open_.enter_context(env.operation("starting"))
        try:
            planned = replace(planned, frame=_of_base(layer.going_on(frame, planned.frame), base))
            env.save(frames=(planned.frame,))
            disk = os.open(env.directory / DISK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except BaseException:
            self._maker.undo(env)
            raise
        open_.callback(os.close, disk)
        return _Child(env, planned, disk)

    def _begin(self, child: _Child, layer: CanSnapshot, copy: Copy) -> Starting:
        """Its keeper, and what waits for the copy."""
        env, plan, d = child.env, child.planned.plan, Deadline(START_S)
        env.link = self._keepers.start(env.directory, env.name, d)
        self._supervisor.watch(env)
        checkpoint()
        place: Place = WiredPlace(env.live_link, self._facts)
        place.carry_out(plan.steps, d)
        self._maker.provide(plan, place, d, but=_OWN)
        # A description of its own: each child reads it from the beginning.
        state = os.open(f"/proc/self/fd/{copy.state}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            place.hold({"ram": copy.ram, "state": state}, d)
        finally:
            os.close(state)
        checkpoint()
        return layer.begin(child.planned.frame, place, d)

    def _finish(
        self,
        child: _Child,
        layer: CanSnapshot,
        begun: Starting,
        copy: Copy,
        *,
        attach: bool = False,
        stdin: bool = False,
    ) -> socket.socket | None:
        env, frame, d = child.env, child.planned.frame, Deadline(START_S)
        place: Place = WiredPlace(env.live_link, self._facts)
        ours = adopt(place, frame.main_key, stdin, d) if attach else None
        try:
            layer.restore(frame, place, begun, copy, _io(env.spec), d)
        except BaseException:
            if ours is not None:
                ours.close()
            raise
        checkpoint()
        env.save(state=State.RUNNING, started_ns=time.time_ns())
        checkpoint()
        self._table.publish("start", env)
        self._supervisor.rearm(env)
        return ours

    def _opened(self, snapshot: Snapshot, child: _Child, open_: ExitStack, d: Deadline) -> Copy:
        """The snapshot's files; its disk becomes the child's."""
        disk, state = snapshot.open(DISK), snapshot.open(STATE)
        open_.callback(os.close, disk)
        open_.callback(os.close, state)
        forks.copy_disk(disk, child.disk, d)
        ram = self._shared_memory(snapshot, d)
        open_.callback(os.close, ram)
        return Copy(state=state, delta=-1, disk=child.disk, ram=ram)

    def _shared_memory(self, snapshot: Snapshot, d: Deadline) -> int:
        """The memory of another machine that was made from it, or a new one."""
        for env in self._table.all():
            if env.state == State.RUNNING and env.handle.frames[0].option("base") == snapshot.id:
                with contextlib.suppress(IsolatError):
                    return WiredPlace(env.live_link, self._facts).fetch("ram", d)
        return load_memory(snapshot, d)

    @contextlib.contextmanager
    def _unless_it_fails(self) -> Iterator[list[_Child]]:
        made: list[_Child] = []
        try:
            yield made
        except BaseException:
            for child in made:
                self._maker.undo(child.env)
            raise


def _for_children(count: int, disk: int) -> Room:
    """What children have of their own is theirs from the beginning; and we have the copy, until all have begun."""

    def room(next_bytes: int, all_bytes: int, disk_bytes: int) -> None:
        admission.check_memory(next_bytes + count * all_bytes, *_CHILDREN)
        if disk_bytes:
            admission.check_disk(count * disk_bytes, disk, *_CHILDREN)

    return room


def _for_snapshot(copy: Copy) -> Room:
    """Its memory is here first and then, with the part that the machine never changed, on the disk."""

    def room(next_bytes: int, all_bytes: int, disk_bytes: int) -> None:
        admission.check_memory(next_bytes, *_SNAPSHOT)
        admission.check_disk(all_bytes + allocated_bytes(copy.ram) + disk_bytes, copy.disk, *_SNAPSHOT)

    return room


def _of_base(frame: Frame, base: str) -> Frame:
    """``base``: the snapshot whose memory it maps."""
    return replace(frame, options=(*frame.options, ("base", base))) if base else frame


def _io(spec: Spec) -> Io:
    return Io(tty=spec.tty, stdin=spec.stdin_open, log=spec.logging != "none", main=True)


def _memory(name: str, open_: ExitStack) -> int:
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    open_.callback(os.close, fd)
    return fd


def names(found: Sequence[Environment]) -> list[dict[str, str]]:
    return [{"id": env.id, "name": env.name} for env in found]
