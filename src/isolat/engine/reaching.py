"""From an environment to its files, whether it runs or has ended (layers/files.py).

One that has ended is opened: a keeper of its own, in a directory of its own, mounts the root file system anew, or boots
a machine around the disk, whose file system nobody but a guest's kernel ever reads. Nothing of the environment runs
there. It is closed when the copying ends; what a daemon that was killed has left open its successor closes.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from isolat.checkpoint import checkpoint
from isolat.deadline import Deadline
from isolat.engine import entering
from isolat.engine.environment import Environment
from isolat.engine.journal import log
from isolat.engine.keepers import Keepers, quit_keeper
from isolat.engine.maker import START_S, Maker
from isolat.engine.paths import native_dir
from isolat.errors import IsolatError, Refused, Unsupported
from isolat.guest.files import AGENT
from isolat.images.store import ImageStore
from isolat.layers import registry
from isolat.layers.base import CanEnter, Frame, Layer
from isolat.layers.files import AGENT_INSIDE, CanCopy, CanKeep, Copier, Writable
from isolat.places.base import Facts, Io, Place
from isolat.places.steps import Cgroup, Step
from isolat.places.wired import WiredPlace

OPENED = "opened"
_IDLE_S = 5  # without a daemon
_FIND_S = 3.0
_CLOSE_S = 30.0


class Reaching:
    """For environments whose operation the caller holds, unless they run."""

    def __init__(self, facts: Facts, keepers: Keepers, images: ImageStore, maker: Maker) -> None:
        self._facts = facts
        self._keepers = keepers
        self._images = images
        self._maker = maker

    @contextlib.contextmanager
    def copier(self, env: Environment, *, write: bool) -> Iterator[Copier]:
        """Raises Unsupported where nothing can be copied, Lost where what it was in is gone."""
        n, layer = _copying(env)
        if env.state.alive:
            place = entering.at(env, self._facts, n)
            yield layer.copier(env.handle.frames[n], place, self._agent(env, n))
            return
        keeping = _keeping(env)
        if write and env.spec.read_only:
            raise Refused(f"{env.name} was not to write to its root file system (--read-only), so nobody else does")
        frame, d = env.handle.frames[n], Deadline(START_S)
        root = keeping.root(frame, write=write)
        with self._opened(env, d) as place:
            try:
                place.revert(root.steps, d)  # what a machine that was killed has left on its disk
                place.carry_out(root.steps, d)
                checkpoint()
                killed_next = ("--disk", root.disk) if write and _is_machine(env) else ()
                options = ("--root", root.path, *root.options, *killed_next)
                yield Copier(place, self._agent(env, n, ended=True), options)
            finally:
                with contextlib.suppress(IsolatError):
                    place.revert(root.steps, Deadline(_CLOSE_S))

    @contextlib.contextmanager
    def writable(self, env: Environment) -> Iterator[tuple[Copier, Writable]]:
        """A program that reads what it has written, and where that is. Raises what ``copier`` raises."""
        keeping = _keeping(env)
        n, _ = _copying(env)
        frame, d = env.handle.frames[n], Deadline(START_S)
        if env.state.alive:
            place = _home(frame, entering.at(env, self._facts, n))
            yield Copier(place, self._agent(env, n, ended=True)), keeping.writable(frame, place.facts)
            return
        keeping.root(frame, write=False)  # which says where nothing is left
        with self._opened(env, d) as place:
            yield Copier(place, self._agent(env, n, ended=True)), keeping.writable(frame, place.facts)

    def _agent(self, env: Environment, n: int, *, ended: bool = False) -> str:
        """The program in the place that its frame ``n`` is in; ``ended``: or, for a machine, in that machine."""
        inside = env.handle.frames[: n + 1] if ended else env.handle.frames[:n]
        around = (*(env.handle.around.layers if env.handle.around else ()), *(frame.layer for frame in inside))
        if any(registry.LAYERS[name].capabilities.machine for name in around):
            return AGENT_INSIDE
        return str(native_dir() / AGENT)

    # what has ended

    @contextlib.contextmanager
    def _opened(self, env: Environment, d: Deadline) -> Iterator[Place]:
        """The place where its files are, with nothing mounted yet."""
        if env.handle.around is not None:
            yield entering.outermost(env, self._facts)
            return
        self.mend(env)
        self._images.mount(env.handle.digest)
        directory = env.directory / OPENED
        directory.mkdir(mode=0o711)
        checkpoint()
        link = self._keepers.start(directory, env.name, d, _IDLE_S)
        place: Place = WiredPlace(lambda _: link, self._facts)
        try:
            yield self._machine(env, place, directory, d) if _is_machine(env) else place
        finally:
            try:
                place.revert(_outside(env), Deadline(_CLOSE_S))
            finally:
                quit_keeper(link, Deadline(_CLOSE_S))
                shutil.rmtree(directory, ignore_errors=True)

    def _machine(self, env: Environment, place: Place, directory: Path, d: Deadline) -> Place:
        planned = self._maker.around_disk(env, directory, d)
        place.carry_out(planned.plan.steps, d)
        self._maker.provide(planned.plan, place, d, ())
        checkpoint()
        planned.layer.start(planned.frame, place, Io(), d)
        checkpoint()
        assert isinstance(planned.layer, CanEnter)
        return planned.layer.inside(planned.frame, place)

    def mend(self, env: Environment) -> None:
        """Close what a daemon that was killed has left open. Raises what could not be undone."""
        directory = env.directory / OPENED
        if not directory.exists():
            return
        d = Deadline(_CLOSE_S)
        link = self._keepers.find(directory, env.name, Deadline(_FIND_S))
        if link is not None:
            quit_keeper(link, d)
        link = self._keepers.start(directory, env.name, d)
        try:
            WiredPlace(lambda _: link, self._facts).revert(_outside(env), d)
        finally:
            quit_keeper(link, d)
        shutil.rmtree(directory)
        log(f"{env.name}: closed what was left open when it was copied from")


def _copying(env: Environment) -> tuple[int, CanCopy]:
    """The innermost layer that has a root file system, and which one of the stack it is."""
    for n, frame in reversed(list(enumerate(env.handle.frames))):
        layer = registry.LAYERS[frame.layer]
        if isinstance(layer, CanCopy):
            return n, layer
    raise Unsupported(
        f"{env.name} has no files of its own: its layer is {'/'.join(env.handle.layers)}",
        hint="the layers host, container, microvm, microvm/container and vm have",
    )


def _keeping(env: Environment) -> CanKeep:
    n, layer = _copying(env)
    if isinstance(layer, CanKeep):
        return layer
    name = env.handle.frames[n].layer
    raise Unsupported(
        f"what {env.name} has written is not kept apart from what it began with: its layer is {name}",
        hint="files can be copied out of it while it runs: isolat cp",
    )


def _home(frame: Frame, place: Place) -> Place:
    """Where what is written is kept: in the place that the layer is in; a machine's in the machine."""
    layer: Layer = registry.LAYERS[frame.layer]
    if not layer.capabilities.machine:
        return place
    assert isinstance(layer, CanEnter)
    return layer.inside(replace(frame, main=None), place)


def _is_machine(env: Environment) -> bool:
    return registry.LAYERS[env.handle.frames[0].layer].capabilities.machine


def _outside(env: Environment) -> tuple[Step, ...]:
    """What opening it may have left on this machine."""
    frame = env.handle.frames[0]
    layer = registry.LAYERS[frame.layer]
    if _is_machine(env) or not isinstance(layer, CanKeep):
        return tuple(step for step in frame.steps if isinstance(step, Cgroup))
    return layer.root(frame, write=True).steps
