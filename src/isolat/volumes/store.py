"""Named volumes on disk: a description each (``record``), and a subvolume of the pool with a quota.

::

    STATE_ROOT/volumes/NAME.json      written first, removed last
    STATE_ROOT/pool/volumes/NAME      its data; owners are the numbers of the inside: 0 is root there

What is half made or half removed says so in its description, and ``sweep`` completes it. A volume that is NEW has
nothing of anybody in it, so completing it is making it again, empty; one that is GONE goes.

Nobody but root reaches the data by path: a program in it may be set-user-ID, and its owner 0 is this machine's root.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from isolat.checkpoint import checkpoint
from isolat.errors import IsolatError, NotFound, Refused, StoreError
from isolat.images.pool import Pool
from isolat.linux import btrfs
from isolat.volumes import record
from isolat.volumes.record import State, Volume

_MODE = 0o755
Fill = Callable[[int], None]  # put something into the open, empty directory


class Store:
    """No lock: whoever calls sees to it that nobody else is at the same volume."""

    def __init__(self, records: Path, pool: Pool) -> None:
        self._records = records
        self._pool = pool

    def path(self, name: str) -> Path:
        return self._pool.volumes / name

    def require_pool(self) -> None:
        """Raises Refused where this machine can't bound what is in a volume."""
        if not self._pool.ensure():
            raise Refused(
                f"named volumes need a btrfs pool, and this machine has none: {self._pool.reason}",
                hint="install what `isolat doctor` misses, or give a directory of this machine: -v /DIR:TARGET",
            )

    # looking

    def get(self, name: str) -> Volume | None:
        """As its description says, whatever state it is in. Raises StoreError where that can't be read."""
        return record.read(self._records, name)

    def known(self, name: str) -> bool:
        """Whether there is a description, readable or not."""
        return record.file_of(self._records, name).exists()

    def ready(self) -> Iterator[Volume]:
        """Every volume that is whole. What can't be read is left to ``problems``."""
        for name in record.names(self._records):
            with contextlib.suppress(StoreError):
                found = self.get(name)
                if found is not None and found.state is State.READY:
                    yield found

    def used_bytes(self, name: str, *, exact: bool = False) -> int | None:
        """What it takes; None where that can't be told. ``exact``: what was just deleted does not count any more."""
        try:
            if exact:
                btrfs.sync(str(self.path(name)))
            return btrfs.used_bytes(str(self.path(name)))
        except (OSError, ValueError):
            return None

    def is_empty(self, name: str) -> bool:
        """Not where its data is gone: ``open`` says that."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path(name)) as entries:
            return next(entries, None) is None
        return False

    def open(self, name: str) -> int:
        """Its directory, O_PATH. Raises StoreError where its data is gone."""
        path = self.path(name)
        fd = -1
        try:
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            if os.fstat(fd).st_ino == btrfs.ROOT_INODE:
                return fd
        except OSError:
            pass
        if fd >= 0:
            os.close(fd)
        raise StoreError(
            f"the data of the volume {name} is gone: {path} is no subvolume", hint=f"isolat volume rm {name}"
        )

    # changing

    def make(self, volume: Volume, fill: Fill | None = None) -> Volume:
        """Make it, or make it again; ``fill`` gets it before anybody else does.

        Raises StoreError, and what ``fill`` raises: then it is there, and empty.
        """
        first = not self.known(volume.name)
        with _told(volume.name, "made"):
            self._write(replace(volume, state=State.NEW))
            checkpoint()
            try:
                self._make_empty(volume)
            except BaseException:
                if first:
                    with contextlib.suppress(IsolatError, OSError):
                        self.unmake(volume.name)
                raise
            checkpoint()
            return self._filled(volume, fill)

    def _filled(self, volume: Volume, fill: Fill | None) -> Volume:
        volume = replace(volume, state=State.READY)
        try:
            if fill is not None:
                fd = self.open(volume.name)
                try:
                    fill(fd)
                finally:
                    os.close(fd)
                checkpoint()
        except BaseException:
            self._make_empty(volume)
            self._write(volume)
            raise
        self._write(volume)
        checkpoint()
        return volume

    def _make_empty(self, volume: Volume) -> None:
        """A new subvolume with its quota, instead of whatever is there; once it is told of, it is on the disk."""
        parent = self._pool.volumes
        parent.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            btrfs.destroy_whole(str(parent), volume.name)
        btrfs.create(str(parent), volume.name)
        btrfs.set_limit(str(self.path(volume.name)), volume.size_bytes)
        self.path(volume.name).chmod(_MODE)
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def bury(self, name: str) -> None:
        """From here on nobody has it any more. Raises StoreError."""
        with _told(name, "removed"):
            self._write(Volume(name, 0, 0, state=State.GONE))
            checkpoint()

    def unmake(self, name: str) -> None:
        """What is left of one that is buried. Raises StoreError; then the next start tries it again."""
        with _told(name, "removed"):
            with contextlib.suppress(FileNotFoundError):
                btrfs.destroy_whole(str(self._pool.volumes), name)
            checkpoint()
            record.forget(self._records, name)
            checkpoint()

    def set_limit(self, name: str, size_bytes: int) -> None:
        """Another limit until ``sweep``, or until this is called again. Raises StoreError."""
        with _told(name, "given another limit"):
            btrfs.set_limit(str(self.path(name)), size_bytes)

    def _write(self, volume: Volume) -> None:
        record.write(self._records, volume)

    # after a daemon that was killed

    def sweep(self) -> list[str]:
        """Complete what is half made or half removed, and let every limit be what its description says.

        What could not be completed, one line each; it is left as it is.
        """
        if self._pool.exists() and not self._pool.mounted:
            return []  # whatever is in it: it is not known
        failed = []
        with contextlib.suppress(FileNotFoundError):
            for stale in self._records.glob(".*.new"):
                stale.unlink()
        for name in record.names(self._records):
            try:
                found = self.get(name)
                if found is not None:
                    self._complete(found)
            except (IsolatError, OSError) as error:
                failed.append(f"the volume {name} is left as it is: {error}")
        return failed

    def _complete(self, found: Volume) -> None:
        if found.state is State.READY:
            if btrfs.is_subvolume(str(self.path(found.name))):
                self.set_limit(found.name, found.size_bytes)
        elif found.state is State.NEW and self._pool.mounted:
            self.make(found)
        else:
            self.unmake(found.name)

    def problems(self) -> list[str]:
        """What does not fit together, one line each."""
        found = [line for name in record.names(self._records) for line in self._problems_of(name)]
        try:
            entries = sorted(entry.name for entry in os.scandir(self._pool.volumes))
        except FileNotFoundError:
            entries = []
        return found + [f"{self.path(name)} has no description" for name in entries if not self.known(name)]

    def _problems_of(self, name: str) -> Iterator[str]:
        try:
            volume = self.get(name)
        except StoreError as error:
            yield error.message
            return
        if volume is None:
            return
        path = str(self.path(name))
        if volume.state is not State.READY:
            yield f"the volume {name} is half {'made' if volume.state is State.NEW else 'removed'}"
        elif not btrfs.is_subvolume(path):
            yield f"the data of the volume {name} is gone: {path} is no subvolume"
        else:
            with contextlib.suppress(OSError, ValueError):
                limit = btrfs.limit_of(path)
                if limit != volume.size_bytes:
                    yield f"the limit of the volume {name} is {limit} bytes, not {volume.size_bytes}"

    def get_ready(self, name: str) -> Volume:
        """Raises NotFound, and StoreError for what can't be read."""
        found = self.get(name) if record.NAME.fullmatch(name) else None
        if found is None or found.state is State.GONE:
            raise NotFound(f"no volume {name}", hint="`isolat volume ls` lists them")
        return found


@contextlib.contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the volume {name} can't be {what}: {error.strerror or error}", stage="volume", errno=error.errno or 0
        ) from error
