"""The few kinds of steps that a plan is made of.

A step is data: it can be printed, compared and stored in a handle. It is carried out, or reverted, by whoever holds
the place (docs/protocol.md, "Steps"), idempotently both ways. ``keep`` marks what outlives the end of the
application and goes only with the environment (its writable layer, its bundle).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from isolat.errors import ProtocolError
from isolat.wire import kinds as k
from isolat.wire.codec import Fields

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOATIME = 0x400
MS_BIND = 0x1000
MS_REC = 0x4000
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4


@dataclass(frozen=True)
class Step:
    """One effect and its inverse."""

    op: ClassVar[int]
    kind: ClassVar[str]

    def describe(self) -> str:
        """One line for people: what it does to what."""
        raise NotImplementedError

    def fields(self) -> Fields:
        """The wire form, without OP."""
        raise NotImplementedError

    def to_wire(self) -> Fields:
        return [(k.T_OP, self.op), *self.fields()]

    def to_json(self) -> dict[str, Any]:
        return {"step": self.kind, **asdict(self)}


@dataclass(frozen=True)
class MakeDir(Step):
    """A directory of our own (its last component is named from the id): reverting removes the tree."""

    op = 1
    kind = "dir"
    path: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    keep: bool = False

    def describe(self) -> str:
        return f"make directory {self.path} (mode {self.mode:04o}, owner {self.uid}:{self.gid})"

    def fields(self) -> Fields:
        return [(k.T_PATH, self.path), (k.T_MODE, self.mode), (k.T_UID, self.uid), (k.T_GID, self.gid)]


@dataclass(frozen=True)
class Leftover(Step):
    """What a program of the plan will leave: nothing to carry out, reverting removes the tree.

    On the wire a directory with a negative mode.
    """

    op = 1
    kind = "leftover"
    path: str
    keep: bool = False

    def describe(self) -> str:
        return f"remove {self.path} when undone"

    def fields(self) -> Fields:
        return [(k.T_PATH, self.path), (k.T_MODE, -1)]


@dataclass(frozen=True)
class PutFile(Step):
    """A file, there as a whole or not at all. ``in_place``: what is there, with its owner and mode, and this text."""

    op = 2
    kind = "file"
    path: str
    text: str
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    keep: bool = False
    in_place: bool = False

    def describe(self) -> str:
        return f"write file {self.path} ({len(self.text)} bytes, mode {self.mode:04o})"

    def fields(self) -> Fields:
        fields: Fields = [(k.T_PATH, self.path), (k.T_DATA, self.text)]
        if self.in_place:
            return [*fields, (k.T_COUNT, 1)]
        return [*fields, (k.T_MODE, self.mode), (k.T_UID, self.uid), (k.T_GID, self.gid)]


@dataclass(frozen=True)
class Mount(Step):
    """mount(2) in the environment's own mount namespace."""

    op = 3
    kind = "mount"
    source: str
    target: str
    fstype: str
    options: str = ""
    flags: int = 0
    keep: bool = False

    def describe(self) -> str:
        more = f" with {self.options}" if self.options else ""
        return f"mount {self.fstype or 'bind'} {self.source} at {self.target}{more} (flags {self.flags:#x})"

    def fields(self) -> Fields:
        return [
            (k.T_SOURCE, self.source),
            (k.T_TARGET, self.target),
            (k.T_FSTYPE, self.fstype),
            (k.T_OPTIONS, self.options),
            (k.T_COUNT, self.flags),
        ]


@dataclass(frozen=True)
class Idmap(Step):
    """A clone of the mount at ``source`` whose owners are shifted, at ``target`` (mount_setattr(2), Linux 5.12).

    ``lines``: (id on the file system, id it becomes, how many). ``descriptor``: the index of the descriptor that
    the job brings for it, opened by the caller with the caller's rights; -1: ``source`` is opened by path.
    """

    op = 4
    kind = "idmap"
    source: str
    target: str
    lines: tuple[tuple[int, int, int], ...]
    attributes: int = 0
    descriptor: int = -1
    keep: bool = False

    def describe(self) -> str:
        maps = ", ".join(f"{a}→{b} ×{n}" for a, b, n in self.lines)
        return f"idmap {self.source} at {self.target} ({maps})"

    def fields(self) -> Fields:
        lines: Fields = [(k.T_LINE, [(k.T_UID, a), (k.T_UID, b), (k.T_COUNT, n)]) for a, b, n in self.lines]
        return [(k.T_SOURCE, self.source), (k.T_TARGET, self.target), *lines, (k.T_COUNT, self.attributes)]


@dataclass(frozen=True)
class Cgroup(Step):
    """One control group, as a directory in every hierarchy that is given, with the values written there."""

    op = 5
    kind = "cgroup"
    paths: tuple[str, ...]
    writes: tuple[tuple[str, str], ...] = ()
    keep: bool = False

    def describe(self) -> str:
        values = ", ".join(f"{path.rsplit('/', 1)[-1]}={value}" for path, value in self.writes)
        return f"make cgroup {' '.join(self.paths)} {values}".rstrip()

    def fields(self) -> Fields:
        writes: Fields = [(k.T_WRITE, [(k.T_PATH, path), (k.T_DATA, value)]) for path, value in self.writes]
        return [*((k.T_PATH, path) for path in self.paths), *writes]


@dataclass(frozen=True)
class Run(Step):
    """A program run to its end, and the program that undoes it."""

    op = 6
    kind = "run"
    argv: tuple[str, ...]
    inverse: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    keep: bool = False

    def describe(self) -> str:
        undo = f" (undone by: {' '.join(self.inverse)})" if self.inverse else ""
        return f"run {' '.join(self.argv) or 'nothing'}{undo}"

    def fields(self) -> Fields:
        return [
            *((k.T_ARGV, arg) for arg in self.argv),
            *((k.T_ENV, value) for value in self.env),
            *((k.T_INVERSE, arg) for arg in self.inverse),
        ]


@dataclass(frozen=True)
class Subvolume(Step):
    """A btrfs subvolume with a quota: the only file quota this kernel has (no XFS or ext4 project quotas)."""

    op = 7
    kind = "subvolume"
    path: str
    size_bytes: int
    keep: bool = True

    def describe(self) -> str:
        return f"make btrfs subvolume {self.path} (at most {self.size_bytes} bytes)"

    def fields(self) -> Fields:
        return [(k.T_PATH, self.path), (k.T_SIZE, self.size_bytes)]


KINDS: dict[str, type[Step]] = {c.kind: c for c in (MakeDir, Leftover, PutFile, Mount, Idmap, Cgroup, Run, Subvolume)}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def step_from_json(data: Mapping[str, Any]) -> Step:
    """The step that ``to_json`` wrote. Raises ProtocolError for an unknown kind or field."""
    values = {name: _frozen(value) for name, value in data.items() if name != "step"}
    cls = KINDS.get(str(data.get("step")))
    if cls is None:
        raise ProtocolError(f"a handle names the unknown step {data.get('step')!r}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ProtocolError(f"a handle's step {data.get('step')!r} is malformed: {error}") from error
