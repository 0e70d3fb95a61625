"""Snapshots: copies of running machines on disk, which new environments go on from.

::

    STATE_ROOT/snapshots/NAME/snapshot.json   what it is of: the handle of its environment at that moment
    STATE_ROOT/snapshots/NAME/state           processors and devices
    STATE_ROOT/snapshots/NAME/memory          all of its memory, sparse
    STATE_ROOT/snapshots/NAME/disk.img        its writable disk, sparse

The memory is kept whole and not as a difference: a template that is made anew with the same key has other pages. So a
snapshot needs no template, and outlives it, the daemon and the host's next boot. It is made beside and renamed: it is
there whole or not at all. What is in it is what was in the machine's memory, secrets too, so it is root's alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolat.deadline import Deadline
from isolat.engine import admission
from isolat.engine.handle import Handle, handle_from_json
from isolat.engine.journal import log
from isolat.engine.names import new_id
from isolat.engine.paths import StateRoot
from isolat.errors import Conflict, IsolatError, NotFound, StoreError, UsageError
from isolat.layers.base import Copy
from isolat.qemu import forks, memory

VERSION = 1
RECORD, STATE, MEMORY, DISK = "snapshot.json", "state", "memory", "disk.img"
_NAME = re.compile("[a-zA-Z0-9][a-zA-Z0-9_.-]{1,127}")
_UNFINISHED = ".new-"
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Snapshot:
    name: str
    id: str  # of this one: another one of the same name has another
    created_ns: int
    handle: Handle  # of the environment that it is of
    directory: Path

    @property
    def used_bytes(self) -> int:
        """What it takes of the disk."""
        with contextlib.suppress(OSError):
            return sum(path.stat().st_blocks * 512 for path in self.directory.iterdir())
        return 0

    def open(self, name: str) -> int:
        """One of its files, to be read. Raises StoreError."""
        try:
            return os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StoreError(f"the snapshot {self.name} is damaged: {name}: {error.strerror}") from error


class Snapshots:
    """All snapshots of one state root. Safe for several threads at once."""

    def __init__(self, paths: StateRoot) -> None:
        self._dir = paths.root / "snapshots"
        self._lock = threading.Lock()

    def start(self) -> None:
        """Remove what a daemon that was killed had begun."""
        with contextlib.suppress(FileNotFoundError):
            for path in self._dir.iterdir():
                if path.name.startswith(_UNFINISHED):
                    shutil.rmtree(path, ignore_errors=True)

    def all(self) -> list[Snapshot]:
        """Every snapshot that can be read, the oldest first."""
        return sorted(self._all(), key=lambda found: found.created_ns)

    def _all(self) -> Iterator[Snapshot]:
        with contextlib.suppress(FileNotFoundError):
            for path in list(self._dir.iterdir()):
                if not path.name.startswith(_UNFINISHED):
                    try:
                        yield self._read(path)
                    except StoreError as error:
                        log(error.message)

    def find(self, name: str) -> Snapshot:
        """Raises NotFound, and StoreError for what can't be read."""
        if not _NAME.fullmatch(name) or not (self._dir / name).is_dir():
            raise NotFound(f"no snapshot {name}", hint="`isolat snapshot ls` lists them")
        return self._read(self._dir / name)

    def digests(self) -> set[str]:
        """Of the images that snapshots stand on."""
        return {found.handle.digest for found in self._all() if found.handle.digest}

    def remove(self, name: str) -> None:
        """What was made from it goes on. Raises NotFound."""
        with self._lock:
            if not _NAME.fullmatch(name) or not (self._dir / name).is_dir():
                raise NotFound(f"no snapshot {name}", hint="`isolat snapshot ls` lists them")
            gone = self._dir / f"{_UNFINISHED}{new_id()}"
            (self._dir / name).rename(gone)
        shutil.rmtree(gone)

    def check_name(self, name: str) -> None:
        """Raises UsageError, and Conflict where it is taken."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r:.140} is no name for a snapshot", hint="letters, digits, and _ . - in between")
        if (self._dir / name).exists():
            raise Conflict(f"there is a snapshot {name}", hint=f"remove it: isolat snapshot rm {name}")

    @contextlib.contextmanager
    def making(self, name: str, handle: Handle) -> Iterator[Unfinished]:
        """One that is there under its name when the block ends well, and else is nowhere.

        Raises StoreError where the disk is full, or fails.
        """
        self.check_name(name)
        try:
            with self._making(name, handle) as one:
                yield one
        except OSError as error:
            raise StoreError(
                f"the snapshot {name} can't be written: {error.strerror}", errno=error.errno or 0
            ) from error

    @contextlib.contextmanager
    def _making(self, name: str, handle: Handle) -> Iterator[Unfinished]:
        self._dir.mkdir(mode=0o700, exist_ok=True)
        directory = self._dir / f"{_UNFINISHED}{new_id()}"
        directory.mkdir(mode=0o700)
        try:
            with Unfinished(directory) as one:
                yield one
                one.write(RECORD, json.dumps(_record(name, handle)).encode())
                one.sync()
            with self._lock:
                self.check_name(name)
                directory.rename(self._dir / name)
            _sync(self._dir)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _read(self, directory: Path) -> Snapshot:
        try:
            data = json.loads((directory / RECORD).read_text(encoding="utf-8", errors="surrogateescape"))
            if data["version"] != VERSION:
                raise StoreError(f"the snapshot {directory.name} is of version {data['version']!r}, not {VERSION}")
            handle = handle_from_json(data["handle"])
            return Snapshot(directory.name, str(data["id"]), int(data["created_ns"]), handle, directory)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IsolatError) as error:
            raise StoreError(
                f"the snapshot {directory.name} can't be read: {error}", hint=f"isolat snapshot rm {directory.name}"
            ) from error


class Unfinished:
    """The files of a snapshot that is being made."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = ExitStack()
        self.state, self.memory, self.disk = (self._new(name) for name in (STATE, MEMORY, DISK))

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _new(self, name: str) -> int:
        fd = os.open(self._directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._files.callback(os.close, fd)
        return fd

    def keep_memory(self, copy: Copy, d: Deadline) -> None:
        """The memory that it began with, and the difference over it."""
        forks.copy_disk(copy.ram, self.memory, d)
        for start, length in memory.read_table(copy.delta, os.fstat(copy.ram).st_size):
            for at in range(start, start + length, _CHUNK_BYTES):
                d.check("writing the machine's memory")
                self._put(os.pread(copy.delta, min(_CHUNK_BYTES, start + length - at), at), at)

    def _put(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self.memory, view, at)
            view, at = view[written:], at + written

    def write(self, name: str, data: bytes) -> None:
        with os.fdopen(os.dup(self._new(name)), "wb") as file:
            file.write(data)

    def sync(self) -> None:
        for path in self._directory.iterdir():
            _sync(path)
        _sync(self._directory)


def allocated_bytes(fd: int) -> int:
    """Without holes."""
    return os.fstat(fd).st_blocks * 512


def load_memory(snapshot: Snapshot, d: Deadline) -> int:
    """A new descriptor of the memory, sealed: machines map it as they map a template's."""
    source = snapshot.open(MEMORY)
    target = -1
    try:
        admission.check_memory(allocated_bytes(source), f"the memory of {snapshot.name}", "stop an environment first")
        target = os.memfd_create("ram", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        forks.copy_disk(source, target, d)
        fcntl.fcntl(target, fcntl.F_ADD_SEALS, forks.SEALED)
        return target
    except BaseException:
        if target >= 0:
            os.close(target)
        raise
    finally:
        os.close(source)


def _record(name: str, handle: Handle) -> dict[str, Any]:
    return {
        "version": VERSION, "name": name, "id": new_id(), "created_ns": time.time_ns(), "handle": handle.to_json()
    }  # fmt: skip


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
