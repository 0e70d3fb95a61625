"""A place at the other end of the wire protocol: this machine through a keeper, or the inside of an environment.

Both are the same class: an inside is reached through the same link, with the path of keys that leads to it.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from isolat.checkpoint import checkpoint, counting
from isolat.deadline import Deadline
from isolat.errors import IsolatError, NotFound, ProtocolError
from isolat.places.base import Command, Exit, Facts, Identity, Io, Place, Proc
from isolat.places.link import Asked, Link, exit_of
from isolat.places.steps import Idmap, Step
from isolat.wire import kinds as k
from isolat.wire.codec import Fields

_CHUNK_BYTES = 256 << 10
_STEPS_UNDER_WAY = 64


class WiredPlace:
    """A place reached over a link. ``to`` is the path of keys to it; empty for the keeper's own machine."""

    def __init__(self, link: Callable[[Deadline], Link], facts: Facts, to: str = "") -> None:
        """``link`` gives the connection, making it where there is none."""
        self._link = link
        self._facts = facts
        self._to = to

    @property
    def facts(self) -> Facts:
        return self._facts

    def full_name(self, key: str) -> str:
        return f"{self._to}/{key}" if self._to else key

    def _route(self, key: str) -> Fields:
        """KEY and TO for a key, which may itself be a path (``guest/main``)."""
        to, _, last = self.full_name(key).rpartition("/")
        return [(k.T_KEY, last), (k.T_TO, to)] if to else [(k.T_KEY, last)]

    def _here(self) -> Fields:
        return [(k.T_TO, self._to)] if self._to else []

    def carry_out(self, steps: Sequence[Step], d: Deadline, descriptors: Sequence[int] = ()) -> None:
        self._do(list(steps), 0, d, descriptors)

    def revert(self, steps: Sequence[Step], d: Deadline) -> None:
        self._do(list(reversed(steps)), 1, d)

    def _do(self, steps: list[Step], op: int, d: Deadline, descriptors: Sequence[int] = ()) -> None:
        """Each step's request is sent before the last one's reply is there; the first failure is raised at the end.

        The keeper takes them in order. What it still carries out behind one that failed is undone with all the rest.
        """
        link, failed = self._link(d), None
        asked: deque[Asked] = deque()

        def settle(most: int) -> None:
            nonlocal failed
            while len(asked) > most:
                try:
                    link.result(asked.popleft(), d)
                except IsolatError as error:
                    failed = failed or error
                checkpoint()

        for step in steps:
            if failed is not None and not op:
                break
            fds = _descriptors_of(step, descriptors) if not op else []
            asked.append(link.ask(k.STEP, [(k.T_OP, op), (k.T_STEP, step.to_wire()), *self._here()], fds))
            settle(0 if counting() else _STEPS_UNDER_WAY)
        settle(0)
        if failed is not None:
            raise failed

    def spawn(self, key: str, cmd: Command, io: Io, d: Deadline) -> Proc:
        return self.begin(key, cmd, io, d).finish(d)

    def begin(self, key: str, cmd: Command, io: Io, d: Deadline) -> _Starting:
        link = self._link(d)
        asked = link.ask(k.SPAWN, [*self._route(key), *_command_fields(cmd), *_io_fields(cmd, io)])
        return _Starting(link, key, asked)

    def hold(self, descriptors: Mapping[str, int], d: Deadline) -> None:
        link, names = self._link(d), list(descriptors)
        for n in range(0, len(names), k.MAX_DESCRIPTORS):
            some = names[n : n + k.MAX_DESCRIPTORS]
            link.request(k.HOLD, [(k.T_KEY, name) for name in some], d, [descriptors[name] for name in some])

    def fetch(self, name: str, d: Deadline) -> int:
        _, fds = self._link(d).request(k.FETCH, [(k.T_KEY, name)], d)
        if len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise NotFound(f"the keeper gave no descriptor for {name}", stage="fetch")
        return fds[0]

    def drop(self, names: Sequence[str], d: Deadline) -> None:
        self._link(d).request(k.DROP, [(k.T_KEY, name) for name in names], d)

    def resume(self, identity: Identity, d: Deadline) -> None:
        fields: Fields = [(k.T_DATA, identity.entropy), *((k.T_PATH, path) for path in identity.devices)]
        fields += [(k.T_TIME, identity.time_ns)] if identity.time_ns else []
        fields += [(k.T_HOST, identity.host)] if identity.host else []
        fields += [(k.T_OPTIONS, identity.mac)] if identity.mac else []
        self._link(d).request(k.RESUME, [*fields, *self._here()], d)

    def settle(self, d: Deadline, *, keep_cache: bool = False) -> None:
        self._link(d).request(k.SETTLE, [(k.T_OP, int(keep_cache)), *self._here()], d)

    def hush(self, d: Deadline) -> None:
        self._link(d).request(k.HUSH, [(k.T_OP, 0), *self._here()], d)

    def speak(self, d: Deadline) -> None:
        self._link(d).request(k.HUSH, [(k.T_OP, 1), *self._here()], d)

    def adopt(self, key: str, client: int, stdin: bool, d: Deadline) -> None:
        flags = k.F_STDIN if stdin else 0
        try:
            self._link(d).request(k.ADOPT, [(k.T_KEY, self.full_name(key)), (k.T_FLAGS, flags)], d, [client])
        finally:
            os.close(client)

    def procs(self, prefix: str, d: Deadline) -> list[Proc]:
        full = self.full_name(prefix)
        frame, _ = self._link(d).request(k.PROCS, [(k.T_PREFIX, full)], d)
        cut = len(full) - len(prefix)
        found = []
        for row in frame.nested(k.T_PROC):
            ended = exit_of(row) if row.int(k.T_STATE) else None
            times = row.ints(k.T_TIME)
            found.append(Proc(row.text(k.T_KEY)[cut:], row.int(k.T_PID), ended, times[0] if times else 0))
        return found

    def wait(self, key: str, d: Deadline) -> Exit:
        return self._link(d).wait_exit(self.full_name(key), d)

    def signal(self, key: str, n: int, d: Deadline, *, everything: bool = False) -> None:
        scope = k.SCOPE_ALL if everything else k.SCOPE_PROCESS
        self._link(d).request(k.SIGNAL, [*self._route(key), (k.T_SIGNAL, n), (k.T_SCOPE, scope)], d)

    def resize(self, key: str, rows: int, cols: int, d: Deadline) -> None:
        fields: Fields = [(k.T_KEY, self.full_name(key)), (k.T_ROWS, rows), (k.T_COLS, cols)]
        self._link(d).request(k.RESIZE, fields, d)

    def forget(self, key: str, d: Deadline) -> None:
        link = self._link(d)
        with contextlib.suppress(IsolatError):
            link.request(k.FORGET, self._route(key), d)
        link.forget(self.full_name(key))

    def put(self, path: str, source: int, d: Deadline, mode: int = 0o644) -> None:
        link, offset = self._link(d), 0
        while True:
            data = os.read(source, _CHUNK_BYTES)
            if not data and offset:
                return
            flags = 0 if offset else k.F_TRUNCATE
            fields: Fields = [
                (k.T_PATH, path), (k.T_OFFSET, offset), (k.T_DATA, data), (k.T_MODE, mode), (k.T_FLAGS, flags),
            ]  # fmt: skip
            link.request(k.WRITE, [*fields, *self._here()], d)
            offset += len(data)
            if not data:
                return

    def get(self, path: str, target: int, most_bytes: int, d: Deadline) -> None:
        link, offset = self._link(d), 0
        while offset < most_bytes:
            count = min(_CHUNK_BYTES, most_bytes - offset)
            fields: Fields = [(k.T_PATH, path), (k.T_OFFSET, offset), (k.T_COUNT, count)]
            data = link.request(k.READ, [*fields, *self._here()], d)[0].bytes(k.T_DATA)
            if len(data) > count:
                raise ProtocolError(f"{len(data)} bytes of {path} came where {count} were asked for", stage="read")
            if not data:
                return
            offset += len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]

    def inside(self, key: str, facts: Facts) -> Place:
        return WiredPlace(self._link, facts, self.full_name(key))


class _Starting:
    """A SPAWN under way."""

    def __init__(self, link: Link, key: str, asked: Asked) -> None:
        self._link, self._key, self._asked = link, key, asked

    def finish(self, d: Deadline) -> Proc:
        frame, fds = self._link.result(self._asked, d)
        for fd in fds:
            os.close(fd)
        return Proc(self._key, frame.int(k.T_PID))


def _descriptors_of(step: Step, descriptors: Sequence[int]) -> list[int]:
    """What comes along with this step: the source that the caller opened."""
    return [descriptors[step.descriptor]] if isinstance(step, Idmap) and step.descriptor >= 0 else []


def _command_fields(cmd: Command) -> Fields:
    fields: Fields = [(k.T_ARGV, os.fsencode(arg)) for arg in cmd.argv]
    fields += [(k.T_ENV, os.fsencode(f"{name}={value}")) for name, value in cmd.env]
    fields += [(k.T_CGROUP, path) for path in cmd.cgroup_files]
    fields += [(k.T_HELD, name) for name in cmd.held]
    fields += [(k.T_INVERSE, os.fsencode(arg)) for arg in cmd.after]
    numbers = (
        (k.T_SPACES, cmd.spaces),
        (k.T_SIZE, cmd.file_bytes),
        (k.T_PARK, round(cmd.park_s * 1000)),
        (k.T_GRACE, round(cmd.grace_s * 1000)),
    )
    fields += [(tag, number) for tag, number in numbers if number]
    for tag, value in ((k.T_CWD, cmd.cwd), (k.T_USER, cmd.user), (k.T_ROOT, cmd.root), (k.T_PIDFILE, cmd.pidfile)):
        if value:
            fields.append((tag, os.fsencode(value)))
    return fields


def _io_fields(cmd: Command, io: Io) -> Fields:
    flags = (
        (k.F_TTY if io.tty else 0)
        | (k.F_STDIN if io.stdin else 0)
        | (k.F_LOG if io.log else 0)
        | (k.F_MAIN if io.main else 0)
        | (k.F_CONTROL if cmd.control else 0)
        | (k.F_LAUNCHER if cmd.pidfile else 0)
        | (k.F_SERIAL if cmd.serial else 0)
        | (k.F_CONFINED if cmd.confined else 0)
        | (k.F_APART if io.home else 0)
        | (k.F_BESIDE if io.beside else 0)
    )
    home: Fields = [(k.T_HOME, os.fsencode(io.home))] if io.home else []
    return [(k.T_FLAGS, flags), (k.T_ROWS, io.rows), (k.T_COLS, io.cols), *home]
