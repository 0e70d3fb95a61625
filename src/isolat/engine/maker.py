"""How an environment is made: names resolved, planned, its handle written, carried out, started; or undone."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from isolat.checkpoint import checkpoint
from isolat.deadline import Deadline
from isolat.engine import admission
from isolat.engine.carrying import left_out
from isolat.engine.creation import (
    Planned,
    Request,
    boot_id,
    describe,
    frame_of,
    handle_of,
    outer_job,
    plan_stack,
)
from isolat.engine.endings import Endings
from isolat.engine.environment import Environment
from isolat.engine.holding import Holding
from isolat.engine.journal import log
from isolat.engine.keepers import Keepers
from isolat.engine.kits import FETCH_S, Kits
from isolat.engine.names import new_id
from isolat.engine.paths import StateRoot, native_dir
from isolat.engine.starting import running, start_layers
from isolat.engine.supervisor import Supervisor
from isolat.engine.table import Table
from isolat.engine.templates import Template, Templates
from isolat.engine.volumes import Claim, Volumes
from isolat.engine.warm import WarmPool, lowest_priority, normal_priority
from isolat.errors import CommandNotFound, Conflict, IsolatError, NotExecutable, Unsupported, UsageError
from isolat.images import architecture
from isolat.images.image import Image
from isolat.images.pool import Pool
from isolat.images.progress import Progress
from isolat.images.store import ImageStore
from isolat.layers import live, registry
from isolat.layers.base import (
    GUEST,
    CanWarm,
    Descriptor,
    ImageRef,
    Layer,
    MachineKit,
    Plan,
    Probe,
    Source,
    State,
)
from isolat.layers.volumes import are_copied
from isolat.places.base import Facts, Io, Place
from isolat.places.link import Link
from isolat.places.wired import WiredPlace
from isolat.spec.model import Spec
from isolat.spec.parse import parse
from isolat.trace import mark

START_S = float(os.environ.get("ISOLAT_START_S", "60"))  # tests shorten it
_PROBE_KEPT_S = 300.0
_OPENED_BYTES = 256 << 20
_MACHINE = "microvm"
_REAPED_S = 1.0


@dataclass(frozen=True)
class Caller:
    uid: int = 0
    gid: int = 0


class _Died(Exception):
    """A machine that was made in advance did, before its application was started."""


class Maker:
    """Makes environments and hands them to the table and the supervisor."""

    def __init__(
        self,
        paths: StateRoot,
        facts: Facts,
        images: ImageStore,
        pool: Pool,
        keepers: Keepers,
        table: Table,
        endings: Endings,
        supervisor: Supervisor,
        kits: Kits,
        templates: Templates,
        volumes: Volumes,
        group: int | None,
        warm: int,
    ) -> None:
        self.paths = self._paths = paths
        self._facts = facts
        self._images = images
        self._pool = pool
        self._keepers = keepers
        self._table = table
        self._endings = endings
        self._supervisor = supervisor
        self._group = group
        self.libexec = self._libexec = native_dir()
        self.boot_id = self._boot_id = boot_id()
        self._kits = kits
        self._templates = templates
        self._volumes = volumes
        self._holding = Holding(kits.blanks, templates.lend, kits.base_disk)
        self.warm = WarmPool(self.undo, warm)
        self._probes: dict[tuple[str, str, str], tuple[float, Probe]] = {}

    def describe(self, service: Mapping[str, object], caller: Caller) -> tuple[list[dict[str, object]], str]:
        """What ``run`` would do, as data and as text."""
        spec = parse(service)
        id = new_id()
        try:
            kit = self._kit(spec)
            request = self._request(spec, service, caller, id, spec.name or "NAME", 0, kit)
            return describe(self._plan(request, Deadline(START_S)))
        finally:
            self._table.unmade(id)

    def run(
        self,
        service: Mapping[str, object],
        caller: Caller,
        attach: bool,
        io: Io,
        descriptors: Sequence[int],
    ) -> tuple[Environment, socket.socket | None]:
        """Make an environment and start its application. Returns the client's end of the streams when attached."""
        spec = parse(service)
        wanted = sum(not volume.named for volume in spec.volumes)
        if len(descriptors) != wanted:
            raise UsageError(
                f"{wanted} directories of this machine came with {len(descriptors)} descriptors",
                hint="open each source with O_PATH and send the descriptors in order",
            )
        admission.check(spec, self._facts.memory_bytes, self._facts.cpus, self._paths.root)
        kit = self._kit(spec)  # fetched once, which may take longer than a start
        d = Deadline(START_S)
        io = replace(io, tty=spec.tty, log=spec.logging != "none", main=True)
        can = registry.resolve(spec.layers)[0].capabilities
        if live.wanted(spec):
            live.check_sources(spec.volumes, descriptors)
            live.check_way(self._paths.envs)
        copied = are_copied(can, service)
        with self._volumes.claim(spec.volumes if can.volumes else (), copies=copied) as claim:
            ready = self._ready_machine(spec, registry.resolve(spec.layers), kit)
            try:
                return self._run(spec, service, caller, kit, ready, claim, descriptors, attach, io, d)
            except _Died as error:
                log(f"a machine made in advance died while it was taken: {error.__cause__}")
                return self._run(spec, service, caller, kit, None, claim, descriptors, attach, io, d)

    def _run(
        self,
        spec: Spec,
        service: Mapping[str, object],
        caller: Caller,
        kit: MachineKit | None,
        ready: Environment | None,
        claim: Claim,
        descriptors: Sequence[int],
        attach: bool,
        io: Io,
        d: Deadline,
    ) -> tuple[Environment, socket.socket | None]:
        """``ready``: the machine that it takes over, made for the very image that the name meant then.

        Raises _Died where nothing is wrong but that this machine is dead.
        """
        env, planned = self._enter(spec, service, caller, kit, ready, ready.handle.digest if ready else "", d)
        with env.operation("starting"), contextlib.ExitStack() as opened:
            try:
                sources, left = self._volumes.open(claim, descriptors, self._tree(env), d, opened)
                env.remark = left_out(left)
                return env, self._start(env, planned, io, attach, sources, ready, d)
            except BaseException as error:
                died = ready is not None and self._has_died(ready, error)
                self.undo(env)
                if died:
                    raise _Died from error
                raise

    def _tree(self, env: Environment) -> str:
        """Where its image is mounted on this machine."""
        return str(self._images.mount(env.handle.digest)) if env.handle.digest else ""

    def prepare(
        self, spec: Spec, service: Mapping[str, object], caller: Caller, digest: str, d: Deadline
    ) -> tuple[Environment, Planned]:
        """An environment of one layer on the image of this digest: with its handle and directory, and nothing runs.

        Raises Refused where this machine should not take it.
        """
        admission.check(spec, self._facts.memory_bytes, self._facts.cpus, self._paths.root)
        env, planned = self._enter(spec, service, caller, self._kit(spec), None, digest, d)
        return env, planned[0]

    def provide(self, plan: Plan, place: Place, d: Deadline, but: Collection[str]) -> None:
        """Open what the plan's guest needs and let the place hold it, but for the names in ``but``."""
        self._holding.provide(plan.descriptors, plan.template, place, d, but)

    def _enter(
        self,
        spec: Spec,
        service: Mapping[str, object],
        caller: Caller,
        kit: MachineKit | None,
        ready: Environment | None,
        digest: str,
        d: Deadline,
    ) -> tuple[Environment, list[Planned]]:
        """Planned, written down, and in the table. ``digest``: of the image, where its name may mean another now."""
        id = ready.id if ready else new_id()
        index = ready.handle.uid_index if ready else -1
        name = ""
        try:
            name = self._table.reserve(spec.name, id)
            index = index if ready else self._table.take_uids()
            request = self._request(replace(spec, image=digest or spec.image), service, caller, id, name, index, kit)
            planned = self._plan(request, d)
            mark("planned")
            handle = handle_of(request, planned, self._boot_id).with_(image=spec.image)
            env = Environment(handle, self._paths.env(id))
            env.spec = spec
            if ready is None:
                self.make_directory(env)
            else:
                env.link = ready.link
            checkpoint()
            env.save()
            mark("handle-saved")
        except BaseException:
            self._table.unmade(id, name, -1 if ready else index)
            if ready is not None:
                self.undo(ready)
            with contextlib.suppress(OSError):
                self._paths.env(id).rmdir()
            raise
        if not self._table.enter(env):
            self.undo(env)
            raise Conflict("everything is being reset: nothing new is started")
        self._table.publish("create", env, image=spec.image, layer=spec.layer)
        return env, planned

    def _kit(self, spec: Spec) -> MachineKit | None:
        """What machines are made of, where the spec's outermost layer is one."""
        layer = registry.resolve(spec.layers)[0]
        if not layer.capabilities.machine:
            return None
        if layer.capabilities.boots:
            self._kits.pc_kernel()
        return self._kits.get(Deadline(FETCH_S), accelerator=spec.accel, kernel=spec.kernel)

    # machines made in advance

    def _ready_machine(self, spec: Spec, stack: tuple[Layer, ...], kit: MachineKit | None) -> Environment | None:
        layer = stack[0]
        if kit is None or len(stack) > 1 or not isinstance(layer, CanWarm):
            return None
        image = self.image("", spec.image)
        request = Request(new_id(), "", spec, {}, image, 0, "", machine=kit)
        key = layer.warm_key(outer_job(request, self.nowhere(), self._paths, ("",)))
        found = self.warm.take(key, lambda: self._make_in_advance(layer, spec, image, kit))
        if found is None or self._still_runs(found):
            return found
        self.undo(found)
        return None

    def _still_runs(self, ready: Environment) -> bool:
        """Whether nobody has killed the machine, or its keeper, since it was made."""
        with contextlib.suppress(IsolatError):
            place = WiredPlace(ready.live_link, self._facts)
            return any(proc.key == GUEST and proc.exit is None for proc in place.procs(GUEST, Deadline(5)))
        return False

    def _has_died(self, ready: Environment, error: BaseException) -> bool:
        """Whether that is why it could not be taken. Its monitor is closed a moment before its keeper knows."""
        if not isinstance(error, IsolatError) or isinstance(error, (CommandNotFound, NotExecutable)):
            return False
        with contextlib.suppress(IsolatError):
            WiredPlace(ready.live_link, self._facts).wait(GUEST, Deadline(_REAPED_S))
            return True
        return not self._still_runs(ready)

    def _make_in_advance(self, layer: CanWarm, spec: Spec, image: ImageRef, kit: MachineKit) -> Environment:
        assert isinstance(layer, Layer)
        d = Deadline(START_S)
        index = self._table.take_uids()
        id = new_id()
        request = Request(id, f"warm-{id}", spec, {}, image, index, "", machine=kit)
        try:
            job = layer.warm_job(outer_job(request, self.nowhere(), self._paths, ("",)))
            plan = layer.plan(job, self.probe(layer, self.nowhere(), d))
        except BaseException:
            self._table.give_back_uids(index)
            raise
        planned = Planned(layer, plan, frame_of(layer, plan, last=True))
        env = Environment(handle_of(request, [planned], self._boot_id), self._paths.env(id))
        try:
            self.make_directory(env)
            env.save()
            env.link = self._keepers.start(env.directory, env.name, d)
            lowest_priority(env.link.pid)
            place = WiredPlace(env.live_link, self._facts)
            place.carry_out(plan.steps, d)
            self._holding.provide(plan.descriptors, plan.template, place, d)
            layer.warm_up(planned.frame, place, d)
        except BaseException:
            self.undo(env)
            raise
        return env

    def make_template(self, service: Mapping[str, object], progress: Progress) -> Template:
        """The template that machines of this spec are cloned from. Raises Unsupported where there is none for it."""
        spec = parse(service)
        layer, *others = registry.resolve(spec.layers)
        if others or not isinstance(layer, CanWarm):
            raise Unsupported(f"the layer {spec.layer} has no templates", hint="isolat template create --layer microvm")
        d = Deadline(FETCH_S)
        kit = self._kits.get(d, progress, accelerator=spec.accel, kernel=spec.kernel)
        index = self._table.take_uids()
        try:
            request = Request(new_id(), "", spec, service, None, index, "", machine=kit)
            job = layer.warm_job(outer_job(request, self.nowhere(), self._paths, ("",)))
            plan = layer.plan(job, self.probe(layer, self.nowhere(), d)).template
            if plan is None:
                raise Unsupported("this machine makes no templates")
            progress(f"booting a machine: {plan.memory_bytes >> 20} MiB, {plan.cpus} CPUs, {plan.accel}", 0, 0)
            return self._templates.want(plan, d)
        finally:
            self._table.give_back_uids(index)

    def _take_over(self, env: Environment, ready: Environment, place: Place, d: Deadline) -> None:
        """From now on the machine is this environment's: at the priority of others, and watched."""
        for proc in place.procs(GUEST, d):
            if proc.key == GUEST:
                normal_priority(proc.pid)
        if env.link is not None:
            env.link.name = env.name  # what is said of it is said to whoever knows that name
            normal_priority(env.link.pid)
        self._supervisor.watch(env)

    def make_directory(self, env: Environment) -> None:
        """Its directory, where its handle will be."""
        env.directory.mkdir(mode=0o711)
        if self._group is not None:
            # Logs and exit records are the group's to read, through a descriptor: it is equivalent to root.
            os.chown(env.directory, 0, self._group)
            env.directory.chmod(0o2711)

    def around_disk(self, env: Environment, directory: Path, d: Deadline) -> Planned:
        """A machine for the disk of one that has ended: booted, as small as it can be, with nothing of anybody in it.

        ``directory``: its own. Raises Refused where this machine should not take it.
        """
        options = {**dict(env.spec.options), _MACHINE: {"template": False, "park_s": 0}}
        spec = Spec(
            env.handle.digest,
            layers=env.spec.layers[:1],
            memory_bytes=min(env.spec.memory_bytes, _OPENED_BYTES),
            disk_bytes=env.spec.disk_bytes,
            accel=env.spec.accel,
            kernel=env.spec.kernel,
            options=tuple(options.items()),
        )
        admission.check(spec, self._facts.memory_bytes, self._facts.cpus, self._paths.root)
        request = self._request(spec, {}, Caller(), "", env.name, env.handle.uid_index, self._kit(spec))
        job = outer_job(replace(request, id=env.id), self.nowhere(), self._paths, ())
        layer = registry.resolve(spec.layers)[0]
        plan = layer.plan(replace(job, dir=str(directory)), self.probe(layer, self.nowhere(), d))
        descriptors = tuple(
            replace(one, source=Source.FILE, path=f"{env.directory}/{Path(one.path).name}")
            if one.source is Source.DISK
            else one
            for one in plan.descriptors
        )
        plan = replace(plan, descriptors=descriptors)
        return Planned(layer, plan, frame_of(layer, plan, last=False))

    def _request(
        self,
        spec: Spec,
        service: Mapping[str, object],
        caller: Caller,
        id: str,
        name: str,
        index: int,
        kit: MachineKit | None,
    ) -> Request:
        stack = registry.resolve(spec.layers)
        image = self.image(id, spec.image, kit is not None) if stack[0].capabilities.images else None
        upper = str(self._paths.pool / id) if image and kit is None and self._pool.ensure() else ""
        return Request(id, name, spec, service, image, index, upper, caller.uid, caller.gid, kit)

    def image(self, id: str, name: str, machine: bool = False) -> ImageRef:
        """The image of this name, which the environment that is being made as ``id`` stands on from now on."""
        image = self._standing(id, name) if id else self._images.resolve(name)
        architecture.check(name, image.config.architecture, emulated=not machine)
        return ImageRef(
            digest=image.digest,
            mount=str(self._images.mount(image.digest)),
            env=image.env,
            command=image.command,
            working_dir=image.working_dir,
            user=image.user,
            binds=image.binds,
            file=str(self._images.file(image.digest)),
            entrypoint=image.entrypoint,
            stop_signal=image.config.stop_signal,
        )

    def _standing(self, id: str, name: str) -> Image:
        """The image, which nobody removes from now on: who was about to when that was said has done it by now."""
        while True:
            image = self._images.resolve(name)
            self._table.making(id, image.digest)
            if self._images.confirm(image.digest):
                return image

    def _plan(self, request: Request, d: Deadline) -> list[Planned]:
        stack = registry.resolve(request.spec.layers)
        probe = lambda layer, where, until: self.probe(layer, where, until, request.spec)  # noqa: E731
        return plan_stack(request, stack, self.nowhere(), self._paths, self._libexec, probe, d)

    def probe(self, layer: Layer, place: Place, d: Deadline, spec: Spec | None = None) -> Probe:
        """What the place allows this layer, remembered for a while when it is ready."""
        key = (layer.name, spec.oci_runtime if spec else "", place.facts.kernel)
        at, found = self._probes.get(key, (0.0, None))
        if found is None or not found.ready or time.monotonic() - at > _PROBE_KEPT_S:
            found = layer.probe(place, d.sooner(20))
            self._probes[key] = (time.monotonic(), found)
        return found

    def nowhere(self) -> Place:
        """This machine with its facts, for plans and probes: they must not touch it."""

        def no_link(_: Deadline) -> Link:
            raise Unsupported("a plan must not touch its place")

        return WiredPlace(no_link, self._facts)

    def _start(
        self,
        env: Environment,
        planned: list[Planned],
        io: Io,
        attach: bool,
        descriptors: Sequence[int],
        ready: Environment | None,
        d: Deadline,
    ) -> socket.socket | None:
        checkpoint()
        place: Place = WiredPlace(env.live_link, self._facts)
        if ready is None:
            env.link = self._keepers.start(env.directory, env.name, d)
            self._supervisor.watch(env)
        else:
            self._take_over(env, ready, place, d)
        mark("keeper-started")
        checkpoint()

        def prepare(depth: int, item: Planned, place: Place) -> None:
            plan, given = item.plan, descriptors if depth == 0 else ()
            if ready is None:
                place.carry_out(plan.steps, d, given)
                left = self._holding.provide(plan.descriptors, plan.template, place, d, given=given)
            else:
                left = self._holding.provide(_from_caller(plan.descriptors), None, place, d, given=given)
            env.remark = env.remark or left_out(left)

        def start(item: Planned, place: Place) -> None:
            if ready is not None and isinstance(item.layer, CanWarm):
                item.layer.take(item.frame, ready.handle.frames[0], place, io, d)
            else:
                item.layer.start(item.frame, place, io, d)

        ours = start_layers(planned, place, prepare, start, io, attach, d)
        running(env, self._table, self._supervisor)
        return ours

    def undo(self, env: Environment) -> None:
        """Destroy what could not be started; what is left over is tried again at the next start of the daemon."""
        try:
            self._endings.destroy(env)
        except Exception as error:
            log(f"{env.name}: could not be undone whole: {error}")
            with contextlib.suppress(OSError):
                env.save(remove=True, state=State.LOST, reason="it could not be started, nor undone whole")
            env.ended.set()
            return
        self._table.leave(env)

    def close(self) -> None:
        """Undo what was made in advance: nobody will take it."""
        self.warm.close()


def _from_caller(descriptors: Sequence[Descriptor]) -> list[Descriptor]:
    """What a machine that was made in advance does not have yet."""
    return [one for one in descriptors if one.source in (Source.VOLUMES, Source.GIVEN)]
