"""``run --in``: an environment that is put into another one that runs.

It has everything that an environment has, but no keeper of its own: its outer one's keeper starts it, in the place that
that one is, and keeps its log and its exit record in this one's directory. What it does there is in its handle before
it is done, as anywhere. Images and tools that are brought in for it belong to the outer one, and go when that goes.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from isolat.checkpoint import checkpoint
from isolat.deadline import Deadline
from isolat.engine import entering, states
from isolat.engine.creation import Planned, Request, describe, handle_of, plan_inside
from isolat.engine.environment import Environment
from isolat.engine.handle import Around
from isolat.engine.hosting import Hosting
from isolat.engine.maker import START_S, Caller, Maker
from isolat.engine.names import new_id
from isolat.engine.starting import running, start_layers
from isolat.engine.states import Verb
from isolat.engine.supervisor import Supervisor
from isolat.engine.table import Table
from isolat.errors import Conflict, Refused, Unsupported
from isolat.layers import registry
from isolat.layers.base import Layer
from isolat.places.base import Facts, Io
from isolat.spec.model import DEFAULT_CPUS, DEFAULT_DISK_BYTES, DEFAULT_MEMORY_BYTES, Spec
from isolat.spec.parse import parse
from isolat.trace import mark

Stack = tuple[Layer, ...]


class InnerMaker:
    """Makes environments inside of others."""

    def __init__(self, facts: Facts, table: Table, supervisor: Supervisor, maker: Maker, hosting: Hosting) -> None:
        self._facts = facts
        self._table = table
        self._supervisor = supervisor
        self._maker = maker
        self._hosting = hosting

    def describe(self, service: Mapping[str, object], caller: Caller) -> tuple[list[dict[str, object]], str]:
        """What ``run`` would do, as data and as text."""
        spec, outer, stack = self._resolved(service)
        id = new_id()
        try:
            request = self._request(spec, service, caller, outer, id, spec.name or "NAME", 0)
            data, text = describe(self._plan(request, stack, outer, Deadline(START_S)))
            wanted = self._hosting.wanted(outer, request.image.digest if request.image else "")
        finally:
            self._table.unmade(id)
        brought = [path for path in (wanted.tools, wanted.image) if path]
        coming = [f"  bring in {path}, where it is not there yet" for path in brought]
        lines = [f"in {outer.name} ({outer.id})", *coming, text]
        return [{"in": outer.id, "brought": brought}, *data], "\n".join(lines)

    def run(
        self,
        service: Mapping[str, object],
        caller: Caller,
        attach: bool,
        io: Io,
        descriptors: Sequence[int],
    ) -> tuple[Environment, socket.socket | None]:
        """Make an environment inside of another one and start its application. Returns what ``Maker.run`` does."""
        spec, outer, stack = self._resolved(service)
        if descriptors:
            raise Unsupported(f"no volumes can come into {outer.name}, which runs", hint="leave out -v and volumes")
        d = Deadline(START_S)
        with outer.hosting:
            env, planned = self._enter(spec, service, caller, outer, stack, d)
            with env.operation("starting"), self._undone_if_it_fails(env):
                self._hosting.bring_in(env, outer, d)
                mark("brought-in")
        io = replace(io, tty=spec.tty, log=spec.logging != "none", main=True, home=str(env.directory))
        with env.operation("starting"), self._undone_if_it_fails(env):
            return env, self._start(env, planned, io, attach, d)

    @contextlib.contextmanager
    def _undone_if_it_fails(self, env: Environment) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._maker.undo(env)
            raise

    def _resolved(self, service: Mapping[str, object]) -> tuple[Spec, Environment, Stack]:
        """The spec, the environment that it is for, and its layers. Raises what stands against it."""
        spec = parse(service)
        outer = self._table.find(spec.inside)
        stack = registry.resolve(spec.layers)
        states.check(Verb.RUN_IN, outer.state, outer.name)
        self._hosting.check(outer, stack)
        cpus = entering.ground(outer, self._facts).facts.cpus
        return _fitted(spec, outer, stack[0], cpus), outer, stack

    def _enter(
        self, spec: Spec, service: Mapping[str, object], caller: Caller, outer: Environment, stack: Stack, d: Deadline
    ) -> tuple[Environment, list[Planned]]:
        """Planned, written down, and in the table."""
        id, name, index = new_id(), "", -1
        directory = self._maker.paths.env(id)
        try:
            name = self._table.reserve(spec.name, id)
            index = self._table.take_uids()
            request = self._request(spec, service, caller, outer, id, name, index)
            planned = self._plan(request, stack, outer, d)
            mark("planned")
            env = Environment(handle_of(request, planned, self._maker.boot_id), directory, outer)
            self._maker.make_directory(env)
            checkpoint()
            env.save()
            mark("handle-saved")
        except BaseException:
            self._table.unmade(id, name, index)
            with contextlib.suppress(OSError):
                directory.rmdir()
            raise
        if not self._table.enter(env):
            self._maker.undo(env)
            raise Conflict("everything is being reset: nothing new is started")
        self._table.publish("create", env, image=spec.image, layer="/".join(env.handle.layers))
        return env, planned

    def _request(
        self,
        spec: Spec,
        service: Mapping[str, object],
        caller: Caller,
        outer: Environment,
        id: str,
        name: str,
        index: int,
    ) -> Request:
        image = None
        if registry.LAYERS[spec.layers[0]].capabilities.images:
            machine = any(registry.LAYERS[name].capabilities.machine for name in outer.handle.layers)
            image = self._hosting.image_inside(outer, self._maker.image(id, spec.image, machine), spec.image)
        around = Around(outer.id, outer.name, outer.handle.layers, outer.handle.guest_name)
        return Request(id, name, spec, service, image, index, "", caller.uid, caller.gid, around=around)

    def _plan(self, request: Request, stack: Stack, outer: Environment, d: Deadline) -> list[Planned]:
        around = entering.surroundings(outer, self._facts)
        probe = lambda layer, where, until: self._maker.probe(layer, where, until, request.spec)  # noqa: E731
        return plan_inside(request, stack, around, self._maker.paths, self._maker.libexec, probe, d)

    def _start(
        self, env: Environment, planned: list[Planned], io: Io, attach: bool, d: Deadline
    ) -> socket.socket | None:
        checkpoint()
        ours = start_layers(
            planned,
            entering.outermost(env, self._facts),
            lambda _, item, place: place.carry_out(item.plan.steps, d),
            lambda item, place: item.layer.start(item.frame, place, io, d),
            io,
            attach,
            d,
        )
        running(env, self._table, self._supervisor)
        return ours


def _fitted(spec: Spec, outer: Environment, layer: Layer, cpus: int) -> Spec:
    """What is not asked for is the outer one's whole. Raises for what it does not have, or can't divide."""
    in_machine = registry.LAYERS[outer.handle.frames[-1].layer].capabilities.machine
    if not in_machine:
        return spec  # whose layers refuse what they can't limit
    if spec.disk_bytes != DEFAULT_DISK_BYTES:
        raise Unsupported(
            f"the disk of {outer.name} can't be divided: all that is in it share it",
            hint="leave out --disk, or give the outer one a smaller disk",
        )
    if spec.volumes:
        raise Unsupported(f"no volumes can come into {outer.name}, which runs", hint="leave out -v and volumes")
    if spec.cpus > cpus and spec.cpus != DEFAULT_CPUS:
        raise Refused(f"{spec.cpus:g} CPUs are more than {outer.name} has ({cpus})", hint="ask for less with --cpus")
    asked, there = spec.memory_bytes, outer.spec.memory_bytes
    if asked == DEFAULT_MEMORY_BYTES and spec.memory_swap_bytes is None:
        return replace(spec, memory_bytes=0) if "memory" in layer.capabilities.limits else spec
    if asked > there:
        raise Refused(
            f"a memory limit of {asked >> 20} MiB is more than {outer.name} has ({there >> 20} MiB)",
            hint="ask for less with --memory",
        )
    return spec
