"""What an environment has changed of its image: told (`diff`), and kept as a new image (`commit`).

Both are read from the overlay's upper directory, where that is, by a program of ours (native/layer.c): beside the
keeper, or in the machine on whose disk it lies. It makes everything inside stand still and lets it go on, so a daemon
that is killed meanwhile leaves nobody frozen. What it says of a machine's files is the machine's word: the layer goes
through the same confined readers as one from a registry.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from isolat.client.streams import Pump
from isolat.deadline import Deadline
from isolat.engine import states
from isolat.engine.environment import Environment
from isolat.engine.files import running
from isolat.engine.states import Verb
from isolat.engine.supervisor import OPERATION_WAIT_S
from isolat.errors import CopyFailed, Lost, StoreError, Unsupported
from isolat.images import authoring, changes
from isolat.images.image import Image
from isolat.images.progress import Progress
from isolat.images.reference import parse_name
from isolat.layers.files import SYSTEM, Copier, Writable
from isolat.places.base import Place
from isolat.places.steps import Cgroup

if TYPE_CHECKING:
    from isolat.engine.engine import Engine

_CHANGES_BYTES_MAX = 256 << 20
_ARCHIVE_MORE_BYTES = 64 << 20  # names, owners and times of what takes no room on a disk
_WORDS_MAX = 64 << 10
_LOOK_S = 0.5
_THAW_S = 10.0


@dataclass(frozen=True)
class Wanted:
    """What `commit` is asked for. ``pause``: everything inside stands still meanwhile."""

    names: tuple[str, ...] = ()
    message: str = ""
    author: str = ""
    change: tuple[str, ...] = ()
    pause: bool = True


Gone = Callable[[], bool]  # nobody waits for it any more


def diff(engine: Engine, env: Environment, gone: Gone = lambda: False) -> list[tuple[str, str]]:
    """(A, C or D, path) as Docker's `diff` tells it, in the order of the paths."""
    states.check(Verb.DIFF, env.state, env.name)
    told = bytearray()

    def take(data: bytes) -> None:
        if len(told) + len(data) > _CHANGES_BYTES_MAX:
            raise CopyFailed(f"{env.name} has changed more than can be told")
        told.extend(data)

    with _held(env, Verb.DIFF), engine.reaching.writable(env) as (copier, writable):
        _read(engine, env, copier, writable, "--changes", take, gone, freeze=False)
    entries = (entry.decode("utf-8", "surrogateescape") for entry in bytes(told).split(b"\0") if entry)
    return sorted(((entry[:1], f"/{entry[1:]}") for entry in entries), key=lambda one: one[1])


def commit(engine: Engine, env: Environment, wanted: Wanted, progress: Progress, gone: Gone = lambda: False) -> Image:
    """The environment's image with one more layer. Raises Unsupported, UsageError, and what the store raises."""
    states.check(Verb.COMMIT, env.state, env.name)
    for name in wanted.names:
        parse_name(name)
    changes.apply({}, wanted.change)
    base = engine.images.resolve(env.handle.digest) if env.handle.digest else None
    main = env.handle.frames[-1].main
    step = authoring.Step(
        created_by=shlex.join(main.argv) if main else "",
        created=authoring.now(),
        author=wanted.author,
        comment=wanted.message,
    )
    with engine.images.build() as build:
        with _held(env, Verb.COMMIT), engine.reaching.writable(env) as (copier, writable):
            write = _Layer(engine, env, copier, writable, wanted.pause and env.state.alive, progress, gone)
            layer = authoring.make_layer(build, write)
        image = authoring.derive(
            engine.images, build, base, layer, step, wanted.names, change=wanted.change, progress=progress
        )
    engine.table.publish("commit", env, image=image.digest)
    return image


@contextlib.contextmanager
def _held(env: Environment, verb: Verb) -> Iterator[None]:
    """Looking at what runs is held back by nothing; all else is one operation."""
    if verb is Verb.DIFF and env.state.alive:
        yield
        return
    with env.operation(f"{verb}", Deadline(OPERATION_WAIT_S)):
        states.check(verb, env.state, env.name)
        yield


@dataclass
class _Layer:
    """Writes the layer into a build, no more than its disk could hold, and says how far it is."""

    engine: Engine
    env: Environment
    copier: Copier
    writable: Writable
    freeze: bool
    progress: Progress
    gone: Gone

    def __call__(self, out: BinaryIO) -> None:
        done, told_s = 0, 0.0
        most = 2 * self.env.spec.disk_bytes + _ARCHIVE_MORE_BYTES

        def take(data: bytes) -> None:
            nonlocal done, told_s
            done += len(data)
            if done > most:
                raise CopyFailed(f"what {self.env.name} has written is more than its disk could hold")
            if time.monotonic() - told_s > _LOOK_S:
                told_s = time.monotonic()
                self.progress(f"reading what {self.env.name} has changed, bytes", done, 0)
            out.write(data)

        _read(self.engine, self.env, self.copier, self.writable, "--layer", take, self.gone, freeze=self.freeze)


def _read(
    engine: Engine,
    env: Environment,
    copier: Copier,
    writable: Writable,
    how: str,
    take: Callable[[bytes], object],
    gone: Gone,
    *,
    freeze: bool,
) -> None:
    """All that the program says goes to ``take``, whose exceptions come through."""
    if freeze and not writable.freezer:
        raise Unsupported(
            f"{env.name} can't be made to stand still: it has no control group", hint="isolat commit --pause=false"
        )
    frozen = ("--freeze", writable.freezer) if freeze else ()
    skipped = [word for path in writable.own for word in ("--own", path)]
    skipped += [word for path in _mounted(engine, env) for word in ("--mount", path)]
    words = (how, "--shift", str(writable.shift), *frozen, *skipped, writable.upper, writable.lower)
    try:
        with running(env, copier, words, stdin=False) as ours, _cut_off(ours, gone):
            listen(ours, take)
    finally:
        if freeze:
            _thaw(copier.place, writable.freezer)


@contextlib.contextmanager
def _cut_off(sock: socket.socket, gone: Gone) -> Iterator[None]:
    """End the conversation when nobody waits for it: a machine may say nothing more for ever."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_S):
            if gone():
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def listen(sock: socket.socket, take: Callable[[bytes], object]) -> None:
    """What a program writes, to its end. Raises CopyFailed with its words where it fails, Lost where it is gone."""
    words = bytearray()
    failed: list[BaseException] = []

    def output(stream: int, data: bytes) -> None:
        if stream == 2:
            words.extend(data[: max(0, _WORDS_MAX - len(words))])
        elif not failed:
            try:
                take(data)
            except BaseException as error:
                failed.append(error)
                sock.shutdown(socket.SHUT_RDWR)

    ending = Pump(sock, on_output=output).run()
    if failed:
        raise failed[0]
    if ending.kind == "lost":
        raise Lost(ending.message)
    if ending.kind != "exited" or ending.code:
        lines = words.decode("utf-8", "backslashreplace").splitlines() or [ending.message]
        raise CopyFailed(lines[-1].removeprefix("isolat-agent: "), details=tuple(lines[:-1][-20:]))


def _thaw(place: Place, file: str) -> None:
    """The program has done that, unless it was killed. Doing it again is fine."""
    directory, _, name = file.rpartition("/")
    with contextlib.suppress(Exception):
        step = Cgroup((directory,), ((file, "THAWED" if name == "freezer.state" else "0"),))
        place.carry_out([step], Deadline(_THAW_S))


def _mounted(engine: Engine, env: Environment) -> Iterator[str]:
    """Where something is mounted inside: below the root, without a slash in front."""
    yield from SYSTEM
    targets = [volume.target for volume in env.spec.volumes] + [tmpfs.target for tmpfs in env.spec.tmpfs]
    with contextlib.suppress(StoreError):
        image = engine.images.find(env.handle.digest)
        targets += [target for _, target in image.binds] if image else []
    for target in targets:
        yield target.strip("/")


def lines(found: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """The form that the daemon's interface has."""
    return [{"kind": kind, "path": path} for kind, path in found]
