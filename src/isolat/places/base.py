"""What a place is: anywhere a process can be started.

This machine is one, the inside of an environment is another; a layer turns one into the other, and that is why layers
stack. Everything that differs between places is recorded as ``Facts`` and is an input of a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from isolat.deadline import Deadline
from isolat.places.steps import Step


class CgroupMode(StrEnum):
    V1 = "v1"
    HYBRID = "hybrid"
    V2 = "v2"
    NONE = "none"


@dataclass(frozen=True)
class CgroupFacts:
    """Where the control groups of a place are.

    ``mounts``: controller (``memory``, ``pids``, ``name=systemd``, or ``unified``) to mount point.
    ``base``: this process's place below the mount (``/`` outside of containers), under which ours are made.
    """

    mode: CgroupMode
    mounts: tuple[tuple[str, str], ...] = ()
    base: str = "/"

    def mount(self, controller: str) -> str | None:
        return dict(self.mounts).get(controller)


@dataclass(frozen=True)
class Facts:
    """What a place is and has, as data: recorded once, given to ``plan``."""

    kernel: str
    machine: str
    cgroups: CgroupFacts
    tools: tuple[tuple[str, str], ...] = ()  # name, absolute path
    features: tuple[str, ...] = ()  # userns, overlay, erofs, erofs-file, idmap, btrfs, kvm, …
    cpus: int = 1
    memory_bytes: int = 0
    root: bool = False

    def tool(self, name: str) -> str | None:
        return dict(self.tools).get(name)


@dataclass(frozen=True)
class Command:
    """A process to be started in a place. Paths are as the place sees them."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""
    user: str = ""  # name[:group] or uid[:gid]; empty: the place's own
    root: str = ""  # change the root to this directory first (host layer)
    cgroup_files: tuple[str, ...] = ()  # files that "0" is written to before the exec
    control: bool = False  # it speaks the wire protocol on descriptor 3 and is itself a place
    pidfile: str = ""  # a launcher: the real process's pid is read here once it has ended with 0
    serial: bool = False  # a control channel without descriptors, whose other side may come to life late
    held: tuple[str, ...] = ()  # names of held descriptors, which become the child's 4, 5, …
    spaces: int = 0  # namespaces that it starts in (CLONE_NEW* of clone(2))
    park_s: float = 0.0  # stop it after so long without a word, where nothing in it has a deadline; 0: never
    after: tuple[str, ...] = ()  # what a machine's agent runs when it has ended, before that is told
    grace_s: float = 0.0  # how long it may take to end by itself after the application's end
    confined: bool = False  # behind the keeper's own system call filter
    file_bytes: int = 0  # no file that it writes becomes larger; 0: no limit


@dataclass(frozen=True)
class Io:
    """What a process's standard streams are."""

    tty: bool = False
    stdin: bool = False
    log: bool = False
    main: bool = False  # its end is the environment's
    rows: int = 0
    cols: int = 0
    beside: bool = False  # the guest needs it: one ends with the other, and it has no streams
    home: str = ""  # of a main process beside another's: the directory of its log and record, on the keeper's machine


@dataclass(frozen=True)
class Exit:
    """How a process that really started ended. ``code`` is 128+n where ``signal`` n ended it."""

    code: int
    signal: int = 0
    started_ns: int = 0
    ended_ns: int = 0
    forced: bool = False
    oom: bool = False
    with_guest: bool = False  # what it ran in ended under it


@dataclass(frozen=True)
class Proc:
    key: str
    pid: int
    exit: Exit | None = None
    started_ns: int = 0


@dataclass(frozen=True)
class Identity:
    """What makes one machine differ from another that was cloned from the same template."""

    entropy: bytes
    time_ns: int = 0  # since the epoch; 0: its clock is left alone
    host: str = ""
    mac: str = ""
    devices: tuple[str, ...] = ()  # block devices behind which the disk has changed


class Starting(Protocol):
    """A process that was asked for."""

    def finish(self, d: Deadline) -> Proc:
        """Wait until it has started. Raises what ``Place.spawn`` raises."""


class Place(Protocol):
    """Anywhere a process can be started. One wire protocol, two transports."""

    @property
    def facts(self) -> Facts: ...

    def carry_out(self, steps: Sequence[Step], d: Deadline, descriptors: Sequence[int] = ()) -> None:
        """Carry the steps out in order. Raises StartFailed (stage ``step``) at the first that fails."""

    def revert(self, steps: Sequence[Step], d: Deadline) -> None:
        """Undo them backwards; what is absent is fine. All are tried, then the first failure is raised."""

    def spawn(self, key: str, cmd: Command, io: Io, d: Deadline) -> Proc:
        """Start a process; the same key twice is the same process.

        Raises NotExecutable, CommandNotFound, or StartFailed with its stage, errno and log tail.
        """

    def begin(self, key: str, cmd: Command, io: Io, d: Deadline) -> Starting:
        """Ask for a process without waiting for it: a machine needs a dialogue before it says its first word."""

    def hold(self, descriptors: Mapping[str, int], d: Deadline) -> None:
        """Let the keeper keep duplicates of these descriptors under these names."""

    def fetch(self, name: str, d: Deadline) -> int:
        """A duplicate of a descriptor that the keeper holds. Raises NotFound."""

    def drop(self, names: Sequence[str], d: Deadline) -> None:
        """Let the keeper close these; what it does not hold is fine."""

    def resume(self, identity: Identity, d: Deadline) -> None:
        """Make the machine that this place is the inside of one of its own."""

    def settle(self, d: Deadline, *, keep_cache: bool = False) -> None:
        """Let the machine that this place is the inside of give back what it needs no more, before it is saved.

        ``keep_cache``: but for what it has read of its disks, where these will be the same.
        """

    def hush(self, d: Deadline) -> None:
        """Let the machine that this place is the inside of say nothing, and nobody say anything to it, while it is
        copied: until ``speak``, or until this connection ends. Its processes go on."""

    def speak(self, d: Deadline) -> None:
        """The end of ``hush``."""

    def adopt(self, key: str, client: int, stdin: bool, d: Deadline) -> None:
        """Attach the connected socket ``client`` (closed here) to the process, started or not yet."""

    def procs(self, prefix: str, d: Deadline) -> list[Proc]: ...

    def wait(self, key: str, d: Deadline) -> Exit:
        """Raises Lost when the way to it breaks, DeadlineExceeded when it does not end in time."""

    def signal(self, key: str, n: int, d: Deadline, *, everything: bool = False) -> None: ...

    def resize(self, key: str, rows: int, cols: int, d: Deadline) -> None: ...

    def forget(self, key: str, d: Deadline) -> None: ...

    def put(self, path: str, source: int, d: Deadline, mode: int = 0o644) -> None: ...

    def get(self, path: str, target: int, most_bytes: int, d: Deadline) -> None:
        """The file's first ``most_bytes``, written to ``target``. Raises ProtocolError for more than was asked for."""

    def inside(self, key: str, facts: Facts) -> Place:
        """The place that the process ``key`` (spawned with ``control``) is."""


@dataclass(frozen=True)
class Needs:
    """What a plan needs of the place around it."""

    memory_bytes: int = 0
    cpus: float = 0.0
    disk_bytes: int = 0
    images: tuple[str, ...] = field(default=())
