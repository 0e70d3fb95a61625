"""How the files of an environment are reached, layer by layer: while it runs, when it has ended, what it has changed.

Nobody outside resolves a path of the inside: a program of ours does, with the rights that root has there, where the
environment's own processes are, or below its root when that has been mounted anew (native/copy.c, native/layer.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from isolat.errors import Unsupported
from isolat.layers.base import Frame
from isolat.linux import cgroup
from isolat.places.base import Facts, Place
from isolat.places.steps import MS_NODEV, MS_NOSUID, MS_RDONLY, Cgroup, Idmap, MakeDir, Mount, Step

NAMES = ("etc/hostname", "etc/hosts", "etc/resolv.conf")  # what the layers themselves put into an environment
SYSTEM = ("proc", "sys", "dev")  # where something is mounted in every one
AGENT_INSIDE = "/proc/1/exe"  # of a machine of ours, where its file has no name any more


@dataclass(frozen=True)
class Copier:
    """A program that copies, and the words that lead it to the environment's root."""

    place: Place
    program: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Root:
    """What makes the root file system of one that has ended visible again, and who root is there."""

    steps: tuple[Step, ...]
    path: str
    disk: str  # a directory of the file system that keeps what is written
    options: tuple[str, ...] = ()  # of the copier


@dataclass(frozen=True)
class Writable:
    """The writable part: an overlay's two directories.

    ``shift``: the id that 0 is inside. ``own``: what the layer has put there. ``freezer``: the file by which those who
    write there are made to stand still; empty where there is none.
    """

    upper: str
    lower: str
    shift: int = 0
    own: tuple[str, ...] = NAMES
    freezer: str = ""


@runtime_checkable
class CanCopy(Protocol):
    """A layer with a root file system of its own."""

    def copier(self, frame: Frame, place: Place, agent: str) -> Copier:
        """For one that runs in ``place``, where the path of isolat-agent is ``agent``."""


@runtime_checkable
class CanKeep(Protocol):
    """A layer that keeps what is written apart from the image, and until it is removed.

    Both are in the place that the layer is in; a machine's in the machine.
    """

    def root(self, frame: Frame, *, write: bool) -> Root:
        """The root file system of one that has ended. Raises Unsupported where nothing is left of it."""

    def writable(self, frame: Frame, facts: Facts) -> Writable:
        """``facts``: of the place that it is in."""


@dataclass(frozen=True)
class Overlay:
    """An overlay as a plan mounts it."""

    at: str
    lower: str
    upper: str
    source: str  # of the lower directory: the image, with the owners that it has
    first_id: int = 0
    count: int = 0  # of ids; 0: it has none of its own
    below: tuple[Step, ...] = ()  # by which the lower directory is made

    def again(self, *, write: bool) -> Root:
        """Mounted once more: a volatile one that has been mounted before refuses its old work directory."""
        at, disk, flags = MakeDir(self.at), self.upper.rsplit("/", 1)[0], MS_NODEV | MS_NOSUID
        ids = ("--ids", f"{self.first_id}:{self.count}") if self.count else ()
        if not write:
            options = f"lowerdir={self.upper}:{self.lower}"
            mount = Mount("overlay", self.at, "overlay", options, flags | MS_RDONLY)
            return Root((*self.below, at, mount), self.at, disk, ids)
        work = MakeDir(f"{disk}/c", 0o700)
        options = f"lowerdir={self.lower},upperdir={self.upper},workdir={work.path},volatile"
        steps = (*self.below, work, at, Mount("overlay", self.at, "overlay", options, flags))
        return Root(steps, self.at, disk, ids)


def overlay_of(frame: Frame) -> Overlay:
    """The overlay among a frame's steps, with what its lower directory is. Raises Unsupported where there is none."""
    found = next((step for step in frame.steps if isinstance(step, Mount) and step.fstype == "overlay"), None)
    if found is None:
        raise Unsupported(f"the layer {frame.layer} has no root file system of its own")
    words = dict(word.partition("=")[::2] for word in found.options.split(","))
    lower, upper = words["lowerdir"], words["upperdir"]
    for step in frame.steps:
        if isinstance(step, Idmap) and step.target == lower:
            ((_, first, count),) = step.lines
            return Overlay(found.target, lower, upper, step.source, first, count, (MakeDir(lower, 0o700), step))
    return Overlay(found.target, lower, upper, lower)


def check_kept(frame: Frame) -> None:
    """Raises Unsupported where what was written has gone with the end."""
    above = overlay_of(frame).upper.rsplit("/", 1)[0]
    if any(isinstance(step, Mount) and step.fstype == "tmpfs" and step.target == above for step in frame.steps):
        raise Unsupported(
            "its writable part is memory: this machine has no btrfs for it, and what was in it goes with its end",
            hint="`isolat doctor` says what is missing; copy while it runs",
        )


def freezer_of(frame: Frame, facts: Facts) -> str:
    """Of the control group that a frame's steps make."""
    paths = [path for step in frame.steps if isinstance(step, Cgroup) for path in step.paths]
    return cgroup.freezer(facts.cgroups, paths)


def of_overlay(frame: Frame, facts: Facts, own: tuple[str, ...]) -> Writable:
    """``HasFiles.writable`` for a layer whose plan mounts the overlay."""
    found = overlay_of(frame)
    return Writable(found.upper, found.source, found.first_id, own, freezer_of(frame, facts))
