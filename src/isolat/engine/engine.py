"""The engine: the verbs on environments.

It makes and unmakes; layers describe. ``create`` is: write the handle, carry out the plan's steps in the place,
start; ``destroy`` is: stop, revert the steps, delete the handle. One operation at a time per environment; different
environments never wait for each other.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import queue
import signal as signals
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isolat.deadline import NEVER, Deadline
from isolat.engine import admission, behind, entering, states
from isolat.engine.carrying import carries
from isolat.engine.copying import Copying, Forked
from isolat.engine.creation import boot_id
from isolat.engine.endings import Endings
from isolat.engine.environment import Environment
from isolat.engine.events import Event
from isolat.engine.files import Files
from isolat.engine.hosting import Hosting
from isolat.engine.index import Index
from isolat.engine.inner import InnerMaker
from isolat.engine.journal import log, log_defect
from isolat.engine.keepers import Keepers
from isolat.engine.kits import Kits
from isolat.engine.maker import START_S, Caller, Maker
from isolat.engine.paths import StateRoot, native_dir
from isolat.engine.reaching import Reaching
from isolat.engine.recovery import Recovery
from isolat.engine.snapshots import Snapshot, Snapshots
from isolat.engine.starting import adopt
from isolat.engine.states import Verb
from isolat.engine.supervisor import OPERATION_WAIT_S, Supervisor
from isolat.engine.table import Table, row
from isolat.engine.templates import Template, Templates
from isolat.engine.volumes import User, Volumes, unread_users, users_of
from isolat.engine.warm import DEFAULT_MOST
from isolat.errors import (
    Conflict,
    DeadlineExceeded,
    IllegalState,
    IsolatError,
    Lost,
    NotFound,
    StartFailed,
    Unsupported,
    UsageError,
)
from isolat.images.building.storage import CACHE, Storage
from isolat.images.pool import Pool
from isolat.images.progress import Progress
from isolat.images.reference import parse_reference
from isolat.images.store import ImageStore
from isolat.layers import registry
from isolat.layers.base import ANSWER_S, CanShow, Copied, Layer, Probe, State
from isolat.linux.facts import record_facts
from isolat.places.base import Command, Exit, Io, Place
from isolat.places.link import Reactor
from isolat.places.wired import WiredPlace
from isolat.wire.kinds import MAX_BODY_BYTES

if TYPE_CHECKING:
    from isolat.images.building.builder import Builder
    from isolat.images.image import Image
    from isolat.images.oci import Platform
    from isolat.images.registries.pulling import Puller

_STOP_MORE_S = 10.0
_HAND_OVER_S = 120.0  # a machine may take so long to hand over its volumes: native/after.c
_SCREEN_S = 30.0
_FIELD_BYTES = 5  # of a frame, before each word
_FRAME_REST_BYTES = 16 << 10  # of a SPAWN: what is in it beside words

GROUP = "isolat"


def group_id() -> int | None:
    """The group whose members may use the daemon, where the machine has it."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


@dataclass(frozen=True)
class ExecRequest:
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    user: str = ""
    io: Io = Io()


def _check_size(argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Raises UsageError where a process could not be given all that: it travels in one frame."""
    words = (*argv, *(f"{name}={value}" for name, value in env.items()))
    total = sum(len(os.fsencode(word)) + _FIELD_BYTES for word in words)
    most = MAX_BODY_BYTES - _FRAME_REST_BYTES
    if total > most:
        raise UsageError(
            f"command and environment have {total} bytes in all; at most {most} are allowed",
            hint="hand over so much on stdin, or as a file: isolat cp",
        )


class Engine:
    """All environments of one state root. Holds its lock's owner's word: nobody else touches this root."""

    def __init__(self, root: Path, warm: int = DEFAULT_MOST, images: int = behind.DEFAULT_MOST) -> None:
        """``warm``: how many machines of each kind are made in advance; ``images``: how many templates of images."""
        self.paths = StateRoot(root)
        self.facts = record_facts()
        self.images = ImageStore(root)
        self.pool = Pool(root)
        self._reactor = Reactor()
        self._boot_id = boot_id()
        self._keepers = Keepers(self._reactor, self.facts, native_dir())
        self.table = Table(Index(self.paths.index), int(self.paths.tag, 16) % admission.UID_RANGES)
        self.snapshots = Snapshots(self.paths)
        self._unread: dict[str, tuple[User, ...]] = {}  # by environments whose handle could not be read
        self.volumes = Volumes(self.paths, self.pool, self._volume_users)
        self._endings = Endings(self._keepers, self.facts, self.paths.cgroup, self.volumes)
        self.events = self.table.events
        self._supervisor = Supervisor(self.table, self._endings, self.facts, self.stop)
        self.kits = Kits(self.paths, native_dir())
        self.templates = Templates(self.paths, self._keepers, self.facts, self.kits.blanks, self.table.uids, images)
        self._maker = Maker(
            self.paths,
            self.facts,
            self.images,
            self.pool,
            self._keepers,
            self.table,
            self._endings,
            self._supervisor,
            self.kits,
            self.templates,
            self.volumes,
            group_id(),
            warm,
        )
        self.reaching = Reaching(self.facts, self._keepers, self.images, self._maker)
        self.files = Files(self.reaching)
        hosting = Hosting(self.facts, self.table, self.images, self.kits)
        self._inner = InnerMaker(self.facts, self.table, self._supervisor, self._maker, hosting)
        self._copying = Copying(
            self.facts, self._keepers, self.table, self._supervisor, self._maker, self.snapshots, hosting
        )

    # life of the engine

    def start(self) -> None:
        """Find every environment again, settle what ended meanwhile, sweep what nobody owns."""
        for directory in (self.paths.envs, self.paths.runtime):
            directory.mkdir(parents=True, exist_ok=True, mode=0o711)
        if self.pool.exists():
            self.pool.ensure()
        self.volumes.start()  # before what was written there is carried back
        recovery = Recovery(self.paths, self._keepers, self._endings, self._boot_id)
        for env in recovery.find():
            self.table.enter(env)
            if env.state.alive:
                self._supervisor.rejoin(env, recovery)
                self._copying.mend(env)
            else:
                self._close_opened(env)
        known = {*(env.id for env in self.table.all()), *recovery.unread}
        for index in recovery.unread.values():
            self.table.keep_uids(index)
        recovery.sweep(known, self.facts)
        self._unread = {id: unread_users(self.paths.env(id)) for id in recovery.unread}
        self.pool.sweep({*known, CACHE})
        Storage(self.paths.root, self.pool).sweep()
        self.templates.start()
        self.snapshots.start()
        self.table.index.start([row(env) for env in self.table.all()])
        for env in self.table.all():
            if env.handle.remove and not env.state.alive:
                self._supervisor.workers.submit(lambda env=env: self._supervisor.remove(env))  # type: ignore[misc]

    def _close_opened(self, env: Environment) -> None:
        try:
            self.reaching.mend(env)
        except (IsolatError, OSError) as error:
            log(f"{env.name}: what was left open when it was copied from stays for now: {error}")

    def close(self) -> None:
        """Let go of everything; environments go on under their keepers, builds end."""
        self._end_builds()
        self._maker.close()
        self.events.close()
        self._supervisor.close()
        self.templates.close()
        for env in self.table.all():
            if env.link is not None:
                env.link.on_closed = None
                env.link.close()
        self._reactor.stop()
        self.table.index.close()
        Recovery.leave_cgroups(self.paths, self.facts)

    @functools.cached_property
    def builder(self) -> Builder:
        """What builds images. Most daemons build none."""
        from isolat.images.building.builder import Builder, Uids

        uids = Uids(self.table.take_uids, self.table.give_back_uids, admission.uid_base)
        builder = Builder(self.paths.root, self.images, self.pool, self.facts, self.paths.cgroup, uids)
        builder.pull = self._pull_base
        return builder

    @functools.cached_property
    def puller(self) -> Puller:
        """What brings images from registries."""
        from isolat.images.registries.pulling import Puller

        return Puller(self.images)

    def _pull_base(self, name: str, platform: Platform, progress: Progress, gone: Callable[[], bool]) -> Image:
        """Of a build, without credentials: they are its caller's, and were not sent."""
        from isolat.images.registries import flights, pulling, skopeo

        wanted = pulling.wanted(parse_reference(name), platform, skopeo.Access())
        return self.puller.pull(wanted, flights.Passenger(progress, gone))

    def _end_builds(self) -> None:
        if "builder" in vars(self):
            self.builder.close()

    @property
    def changed(self) -> float:
        """When something last happened, on the monotonic clock."""
        return self.table.changed

    @property
    def alive_count(self) -> int:
        return sum(1 for env in self.table.all() if env.state.alive)

    # making

    def plan(self, service: Mapping[str, object], caller: Caller) -> tuple[list[dict[str, object]], str]:
        """What ``run`` would do. Makes no environment; the image is mounted and the pool made, if they were not yet."""
        maker = self._inner if service.get("x-in") else self._maker
        return maker.describe(service, caller)

    def run(
        self,
        service: Mapping[str, object],
        caller: Caller,
        *,
        attach: bool,
        stdin: bool,
        rows: int = 0,
        cols: int = 0,
        descriptors: Sequence[int] = (),
    ) -> tuple[Environment, socket.socket | None]:
        """Make an environment and start its application. Returns the client's end of the streams when attached."""
        maker = self._inner if service.get("x-in") else self._maker
        return maker.run(service, caller, attach, Io(stdin=stdin, rows=rows, cols=cols), descriptors)

    def make_template(self, service: Mapping[str, object], progress: Progress) -> Template:
        """The template of machines like this; made where there is none."""
        return self._maker.make_template(service, progress)

    def prune_templates(self) -> list[Template]:
        """Remove all templates, and the machines that were made in advance from them."""
        self._maker.warm.drain()
        return self.templates.prune()

    def warm_count(self) -> int:
        """How many machines are ready that nobody has asked for yet."""
        return self._maker.warm.count()

    def probe(self, layer: Layer, place: Place, d: Deadline) -> Probe:
        """What the place allows this layer, remembered for a while when it is ready."""
        return self._maker.probe(layer, place, d)

    # verbs on one environment

    def find(self, ref: str) -> Environment:
        """By id, name, or an unambiguous beginning of the id."""
        return self.table.find(ref)

    def environments(self) -> list[Environment]:
        return self.table.all()

    def exec(self, ref: str, request: ExecRequest, *, attach: bool) -> tuple[str, socket.socket | None]:
        """Start a further process inside. Returns its full name and, attached, the client's end of its streams."""
        env = self.find(ref)
        states.check(Verb.EXEC, env.state, env.name)
        d = Deadline(START_S)
        inside, key = entering.innermost(env, self.facts), env.new_exec_key()
        main = env.handle.frames[-1].main
        assert main is not None
        merged = dict(main.env)
        if request.io.tty:
            merged.setdefault("TERM", "xterm")
        merged.update(request.environment)
        _check_size(request.command, merged)
        command = Command(
            argv=request.command,
            env=tuple(merged.items()),
            cwd=request.working_dir or main.cwd,
            user=request.user or main.user,
        )
        ours = adopt(inside, key, request.io.stdin, d) if attach else None
        try:
            inside.spawn(key, command, request.io, d)
        except BaseException as error:
            if ours is not None:
                ours.close()
            if isinstance(error, (NotFound, Lost, StartFailed)) and self._has_ended(env):
                raise IllegalState(f"cannot exec in {env.name}: it has just ended") from error
            raise
        self.table.publish("exec", env, command=list(request.command))
        return key, ours

    @staticmethod
    def _has_ended(env: Environment) -> bool:
        link = env.link
        return link is None or link.closed or link.exit_of(env.handle.main_name) is not None

    def attach(self, ref: str, stdin: bool) -> tuple[Environment, socket.socket]:
        env = self.find(ref)
        states.check(Verb.ATTACH, env.state, env.name)
        _, place = entering.last(env, self.facts)
        return env, adopt(place, env.handle.frames[-1].main_key, stdin, Deadline(10))

    def stop(self, ref: str, grace_s: float | None) -> Environment:
        """Ask it to end, and kill it when ``grace_s`` (default: of its spec) has passed."""
        env = self.find(ref)
        if env.state == State.CREATING:
            with env.operation("stopping", Deadline(START_S)):
                pass
        states.check(Verb.STOP, env.state, env.name)
        if not env.state.alive:
            return env
        env.parting = "was stopped"
        self._stop_inside(env, grace_s)
        grace_s = env.spec.stop_grace_s if grace_s is None else grace_s
        more_s = _HAND_OVER_S if carries(env) else 0.0
        with env.operation("stopping"):
            layer, place = entering.last(env, self.facts)
            self.table.publish("stop", env)
            try:
                ended = layer.stop(env.handle.frames[-1], place, grace_s, Deadline(grace_s + _STOP_MORE_S + more_s))
                env.forced = env.forced or ended.forced
            except Lost:
                pass  # its keeper died meanwhile, which is an end as well
            except DeadlineExceeded:
                self._supervisor.kill_whole(env)  # the machine around it does not answer
        if not env.finished(OPERATION_WAIT_S + more_s):
            raise DeadlineExceeded(
                f"{env.name} was killed, but has not come to its end", stage="stop", hint=f"isolat rm -f {env.name}"
            )
        return env

    def _stop_inside(self, outer: Environment, grace_s: float | None) -> None:
        """Ask those that are in it to end, all at once; what does not get to its end so goes with the outer one."""

        def stop(env: Environment) -> None:
            env.stop_reason = env.stop_reason or f"{outer.name}, which it was in, was stopped"
            with contextlib.suppress(IsolatError):
                self.stop(env.id, grace_s)

        threads = [
            threading.Thread(target=stop, args=(env,), daemon=True)
            for env in self.table.inside(outer)
            if env.state == State.RUNNING
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def kill(self, ref: str, signal: int) -> None:
        env = self.find(ref)
        states.check(Verb.KILL, env.state, env.name)
        _, place = entering.last(env, self.facts)
        self.table.publish("kill", env, signal=signal)
        final = signal == signals.SIGKILL and env.handle.around is None and not carries(env)
        try:
            place.signal(env.handle.frames[-1].main_key, signal, Deadline(ANSWER_S if final else 10))
        except DeadlineExceeded:
            if signal != signals.SIGKILL or env.handle.around is not None:
                raise
            self._supervisor.kill_whole(env)  # a machine that does not answer can be killed all the same

    def fork(self, ref: str, count: int, name: str, caller: Caller) -> Forked:
        """Make so many environments that go on where this one is. ``name``: of a single one."""
        return self._copying.fork(self.find(ref), count, name, caller)

    def snapshot(self, ref: str, name: str) -> tuple[Snapshot, Copied]:
        """Keep a copy of this environment, as it is now, on disk."""
        return self._copying.snapshot(self.find(ref), name)

    def run_snapshot(
        self, name: str, wanted: Mapping[str, object], caller: Caller, *, attach: bool, stdin: bool
    ) -> tuple[Environment, socket.socket | None]:
        """Make an environment that goes on where a snapshot was. Returns the client's end when attached."""
        return self._copying.run(name, wanted, caller, attach, stdin)

    def screenshot(self, ref: str) -> int:
        """A new descriptor of memory with what its screen shows, as PNG: the caller's from now on.

        Raises Unsupported where none of its layers has a screen.
        """
        env = self.find(ref)
        states.check(Verb.SCREENSHOT, env.state, env.name)
        place: Place = WiredPlace(env.live_link, self.facts)
        frame = env.handle.frames[0]
        layer = registry.LAYERS[frame.layer]
        if not isinstance(layer, CanShow):
            raise Unsupported(f"the layer {frame.layer} has no screen", hint="a whole PC has one: --layer vm")
        fd = os.memfd_create("screen", os.MFD_CLOEXEC)
        try:
            layer.screenshot(frame, place, fd, Deadline(_SCREEN_S))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def wait(self, ref: str, d: Deadline = NEVER) -> Environment:
        """Until it has ended, and is gone where it was to be removed."""
        env = self.find(ref)
        while not env.ended.wait(d.left_s(0.5)):
            if env.gone.is_set():
                break
            d.check(f"waiting for {env.name}")
        return env

    def remove(self, ref: str, force: bool) -> None:
        env = self.find(ref)
        inner = [other.name for other in self.table.inside(env) if other.state.alive]
        if inner and not force:
            raise Conflict(
                f"cannot rm {env.name}: others run in it: {', '.join(sorted(inner))}",
                hint="end them first; `isolat rm --force` ends them with it",
            )
        states.check(Verb.REMOVE_FORCED if force else Verb.REMOVE, env.state, env.name)
        if force and env.state == State.RUNNING:
            env.parting = "was removed"
            self._supervisor.kill_whole(env)
        with env.operation("removing", Deadline(OPERATION_WAIT_S) if force else None):
            if env.gone.is_set():
                return
            if env.state.alive:
                env.forced = True
                times = (env.handle.started_ns, time.time_ns())
                env.handle = env.handle.with_(exit=Exit(128 + signals.SIGKILL, signals.SIGKILL, *times, forced=True))
            # A daemon that is killed from here on finishes the removal at its next start.
            env.save(remove=True, state=State.REMOVING)
            self._supervisor.destroy(env)

    def remove_image(self, name: str) -> None:
        """Take this name away; with its last one the image goes, and the disks that were made from it."""
        self.images.remove(name, self.in_use)
        self._forget_disks()

    def remove_nameless(self, digest: str) -> None:
        """The same for an image that has no name. Raises Conflict where it got one meanwhile."""
        self.images.remove_nameless(digest, self.in_use)
        self._forget_disks()

    def _forget_disks(self) -> None:
        self.kits.prune_disks({image.digest for image in self.images.list()})

    def in_use(self) -> set[str]:
        """The digests of images that an environment or a snapshot stands on."""
        return self.table.images_in_use() | self.snapshots.digests()

    def _volume_users(self) -> Iterator[User]:
        """Whatever has a named volume: environments, alive or ended, and snapshots."""
        for env in self.table.all():
            yield from users_of(env.handle)
        for snapshot in self.snapshots.all():
            yield from users_of(snapshot.handle, snapshot.name)
        for users in self._unread.values():
            yield from users

    # listeners

    def events_since(self, since_ns: int) -> list[Event]:
        return self.table.index.events_since(since_ns)

    @staticmethod
    def next_events(listener: queue.Queue[Event | None], seconds: float) -> Iterator[Event | None]:
        """The events that come within ``seconds``; None when there will be no more."""
        with contextlib.suppress(queue.Empty):
            yield listener.get(timeout=seconds)
            while True:
                yield listener.get_nowait()

    def layers(self) -> Iterator[tuple[str, Layer, Place]]:
        place = self._maker.nowhere()
        for name, layer in registry.LAYERS.items():
            yield name, layer, place

    @staticmethod
    def uid_base(index: int) -> int:
        return admission.uid_base(index)

    def reset(self, told: Callable[[str, str], None]) -> None:
        """Remove every environment and volume, and unmount the images and the pool of this root; their files stay."""
        self.table.close()
        self._end_builds()
        for env in self.environments():
            try:
                self.remove(env.id, force=True)
                told(env.id, f"environment {env.name}")
            except NotFound:
                continue
            except Exception as error:
                log_defect(f"reset of {env.name}", error)
                raise
        self._maker.close()
        for template in self.templates.prune():
            told(template.id, f"template {template.id}")
        for snapshot in self.snapshots.all():
            self.snapshots.remove(snapshot.name)
            told(snapshot.id, f"snapshot {snapshot.name}")
        for volume, _ in self.volumes.prune():
            told("", f"volume {volume.name}")
        self.kits.close()
        self.images.unmount_all()
        self.pool.close()
        Recovery.remove_cgroups(self.paths, self.facts)
        told("", "image mounts, pool, control groups")
