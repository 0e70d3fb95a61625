"""How an environment is made: names resolved, planned, its handle written, carried out, started; or undone."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from isolat.checkpoint import checkpoint
from isolat.deadline import Deadline
from isolat.engine import admission
from isolat.engine.creation import Planned, Request, boot_id, describe, handle_of, plan_stack
from isolat.engine.endings import Endings
from isolat.engine.environment import Environment
from isolat.engine.journal import log
from isolat.engine.keepers import Keepers
from isolat.engine.names import new_id
from isolat.engine.paths import StateRoot, native_dir
from isolat.engine.supervisor import Supervisor
from isolat.engine.table import Table
from isolat.errors import Conflict, Unsupported, UsageError
from isolat.images.pool import Pool
from isolat.images.store import ImageStore
from isolat.layers import registry
from isolat.layers.base import CanEnter, ImageRef, Layer, Probe, State
from isolat.places.base import Facts, Io, Place
from isolat.places.link import Link
from isolat.places.wired import WiredPlace
from isolat.spec.model import Spec
from isolat.spec.parse import parse
from isolat.trace import mark

START_S = float(os.environ.get("ISOLAT_START_S", "60"))  # tests shorten it
_PROBE_KEPT_S = 300.0


@dataclass(frozen=True)
class Caller:
    uid: int = 0
    gid: int = 0


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
        group: int | None,
    ) -> None:
        self._paths = paths
        self._facts = facts
        self._images = images
        self._pool = pool
        self._keepers = keepers
        self._table = table
        self._endings = endings
        self._supervisor = supervisor
        self._group = group
        self._libexec = native_dir()
        self._boot_id = boot_id()
        self._probes: dict[tuple[str, str], tuple[float, Probe]] = {}

    def describe(self, service: Mapping[str, object], caller: Caller) -> tuple[list[dict[str, object]], str]:
        """What ``run`` would do, as data and as text."""
        spec = parse(service)
        id = new_id()
        try:
            request = self._request(spec, service, caller, id, spec.name or "NAME", 0)
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
        if len(descriptors) != len(spec.volumes):
            raise UsageError(
                f"{len(spec.volumes)} volumes came with {len(descriptors)} descriptors",
                hint="open each source with O_PATH and send the descriptors in order",
            )
        admission.check(spec, self._facts.memory_bytes, self._facts.cpus, self._paths.root)
        d = Deadline(START_S)
        env, planned = self._create(spec, service, caller, d)
        io = replace(io, tty=spec.tty, log=spec.logging != "none", main=True)
        with env.operation("starting"):
            try:
                return env, self._start(env, planned, io, attach, descriptors, d)
            except BaseException:
                self._undo(env)
                raise

    def _create(
        self, spec: Spec, service: Mapping[str, object], caller: Caller, d: Deadline
    ) -> tuple[Environment, list[Planned]]:
        id = new_id()
        name, index = self._table.reserve(spec.name, id), -1
        try:
            index = self._table.take_uids()
            request = self._request(spec, service, caller, id, name, index)
            planned = self._plan(request, d)
            mark("planned")
            env = Environment(handle_of(request, planned, self._boot_id), self._paths.env(id))
            env.spec = spec
            self._make_directory(env)
            checkpoint()
            env.save()
            mark("handle-saved")
        except BaseException:
            self._table.unmade(id, name, index)
            with contextlib.suppress(OSError):
                self._paths.env(id).rmdir()
            raise
        if not self._table.enter(env):
            self._undo(env)
            raise Conflict("everything is being reset: nothing new is started")
        self._table.publish("create", env, image=spec.image, layer=spec.layer)
        return env, planned

    def _make_directory(self, env: Environment) -> None:
        env.directory.mkdir(mode=0o711)
        if self._group is not None:
            # Logs and exit records are the group's to read, through a descriptor: it is equivalent to root.
            os.chown(env.directory, 0, self._group)
            env.directory.chmod(0o2711)

    def _request(
        self, spec: Spec, service: Mapping[str, object], caller: Caller, id: str, name: str, index: int
    ) -> Request:
        stack = registry.resolve(spec.layers)
        image = self._image(id, spec.image) if stack[0].capabilities.images else None
        upper = str(self._paths.pool / id) if image and self._pool.ensure() else ""
        return Request(id, name, spec, service, image, index, upper, caller.uid, caller.gid)

    def _image(self, id: str, name: str) -> ImageRef:
        image = self._images.resolve(name)
        self._table.making(id, image.digest)
        return ImageRef(
            digest=image.digest,
            mount=str(self._images.mount(image.digest)),
            env=image.env,
            command=image.command,
            working_dir=image.working_dir,
            user=image.user,
            binds=image.binds,
        )

    def _plan(self, request: Request, d: Deadline) -> list[Planned]:
        stack = registry.resolve(request.spec.layers)
        probe = lambda layer, where, until: self.probe(layer, where, until, request.spec)  # noqa: E731
        return plan_stack(request, stack, self.nowhere(), self._paths, self._libexec, probe, d)

    def probe(self, layer: Layer, place: Place, d: Deadline, spec: Spec | None = None) -> Probe:
        """What the place allows this layer, remembered for a while when it is ready."""
        key = (layer.name, spec.oci_runtime if spec else "")
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
        d: Deadline,
    ) -> socket.socket | None:
        checkpoint()
        env.link = self._keepers.start(env.directory, env.name, d)
        self._supervisor.watch(env)
        mark("keeper-started")
        checkpoint()
        place: Place = WiredPlace(env.live_link, self._facts)
        ours = None
        for depth, item in enumerate(planned):
            place.carry_out(item.plan.steps, d, descriptors if depth == 0 else ())
            mark("steps-carried-out")
            last = depth == len(planned) - 1
            if last and attach:
                ours = adopt(place, item.frame.main_key, io.stdin, d)
            try:
                item.layer.start(item.frame, place, io, d)
            except BaseException:
                if ours is not None:
                    ours.close()
                raise
            checkpoint()
            if not last:
                assert isinstance(item.layer, CanEnter)
                place = item.layer.inside(item.frame, place)
        mark("application-started")
        env.save(state=State.RUNNING, started_ns=time.time_ns())
        checkpoint()
        self._table.publish("start", env)
        self._supervisor.rearm(env)
        return ours

    def _undo(self, env: Environment) -> None:
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


def adopt(place: Place, key: str, stdin: bool, d: Deadline) -> socket.socket:
    """Attach to a process, started or not yet. Returns the client's end."""
    ours, theirs = socket.socketpair()
    try:
        place.adopt(key, theirs.detach(), stdin, d)
    except BaseException:
        ours.close()
        raise
    return ours
