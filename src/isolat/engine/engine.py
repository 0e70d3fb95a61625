"""The engine: the verbs on environments.

It makes and unmakes; layers describe. ``create`` is: write the handle, carry out the plan's steps in the place,
start; ``destroy`` is: stop, revert the steps, delete the handle. One operation at a time per environment; different
environments never wait for each other.
"""

from __future__ import annotations

import contextlib
import grp
import os
import queue
import signal as signals
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isolat.checkpoint import checkpoint
from isolat.deadline import NEVER, Deadline
from isolat.engine import admission, states
from isolat.engine.creation import Planned, Request, boot_id, describe, handle_of, plan_stack
from isolat.engine.endings import Endings
from isolat.engine.environment import Environment
from isolat.engine.events import Event, EventBus
from isolat.engine.index import Index, Row
from isolat.engine.journal import log, log_defect
from isolat.engine.keepers import Keepers
from isolat.engine.names import new_id, new_name
from isolat.engine.paths import StateRoot, native_dir
from isolat.engine.recovery import Recovery
from isolat.engine.states import Verb
from isolat.engine.workers import Timers, Workers
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
from isolat.images.pool import Pool
from isolat.images.store import ImageStore
from isolat.layers import registry
from isolat.layers.base import GUEST, CanEnter, ImageRef, Layer, Probe, State
from isolat.linux.facts import record_facts
from isolat.places.base import Command, Exit, Io, Place
from isolat.places.link import Link, Reactor
from isolat.places.wired import WiredPlace
from isolat.spec.model import Spec
from isolat.spec.parse import parse
from isolat.trace import mark

_START_S = float(os.environ.get("ISOLAT_START_S", "60"))  # tests shorten it
_PROBE_KEPT_S = 300.0
_AGAIN_S = 5.0
_RETRY_MOST_S = 60.0
_STOP_MORE_S = 10.0
_REMOVE_WAIT_S = 30.0


GROUP = "isolat"


def group_id() -> int | None:
    """The group whose members may use the daemon, where the machine has it."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


@dataclass(frozen=True)
class Caller:
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class ExecRequest:
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    user: str = ""
    io: Io = Io()


class Engine:
    """All environments of one state root. Holds its lock's owner's word: nobody else touches this root."""

    def __init__(self, root: Path) -> None:
        self.paths = StateRoot(root)
        self.facts = record_facts()
        self.images = ImageStore(root)
        self.pool = Pool(root)
        self.events = EventBus()
        self._reactor = Reactor()
        self._libexec = native_dir()
        self._keepers = Keepers(self._reactor, self.facts, self._libexec)
        self._endings = Endings(self._keepers, self.facts, self.paths.cgroup)
        self._workers = Workers()
        self._timers = Timers()
        self._index = Index(self.paths.index)
        self._table = threading.Lock()
        self._by_id: dict[str, Environment] = {}
        self._names: dict[str, str] = {}
        self._uids: set[int] = set()
        self._probes: dict[tuple[str, str], tuple[float, Probe]] = {}
        self._boot_id = boot_id()
        self._group = group_id()
        self._first_uid = int(self.paths.tag, 16) % admission.UID_RANGES
        self._making: dict[str, str] = {}  # id to image digest, of environments that are not in the table yet
        self._closing = False
        self.changed = time.monotonic()

    # life of the engine

    def start(self) -> None:
        """Find every environment again, settle what ended meanwhile, sweep what nobody owns."""
        for directory in (self.paths.envs, self.paths.runtime):
            directory.mkdir(parents=True, exist_ok=True, mode=0o711)
        recovery = Recovery(self.paths, self._keepers, self._endings, self._boot_id)
        for env in recovery.find():
            self._enter(env)
            if env.state.alive:
                self._rejoin(env, recovery)
        known = {*self._by_id, *recovery.unread}
        self._uids.update(index for index in recovery.unread.values() if index >= 0)
        recovery.sweep(known, self.facts)
        if self.pool.exists():
            self.pool.ensure()
            self.pool.sweep(known)
        self._index.start([self._row(env) for env in self._by_id.values()])
        for env in list(self._by_id.values()):
            if env.handle.remove and not env.state.alive:
                self._workers.submit(lambda env=env: self._remove(env))  # type: ignore[misc]

    def close(self) -> None:
        """Let go of everything; environments go on under their keepers."""
        self.events.close()
        self._timers.close()
        self._workers.close()
        for env in list(self._by_id.values()):
            if env.link is not None:
                env.link.on_closed = None
                env.link.close()
        self._reactor.stop()
        self._index.close()
        Recovery.leave_cgroups(self.paths, self.facts)

    @property
    def alive_count(self) -> int:
        return sum(1 for env in list(self._by_id.values()) if env.state.alive)

    # making

    def plan(self, service: Mapping[str, object], caller: Caller) -> tuple[list[dict[str, object]], str]:
        """What ``run`` would do. Makes no environment; the image is mounted and the pool made, if they were not yet."""
        spec = parse(service)
        id = new_id()
        try:
            request = self._request(spec, service, caller, id, spec.name or "NAME", 0)
            return describe(self._plan(request, Deadline(_START_S)))
        finally:
            with self._table:
                self._making.pop(id, None)

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
        spec = parse(service)
        if len(descriptors) != len(spec.volumes):
            raise UsageError(
                f"{len(spec.volumes)} volumes came with {len(descriptors)} descriptors",
                hint="open each source with O_PATH and send the descriptors in order",
            )
        admission.check(spec, self.facts.memory_bytes, self.facts.cpus, self.paths.root)
        d = Deadline(_START_S)
        env, planned = self._create(spec, service, caller, d)
        io = Io(spec.tty, stdin, spec.logging != "none", True, rows, cols)
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
        with self._table:
            if self._closing:
                raise Conflict("everything is being reset: nothing new is started")
            name = self._reserve(spec.name, id)
            index = admission.free_uid_index(self._uids, self._first_uid)
            self._uids.add(index)
        try:
            request = self._request(spec, service, caller, id, name, index)
            planned = self._plan(request, d)
            mark("planned")
            env = Environment(handle_of(request, planned, self._boot_id), self.paths.env(id))
            env.spec = spec
            env.directory.mkdir(mode=0o711)
            if self._group is not None:
                # Logs and exit records are the group's to read, through a descriptor: it is equivalent to root.
                os.chown(env.directory, 0, self._group)
                os.chmod(env.directory, 0o2711)
            checkpoint()
            env.save()
            mark("handle-saved")
        except BaseException:
            with self._table:
                self._names.pop(name, None)
                self._uids.discard(index)
                self._making.pop(id, None)
            with contextlib.suppress(OSError):
                self.paths.env(id).rmdir()
            raise
        with self._table:
            self._by_id[id] = env
            self._making.pop(id, None)
            closing = self._closing
        if closing:
            self._undo(env)
            raise Conflict("everything is being reset: nothing new is started")
        self._publish("create", env, image=spec.image, layer=spec.layer)
        return env, planned

    def _request(
        self, spec: Spec, service: Mapping[str, object], caller: Caller, id: str, name: str, index: int
    ) -> Request:
        stack = registry.resolve(spec.layers)
        image = self._image(id, spec.image) if stack[0].capabilities.images else None
        upper = str(self.paths.pool / id) if image and self.pool.ensure() else ""
        return Request(id, name, spec, service, image, index, upper, caller.uid, caller.gid)

    def _image(self, id: str, name: str) -> ImageRef:
        image = self.images.resolve(name)
        with self._table:
            self._making[id] = image.digest
        return ImageRef(
            digest=image.digest,
            mount=str(self.images.mount(image.digest)),
            env=image.env,
            command=image.command,
            working_dir=image.working_dir,
            user=image.user,
            binds=image.binds,
        )

    def _plan(self, request: Request, d: Deadline) -> list[Planned]:
        place = WiredPlace(self._no_link, self.facts)
        stack = registry.resolve(request.spec.layers)
        probe = lambda layer, where, until: self.probe(layer, where, until, request.spec)  # noqa: E731
        return plan_stack(request, stack, place, self.paths, self._libexec, probe, d)

    def probe(self, layer: Layer, place: Place, d: Deadline, spec: Spec | None = None) -> Probe:
        """What the place allows this layer, remembered for a while when it is ready."""
        key = (layer.name, spec.oci_runtime if spec else "")
        at, found = self._probes.get(key, (0.0, None))
        if found is None or not found.ready or time.monotonic() - at > _PROBE_KEPT_S:
            found = layer.probe(place, d.sooner(20))
            self._probes[key] = (time.monotonic(), found)
        return found

    @staticmethod
    def _no_link(_: Deadline) -> Link:
        raise Unsupported("a plan must not touch its place")

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
        self._watch(env)
        mark("keeper-started")
        checkpoint()
        place: Place = WiredPlace(env.live_link, self.facts)
        ours = None
        for depth, item in enumerate(planned):
            place.carry_out(item.plan.steps, d, descriptors if depth == 0 else ())
            mark("steps-carried-out")
            last = depth == len(planned) - 1
            if last and attach:
                ours = self._adopt(place, item.frame.main_key, io.stdin, d)
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
        self._publish("start", env)
        self._rearm(env)
        return ours

    @staticmethod
    def _adopt(place: Place, key: str, stdin: bool, d: Deadline) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            place.adopt(key, theirs.detach(), stdin, d)
        except BaseException:
            ours.close()
            raise
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
        self._leave(env)

    # ending

    def _rejoin(self, env: Environment, recovery: Recovery) -> None:
        """Watch what was found to run. A keeper that lives but does not answer yet is asked again and again."""
        if env.link is not None:
            self._watch(env)
            self._rearm(env)
            self._catch_up(env, env.link)
            return

        def again() -> None:
            with env.operation("being found again", Deadline(_REMOVE_WAIT_S)):
                if env.link is None and env.state.alive and recovery.recover(env) and env.state.alive:
                    self._rejoin(env, recovery)

        self._timers.after(_AGAIN_S, lambda: self._workers.submit(again))

    def _watch(self, env: Environment) -> None:
        assert env.link is not None
        link, main = env.link, env.handle.main_name

        def exited(name: str, exit: Exit) -> None:
            if name == main:
                self._workers.submit(lambda: self._ended(env, exit))
            else:
                self._workers.submit(lambda: self._forget(env, name))

        def closed() -> None:
            self._workers.submit(lambda: self._keeper_gone(env, link))

        link.on_exited, link.on_closed = exited, closed

    def _catch_up(self, env: Environment, link: Link) -> None:
        """What happened between finding a keeper and watching it."""
        exit = link.exit_of(env.handle.main_name)
        if exit is not None:
            self._workers.submit(lambda: self._ended(env, exit))
        elif link.closed:
            self._workers.submit(lambda: self._keeper_gone(env, link))
        else:
            self._workers.submit(lambda: self._forget_ended(env))

    def _forget_ended(self, env: Environment) -> None:
        """Execs that ended while no daemon lived: nobody will ask for them any more."""
        with contextlib.suppress(IsolatError):
            inside = self._innermost(env)
            for proc in inside.procs("exec-", Deadline(10)):
                if proc.exit is not None:
                    inside.forget(proc.key, Deadline(10))

    def _forget(self, env: Environment, name: str) -> None:
        with contextlib.suppress(IsolatError):
            to_main, _, _ = env.handle.main_name.rpartition("/")
            key = name.removeprefix(f"{to_main}/") if to_main else name
            self._innermost(env).forget(key, Deadline(10))

    def _ended(self, env: Environment, exit: Exit) -> None:
        """The application has ended: settle, and remove where that was asked for."""
        with env.operation("settling", Deadline(_REMOVE_WAIT_S)):
            if env.state != State.RUNNING:
                return
            if env.handle.remove:
                exit = replace(exit, forced=env.forced, oom=self._endings.oom(env))
                env.handle = env.handle.with_(exit=exit, reason=env.stop_reason)
                self._publish("die", env, code=exit.code, signal=exit.signal)
                self._destroy_or_retry(env)
                return
            self._endings.settle(env, exit)
        self._tell_end(env)

    def _keeper_gone(self, env: Environment, link: Link) -> None:
        """Its keeper died. With an exit record the application had ended; else nobody knows, and that is said."""
        with env.operation("settling", Deadline(_REMOVE_WAIT_S)):
            if env.link is not link or env.state != State.RUNNING:
                return
            exit = link.exit_of(env.handle.main_name)
            reason = "" if exit else "its keeper was killed, so it is not known how the application ended"
            self._endings.settle(env, exit, reason)
        self._tell_end(env)
        if env.handle.remove:
            self._remove(env)

    def _tell_end(self, env: Environment) -> None:
        exit = env.handle.exit
        self._index.put(self._row(env))
        if exit is None:
            self._publish("lost", env, reason=env.handle.reason)
        else:
            if exit.oom:
                self._publish("oom", env)
            self._publish("die", env, code=exit.code, signal=exit.signal)
        env.ended.set()

    def _destroy(self, env: Environment) -> None:
        self._endings.destroy(env)
        self._leave(env)
        self._publish("destroy", env)

    def _destroy_or_retry(self, env: Environment, wait_s: float = 1.0) -> None:
        """Destroy what nobody will ask for again; what stands in the way may go, so that is tried until it works."""
        try:
            self._destroy(env)
        except (IsolatError, OSError) as error:
            log(f"{env.name}: removing it failed, again in {wait_s:g} s: {error}")
            env.handle = env.handle.with_(state=State.REMOVING)
            with contextlib.suppress(OSError):
                env.save()
            env.ended.set()
            later = min(2 * wait_s, _RETRY_MOST_S)
            self._timers.after(wait_s, lambda: self._workers.submit(lambda: self._remove(env, later)))

    def _remove(self, env: Environment, wait_s: float = 1.0) -> None:
        with env.operation("removing", Deadline(_REMOVE_WAIT_S)):
            if not env.gone.is_set():
                self._destroy_or_retry(env, wait_s)

    def _rearm(self, env: Environment) -> None:
        """The clock of --timeout, which goes on over restarts of the daemon."""
        timeout_s = env.spec.timeout_s
        if timeout_s is None:
            return
        left_s = timeout_s - (time.time_ns() - env.handle.started_ns) / 1e9

        def out_of_time() -> None:
            if env.state == State.RUNNING:
                env.stop_reason = f"stopped after {timeout_s:g} s (--timeout)"
                self._publish("timeout", env)
                threading.Thread(target=self._stop_quietly, args=(env,), daemon=True).start()

        self._timers.after(max(0.0, left_s), out_of_time)

    def _stop_quietly(self, env: Environment) -> None:
        try:
            self.stop(env.id, None)
        except IsolatError:
            self._kill_whole(env)  # somebody else is stopping it, more patiently than its time allows

    # verbs on one environment

    def find(self, ref: str) -> Environment:
        """By id, name, or an unambiguous beginning of the id."""
        with self._table:
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

    def environments(self) -> list[Environment]:
        with self._table:
            return sorted(self._by_id.values(), key=lambda env: env.handle.created_ns)

    def exec(self, ref: str, request: ExecRequest, *, attach: bool) -> tuple[str, socket.socket | None]:
        """Start a further process inside. Returns its full name and, attached, the client's end of its streams."""
        env = self.find(ref)
        states.check(Verb.EXEC, env.state, env.name)
        d = Deadline(_START_S)
        inside, key = self._innermost(env), env.new_exec_key()
        main = env.handle.frames[-1].main
        assert main is not None
        merged = dict(main.env)
        if request.io.tty:
            merged.setdefault("TERM", "xterm")
        merged.update(request.environment)
        command = Command(
            argv=request.command,
            env=tuple(merged.items()),
            cwd=request.working_dir or main.cwd,
            user=request.user or main.user,
        )
        ours = self._adopt(inside, key, request.io.stdin, d) if attach else None
        try:
            inside.spawn(key, command, request.io, d)
        except BaseException as error:
            if ours is not None:
                ours.close()
            if isinstance(error, (NotFound, Lost, StartFailed)) and self._has_ended(env):
                raise IllegalState(f"cannot exec in {env.name}: it has just ended") from error
            raise
        self._publish("exec", env, command=list(request.command))
        return key, ours

    @staticmethod
    def _has_ended(env: Environment) -> bool:
        link = env.link
        return link is None or link.closed or link.exit_of(env.handle.main_name) is not None

    def _innermost(self, env: Environment) -> Place:
        """The inside of the last layer: where exec starts its processes."""
        place: Place = WiredPlace(env.live_link, self.facts)
        for frame in env.handle.frames:
            layer = registry.LAYERS[frame.layer]
            if not isinstance(layer, CanEnter):
                raise Unsupported(f"the layer {frame.layer} cannot be entered")
            place = layer.inside(frame, place)
        return place

    def _last(self, env: Environment) -> tuple[Layer, Place]:
        """The last layer and the place it is in."""
        place: Place = WiredPlace(env.live_link, self.facts)
        for frame in env.handle.frames[:-1]:
            layer = registry.LAYERS[frame.layer]
            assert isinstance(layer, CanEnter)
            place = layer.inside(frame, place)
        return registry.LAYERS[env.handle.frames[-1].layer], place

    def attach(self, ref: str, stdin: bool) -> tuple[Environment, socket.socket]:
        env = self.find(ref)
        states.check(Verb.ATTACH, env.state, env.name)
        _, place = self._last(env)
        return env, self._adopt(place, env.handle.frames[-1].main_key, stdin, Deadline(10))

    def stop(self, ref: str, grace_s: float | None) -> Environment:
        """Ask it to end, and kill it when ``grace_s`` (default: of its spec) has passed."""
        env = self.find(ref)
        if env.state == State.CREATING:
            with env.operation("stopping", Deadline(_START_S)):
                pass
        states.check(Verb.STOP, env.state, env.name)
        if not env.state.alive:
            return env
        grace_s = env.spec.stop_grace_s if grace_s is None else grace_s
        with env.operation("stopping"):
            layer, place = self._last(env)
            self._publish("stop", env)
            with contextlib.suppress(Lost):  # its keeper died meanwhile, which is an end as well
                ended = layer.stop(env.handle.frames[-1], place, grace_s, Deadline(grace_s + _STOP_MORE_S))
                env.forced = env.forced or ended.forced
        done = env.gone if env.handle.remove else env.ended
        if not done.wait(_REMOVE_WAIT_S):
            raise DeadlineExceeded(
                f"{env.name} was killed, but has not come to its end", stage="stop", hint=f"isolat rm -f {env.name}"
            )
        return env

    def _kill_whole(self, env: Environment) -> None:
        """SIGKILL to all of it, whoever holds the environment: whoever waits for its end then goes on."""
        frame = env.handle.frames[0]
        key = GUEST if frame.has_guest else frame.main_key
        env.forced = True
        with contextlib.suppress(IsolatError):
            place = WiredPlace(env.live_link, self.facts)
            place.signal(key, signals.SIGKILL, Deadline(5), everything=not frame.has_guest)

    def kill(self, ref: str, signal: int) -> None:
        env = self.find(ref)
        states.check(Verb.KILL, env.state, env.name)
        _, place = self._last(env)
        self._publish("kill", env, signal=signal)
        place.signal(env.handle.frames[-1].main_key, signal, Deadline(10))

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
        states.check(Verb.REMOVE_FORCED if force else Verb.REMOVE, env.state, env.name)
        if force and env.state == State.RUNNING:
            self._kill_whole(env)
        with env.operation("removing", Deadline(_REMOVE_WAIT_S) if force else None):
            if env.gone.is_set():
                return
            if env.state.alive:
                env.forced = True
                env.handle = env.handle.with_(exit=Exit(128 + signals.SIGKILL, signals.SIGKILL, forced=True))
            # A daemon that is killed from here on finishes the removal at its next start.
            env.save(remove=True, state=State.REMOVING)
            self._destroy(env)

    def in_use(self) -> set[str]:
        """The digests of images that an environment stands on."""
        with self._table:
            making = set(self._making.values())
        return making | {env.handle.digest for env in self.environments() if env.handle.digest}

    # listeners

    def events_since(self, since_ns: int) -> list[Event]:
        return self._index.events_since(since_ns)

    @staticmethod
    def next_events(listener: queue.Queue[Event | None], seconds: float) -> Iterator[Event | None]:
        """The events that come within ``seconds``; None when there will be no more."""
        with contextlib.suppress(queue.Empty):
            yield listener.get(timeout=seconds)
            while True:
                yield listener.get_nowait()

    def layers(self) -> Iterator[tuple[str, Layer, Place]]:
        place = WiredPlace(self._no_link, self.facts)
        for name, layer in registry.LAYERS.items():
            yield name, layer, place

    @staticmethod
    def uid_base(index: int) -> int:
        return admission.uid_base(index)

    # the table

    def _reserve(self, wanted: str, id: str) -> str:
        if wanted:
            if wanted in self._names:
                raise Conflict(
                    f"the name {wanted} is taken by {self._names[wanted]}",
                    hint=f"remove that one with `isolat rm {wanted}`, or use another name",
                )
            self._names[wanted] = id
            return wanted
        while (name := new_name()) in self._names:
            name = f"{name}_{os.urandom(2).hex()}"
            if name not in self._names:
                break
        self._names[name] = id
        return name

    def _enter(self, env: Environment) -> None:
        with self._table:
            self._by_id[env.id] = env
            self._names[env.name] = env.id
            self._uids.add(env.handle.uid_index)

    def _leave(self, env: Environment) -> None:
        with self._table:
            self._by_id.pop(env.id, None)
            if self._names.get(env.name) == env.id:
                del self._names[env.name]
            self._uids.discard(env.handle.uid_index)
        self._index.drop(env.id)
        env.ended.set()
        env.gone.set()

    def _publish(self, what: str, env: Environment, **details: Any) -> None:
        event = Event(what, env.id, env.name, details=details)
        self.changed = time.monotonic()
        self._index.event(event)
        if what in ("create", "start"):
            self._index.put(self._row(env))
        self.events.publish(event)

    def _row(self, env: Environment) -> Row:
        handle = env.handle
        code = handle.exit.code if handle.exit else None
        layer = "/".join(frame.layer for frame in handle.frames)
        return (env.id, env.name, str(env.state), handle.image, layer, handle.created_ns, code)

    def reset(self, told: Callable[[str, str], None]) -> None:
        """Remove every environment, and unmount the images and the pool of this root; their files stay."""
        with self._table:
            self._closing = True
        for env in self.environments():
            try:
                self.remove(env.id, force=True)
                told(env.id, f"environment {env.name}")
            except NotFound:
                continue
            except Exception as error:
                log_defect(f"reset of {env.name}", error)
                raise
        self.images.unmount_all()
        self.pool.close()
        Recovery.remove_cgroups(self.paths, self.facts)
        told("", "image mounts, pool, control groups")
