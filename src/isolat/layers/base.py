"""The contract of a layer: one kind of decoupling between an application and the hardware.

A layer remembers nothing and describes; the engine makes and unmakes. Adding one is a module, a line in ``registry``
and the conformance suite (docs/checklists/add-a-layer.md).
"""

from __future__ import annotations

import contextlib
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Protocol, runtime_checkable

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, IsolatError, Lost
from isolat.places.base import Command, Exit, Facts, Io, Needs, Place, Proc, Starting
from isolat.places.steps import Step
from isolat.spec.model import Spec

ASK_S = 1.0  # so long somebody who is asked to end may take to take note
ANSWER_S = 2.0  # and somebody who is killed
GUEST = "guest"
MAIN = "main"
TOOLS = "tools"


class Boundary(StrEnum):
    """What stands between the application and the host's kernel."""

    NONE = "none"  # host, fake
    NAMESPACES = "namespaces"  # container
    KERNEL = "kernel"  # a kernel of its own


@dataclass(frozen=True)
class Capabilities:
    """What a layer can ever do, as data. The conformance suite derives its expectations from this."""

    boundary: Boundary
    enter: bool = False  # exec, tty, copy, stacking: CanEnter
    pause: bool = False
    snapshot: bool = False
    resize: bool = False
    limits: frozenset[str] = frozenset()  # memory, cpus, pids, disk
    networks: frozenset[str] = frozenset({"host"})
    volumes: bool = False
    volumes_live: bool = True  # what changes on one side is seen on the other at once; else only at its end
    tmpfs: bool = False
    read_only: bool = False
    users: bool = False  # -u
    hostname: bool = False
    own_uids: bool = False  # a uid range of its own
    images: bool = True  # it needs an image as its root
    machine: bool = False  # it needs what machines are made of (MachineKit)
    boots: bool = False  # it boots the image itself, which must hold an init
    screen: bool = False  # CanShow
    copies: bool = False  # layers/files.py, CanCopy
    apart: bool = False  # what it writes is kept apart from its image, and when it has ended: layers/files.py, CanKeep
    hosts: bool = False  # CanHost


@dataclass(frozen=True)
class Probe:
    """What a place allows a layer now, found by trying."""

    ready: bool
    reason: str = ""
    remedy: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    data: tuple[tuple[str, str], ...] = ()  # what the plan needs to know: paths, features


@dataclass(frozen=True)
class ImageRef:
    """An image resolved to what is on disk."""

    digest: str
    mount: str  # where its EROFS file is mounted on this machine
    env: tuple[tuple[str, str], ...] = ()
    command: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    binds: tuple[tuple[str, str], ...] = ()  # (directory of this machine, where it appears), read-only
    file: str = ""  # its EROFS file, which a machine gets as a disk
    entrypoint: tuple[str, ...] = ()
    stop_signal: str = ""


@dataclass(frozen=True)
class MachineKit:
    """What machines are made of here: QEMU and what it can do, the guest's kernel and the files around it."""

    qemu: str  # path, as seen in the jail
    qemu_version: str
    sandbox: bool  # it can confine itself to the system calls that it needs
    qemu_identity: str  # which build it is: a template serves no other
    accel: str  # tcg, kvm
    accel_reason: str
    tsc_khz: int
    release: str  # of the guest's kernel
    kernel: str  # paths, as seen in the jail
    initramfs: str
    tools: str  # path on this machine
    guest_key: str  # stands for the contents of kernel, initramfs and tools
    jail: str  # the read-only root that QEMU runs in
    templates: bool = True
    pc: str = ""  # the QEMU that makes whole PCs, as seen in the jail; empty: none here
    virtiofsd: str = ""  # what shares directories with a machine; path on this machine
    live_lacks: str = ""  # why that is not possible here; empty: it is
    live_remedy: str = ""


@dataclass(frozen=True)
class Job:
    """A resolved spec: digests instead of names, with its id, directory, uid range and cgroup."""

    id: str
    spec: Spec
    dir: str  # the environment's own directory, as the place sees it
    facts: Facts
    image: ImageRef | None = None
    machine: MachineKit | None = None
    uid_base: int = 0
    uid_count: int = 65536
    upper: str = ""  # where the writable layer's subvolume is to be made; empty: memory
    volumes: str = ""  # where named volumes are, a directory each
    upper_bounded: bool = False  # upper is on a disk that is bounded itself: a plain directory will do
    cgroup: str = ""  # path below each hierarchy's mount
    libexec: str = ""  # where isolat-init is
    runtime_root: str = ""  # the OCI runtime's state directory
    caller_uid: int = 0
    caller_gid: int = 0
    command: tuple[str, ...] = ()  # empty for the outer layer of a stack
    after: tuple[str, ...] = ()  # Command.after of the application
    opened: bool = True  # the sources of its volumes came with the request, as descriptors
    env: tuple[tuple[str, str], ...] = ()


class Source(StrEnum):
    """Where a descriptor comes from."""

    MEMORY = "memory"  # new memory of this size, which can be sealed (memfd_create(2))
    LISTENING = "listening"  # a socket that listens, with one connection to it, whose other end is held as NAME-peer
    PAIR = "pair"  # one end of a new socket pair; its other end is held as NAME-peer
    FILE = "file"  # the file at this path
    DISK = "disk"  # a new, empty, sparse file system of this size, at this path
    BOOTABLE = "bootable"  # a new, sparse, bootable disk of this size at this path, made from an image
    VOLUMES = "volumes"  # a new archive of the volumes at this path, which may become as large as this
    GIVEN = "given"  # one that came with the request, opened by the caller
    TEMPLATE_MEMORY = "template-memory"  # what a template keeps
    TEMPLATE_STATE = "template-state"
    TEMPLATE_COPY = "template-copy"  # new memory with the contents of a template's
    TEMPLATE_DISK = "template-disk"  # a copy, at this path, of the disk that it had when it was saved


@dataclass(frozen=True)
class Shares:
    """Volumes that are copied: with whose rights, and which of them are only read; named ones with root's."""

    uid: int
    gid: int
    read_only: tuple[bool, ...]
    named: tuple[bool, ...]


@dataclass(frozen=True)
class Descriptor:
    """An open file that a guest needs: the engine opens it, the keeper holds it under this name."""

    name: str
    source: Source
    path: str = ""
    size_bytes: int = 0
    writable: bool = False
    image: str = ""  # the digest of what a bootable disk is made from
    tree: str = ""  # where that is mounted
    shares: Shares | None = None  # what an archive of volumes is made of
    given: int = -1  # which of the descriptors that came with the request

    def describe(self) -> str:
        what = {Source.FILE: f"open {self.path}", Source.DISK: f"make an empty disk {self.path}"}
        what |= {Source.BOOTABLE: f"make a bootable disk {self.path} from {self.tree}"}
        what |= {Source.VOLUMES: f"copy the volumes to {self.path}", Source.GIVEN: f"the source of volume {self.given}"}
        size = f" ({self.size_bytes >> 20} MiB)" if self.size_bytes else ""
        return f"hold {self.name}: {what.get(self.source, self.source.value)}{size}"


@dataclass(frozen=True)
class TemplatePlan:
    """A template, and how it is made where there is none: one for each kernel, memory size and number of CPUs.

    With ``base``, one of an image: it goes on from what that one has saved, with the image mounted.
    """

    key: str
    guest: Command
    descriptors: tuple[Descriptor, ...]
    memory_bytes: int
    cpus: int
    accel: str
    release: str
    disk_bytes: int = 0
    inside: tuple[Step, ...] = ()  # carried out in it before it is saved: what every clone would do first
    disks: tuple[tuple[str, str, bool], ...] = ()  # device, name of what is held for it, read-only
    exercise: Command | None = None  # started in it then, and waited for: much is done at a first time only
    base: TemplatePlan | None = None
    image: ImageRef | None = None


@dataclass(frozen=True)
class Plan:
    """Every effect that a layer will have in a place, before anything happens."""

    steps: tuple[Step, ...]
    guest: Command | None = None  # the process that makes the inside: init, QEMU
    main: Command | None = None  # the application; None in the outer layer of a stack
    main_in_guest: bool = True
    needs: Needs = Needs()
    descriptors: tuple[Descriptor, ...] = ()  # held before the guest starts
    beside: tuple[tuple[str, Command], ...] = ()  # key and command of what the guest needs beside it, started before it
    inside: tuple[Step, ...] = ()  # carried out in the guest before the application starts; they go with it
    template: TemplatePlan | None = None  # what the guest is cloned from
    options: tuple[tuple[str, Any], ...] = ()  # what ``start`` has to know beyond the commands


@dataclass(frozen=True)
class Frame:
    """One layer of an environment's stack, as its handle keeps it: enough to undo it after any crash."""

    layer: str
    steps: tuple[Step, ...]
    has_guest: bool
    main_key: str  # below the place of this frame, e.g. guest/main; empty in an outer frame
    main: Command | None = None
    guest: Command | None = None
    options: tuple[tuple[str, Any], ...] = ()
    beside: tuple[tuple[str, Command], ...] = ()  # this and the next only until it has started: not written down
    inside: tuple[Step, ...] = ()
    guest_key: str = GUEST  # another one where several are in one place
    stop_signal: int = int(signal.SIGTERM)  # what its application is asked to end with

    def option(self, name: str) -> Any:
        return dict(self.options).get(name)


class State(StrEnum):
    CREATING = "creating"
    RUNNING = "running"
    EXITED = "exited"
    LOST = "lost"
    REMOVING = "removing"

    @property
    def alive(self) -> bool:
        return self in (State.CREATING, State.RUNNING)


@dataclass(frozen=True)
class Status:
    state: State
    exit: Exit | None = None
    reason: str = ""


class Layer(ABC):
    """One kind of virtualization. Synchronous with a Deadline; remembers nothing between calls."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    @abstractmethod
    def probe(self, place: Place, d: Deadline) -> Probe:
        """Whether the place allows this layer now, found by trying. Never raises."""

    @abstractmethod
    def plan(self, job: Job, probe: Probe) -> Plan:
        """Every effect, as data. Pure: no file, no process. Raises Unsupported for what it cannot do."""

    def start(self, frame: Frame, place: Place, io: Io, d: Deadline) -> Proc | None:
        """Start the guest, if the plan has one, and the application in it."""
        if frame.guest is not None:
            place.spawn(frame.guest_key, frame.guest, Io(), d)
        if frame.main is None:
            return None
        return place.spawn(frame.main_key, frame.main, replace(io, main=True), d)

    def stop(self, frame: Frame, place: Place, grace_s: float, d: Deadline) -> Exit:
        """Ask (``frame.stop_signal``), wait ``grace_s``, kill, reap. ``Exit.forced`` says that it had to be killed."""
        with contextlib.suppress(DeadlineExceeded):
            return ask_to_end(frame, place, d.sooner(grace_s))
        key = frame.guest_key if frame.has_guest else frame.main_key
        place.signal(key, signal.SIGKILL, d.sooner(ANSWER_S), everything=not frame.has_guest)
        return replace(place.wait(frame.main_key, d), forced=True)

    def inspect(self, frame: Frame, place: Place, d: Deadline) -> Status:
        """Ask the world. LOST is an answer."""
        try:
            found = [proc for proc in place.procs(frame.main_key, d) if proc.key == frame.main_key]
        except Lost as error:
            return Status(State.LOST, reason=error.message)
        if not found:
            return Status(State.CREATING)
        if found[0].exit is not None:
            return Status(State.EXITED, exit=found[0].exit)
        return Status(State.RUNNING)


def ask_to_end(frame: Frame, place: Place, d: Deadline) -> Exit:
    """Send the application its signal, and wait for its end. Raises DeadlineExceeded.

    Whoever does not even take the signal (a machine that hangs) gets no more than a moment for that: what is left of
    the time is for what comes next.
    """
    with contextlib.suppress(IsolatError):
        place.signal(frame.main_key, frame.stop_signal, d.sooner(ASK_S))
    return place.wait(frame.main_key, d)


@runtime_checkable
class CanEnter(Protocol):
    """Exec, tty, copy and stacking, in one: the environment's inside is a place."""

    def inside(self, frame: Frame, place: Place) -> Place: ...


Room = Callable[[int, int, int], None]
"""Raises Refused where there is none: for so many bytes of memory next, and altogether, and for its disk's copy."""


@dataclass(frozen=True)
class Copy:
    """Where a copy of a running machine goes: empty files of the engine's, open for reading and writing."""

    state: int  # processors and devices
    delta: int  # of its memory, to ``ram``
    disk: int

    ram: int = -1  # only to be read: the memory that the machine began with
    room: Room | None = None  # asked before anything is copied


@dataclass(frozen=True)
class Copied:
    """What it cost."""

    stopped_ms: float  # how long it stood still
    own_bytes: int  # of memory, that each machine made from the copy begins with


@runtime_checkable
class CanSnapshot(Protocol):
    """Copies of a running machine that go on where it was, with all its processes."""

    def check_snapshot(self, frame: Frame) -> None:
        """Raises Unsupported, with the reason, where this machine can't be copied."""

    def going_on(self, copied: Frame, now: Frame) -> Frame:
        """``now`` for a machine that goes on from a copy of ``copied``. Raises Unsupported, with the reason, where it
        can't."""

    def snapshot(self, frame: Frame, place: Place, to: Copy, d: Deadline) -> Copied:
        """Copy the machine, which goes on, whatever happens."""

    def go_on(self, frame: Frame, place: Place, d: Deadline) -> None:
        """Let a machine go on whose copying was broken off by the end of who copied it."""

    def begin(self, frame: Frame, place: Place, d: Deadline) -> Starting:
        """Start what waits to become a copy, before or while that is made. Everything that it needs is held."""

    def restore(self, frame: Frame, place: Place, starting: Starting, copy: Copy, io: Io, d: Deadline) -> Proc | None:
        """Let what was begun go on as the copy. ``Copy.delta`` may be -1: there is no difference."""


@runtime_checkable
class CanWarm(Protocol):
    """Machines that are made ready before anybody asks for them."""

    def warm_key(self, job: Job) -> str:
        """What a machine made in advance must have in common with this job; empty: none can serve it."""

    def warm_job(self, job: Job) -> Job:
        """The job of a machine made in advance: the same without anybody's command and names."""

    def warm_up(self, frame: Frame, place: Place, d: Deadline) -> None:
        """Start the machine and let it do once what it will do, then stop it."""

    def take(self, frame: Frame, warm: Frame, place: Place, io: Io, d: Deadline) -> Proc | None:
        """``start`` for a machine that was made in advance, as ``warm``."""


@dataclass(frozen=True)
class Wanted:
    """What an environment needs of this machine's files to be put into another one. Empty: nothing."""

    tools: str = ""  # an OCI runtime and the init, as an EROFS file
    digest: str = ""  # of an image other than that one's own
    image: str = ""  # its EROFS file


@runtime_checkable
class CanHost(Protocol):
    """What has a kernel of its own and lets other environments in while it runs: it has to bring files in for them."""

    def check_hosting(self, frame: Frame) -> None:
        """Raises Unsupported, with the reason, where nothing can be put into this one."""

    def image_inside(self, digest: str, own: str) -> str:
        """Where the image of this digest is mounted inside once it has been brought in. ``own``: its own image's."""

    def bring_in(self, frame: Frame, place: Place, wanted: Wanted, in_use: Collection[str], d: Deadline) -> str:
        """Have this inside, already there or not. ``in_use``: digests of images that others inside stand on.

        Answers the beginning of the digest of what had to make room, where something had to. Raises Unsupported where
        there is no room for one more.
        """

    def leave_bare(self, frame: Frame, place: Place, d: Deadline) -> None:
        """Undo all of it; nobody inside stands on it."""


@runtime_checkable
class CanShow(Protocol):
    """What has a screen."""

    def screenshot(self, frame: Frame, place: Place, fd: int, d: Deadline) -> None:
        """Write what the screen shows to ``fd``, from its beginning, as PNG."""


class Rewriter(Protocol):
    """jvm, wasm, --arch: a pure change of the job, inside another layer."""

    def rewrite(self, job: Job, probe: Probe) -> Job: ...
