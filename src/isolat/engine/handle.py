"""The handle: what must be known to find an environment again after any crash.

Versioned JSON in the environment's directory, on disk before the first effect and replaced atomically; deleted last.
No fsync: a kill of any process loses nothing, and after a power loss what ran is gone anyway.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from isolat.errors import ProtocolError, StoreError
from isolat.layers.base import GUEST, Frame, State
from isolat.places.base import Command, Exit
from isolat.places.steps import step_from_json

VERSION = 1
HANDLE = "handle.json"
EXIT_RECORD = "exit.json"
GUEST_TAIL = "guest.tail"
_TAIL_LINES = 10
_PANIC = "Kernel panic"
_NO_WORDS = "is not connected to host network"  # QEMU says so of every network card that is plugged in late


@dataclass(frozen=True)
class Around:
    """The environment that this one was put into, as it was then."""

    id: str
    name: str
    layers: tuple[str, ...]
    to: str  # the path of keys, at its keeper, to the place that this one is in


@dataclass(frozen=True)
class Handle:
    id: str
    name: str
    image: str
    digest: str
    spec: dict[str, Any]  # the Compose service, as it came
    frames: tuple[Frame, ...]
    state: State
    created_ns: int
    boot_id: str
    uid_index: int
    upper: str = ""
    started_ns: int = 0
    exit: Exit | None = None
    reason: str = ""
    remove: bool = False
    caller_uid: int = 0
    labels: tuple[tuple[str, str], ...] = field(default=())
    around: Around | None = None

    @property
    def main_name(self) -> str:
        """The full name of the application's process at the keeper."""
        return "/".join((*self._to, *(frame.guest_key for frame in self.frames[:-1]), self.frames[-1].main_key))

    @property
    def guest_name(self) -> str:
        """The full name of the process that its inside is; empty where that is no process's."""
        if not all(frame.has_guest for frame in self.frames):
            return ""
        return "/".join((*self._to, *(frame.guest_key for frame in self.frames)))

    @property
    def first_name(self) -> str:
        """The full name of the process that its outermost layer has started; all others are below it."""
        frame = self.frames[0]
        return "/".join((*self._to, frame.guest_key if frame.has_guest else frame.main_key))

    @property
    def layers(self) -> tuple[str, ...]:
        """Everything between its application and the hardware, from the hardware up."""
        return (*(self.around.layers if self.around else ()), *(frame.layer for frame in self.frames))

    @property
    def _to(self) -> tuple[str, ...]:
        return (self.around.to,) if self.around else ()

    def with_(self, **changes: Any) -> Handle:
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        data = asdict(replace(self, frames=tuple(replace(frame, inside=(), beside=()) for frame in self.frames)))
        for frame, out in zip(self.frames, data["frames"], strict=True):
            out["steps"] = [step.to_json() for step in frame.steps]
        return {"version": VERSION, **data}


def handle_from_json(data: dict[str, Any]) -> Handle:
    if data.get("version") != VERSION:
        raise StoreError(
            f"a handle has version {data.get('version')!r}, this Isolat reads {VERSION}",
            hint="use the version of Isolat that made it, or remove its directory",
        )
    values = {f.name: data[f.name] for f in fields(Handle) if f.name in data}
    values["frames"] = tuple(_frame(frame) for frame in data["frames"])
    values["state"] = State(data["state"])
    values["exit"] = Exit(**data["exit"]) if data.get("exit") else None
    values["labels"] = tuple((a, b) for a, b in data.get("labels", ()))
    values["around"] = _around(data.get("around"))
    return Handle(**values)


def _around(data: dict[str, Any] | None) -> Around | None:
    return Around(**{**data, "layers": tuple(data["layers"])}) if data else None


def _frame(data: dict[str, Any]) -> Frame:
    return Frame(
        layer=data["layer"],
        steps=tuple(step_from_json(step) for step in data["steps"]),
        has_guest=data["has_guest"],
        main_key=data["main_key"],
        main=_command(data.get("main")),
        guest=_command(data.get("guest")),
        options=tuple((a, b) for a, b in data.get("options", ())),
        guest_key=data.get("guest_key", GUEST),
        stop_signal=int(data.get("stop_signal", signal.SIGTERM)),
    )


def _command(data: dict[str, Any] | None) -> Command | None:
    if data is None:
        return None
    values = dict(data)
    values["argv"] = tuple(values["argv"])
    values["env"] = tuple((a, b) for a, b in values["env"])
    values["cgroup_files"] = tuple(values["cgroup_files"])
    values["held"] = tuple(values.get("held", ()))
    values["after"] = tuple(values.get("after", ()))
    return Command(**values)


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Write beside, then rename: readers see the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.new")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    beside.replace(path)


def write_handle(directory: Path, handle: Handle) -> None:
    write_atomically(directory / HANDLE, json.dumps(handle.to_json(), separators=(",", ":")))


def read_handle(directory: Path) -> Handle | None:
    """The handle in this directory; None when there is none. Raises StoreError when it cannot be read."""
    try:
        text = (directory / HANDLE).read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None
    try:
        return handle_from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, ProtocolError) as error:
        raise StoreError(f"the handle {directory / HANDLE} is damaged: {error}") from error


def read_exit(directory: Path) -> Exit | None:
    """What the keeper recorded of the application's end, or None."""
    try:
        data = json.loads((directory / EXIT_RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    number = int(data.get("signal") or 0)
    code = 128 + number if number else int(data.get("code") or 0)
    return Exit(
        code=code,
        signal=number,
        started_ns=int(data["started_ns"]),
        ended_ns=int(data["ended_ns"]),
        oom=bool(data.get("oom")),
        with_guest=bool(data.get("with_guest")),
    )


def guest_words(directory: Path) -> str:
    """The last lines that its guest wrote (a machine's console), in one line; empty where it wrote none.

    Of a kernel's panic it is the first lines that tell, and what follows are registers.
    """
    try:
        text = (directory / GUEST_TAIL).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = ["".join(c for c in line if c.isprintable()).strip() for line in text.splitlines()]
    told = [line for line in lines if line and _NO_WORDS not in line]
    panic = next((n for n, line in enumerate(told) if _PANIC in line), len(told))
    return " | ".join(told[panic:][:_TAIL_LINES] or told[-_TAIL_LINES:])
