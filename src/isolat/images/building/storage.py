"""Where builds write: a copy of the cache for each, bounded, which becomes the cache when all went well.

::

    STATE_ROOT/pool/builder           the cache: buildah's layers of earlier builds, one btrfs subvolume
    STATE_ROOT/pool/build-ID          a snapshot of it, in which one build works
    STATE_ROOT/pool/build-ID-work     the same build's context, temporary files and result; never kept
    STATE_ROOT/builder/cache.json     how many bytes the cache has

buildah's storage is not made to be killed at any moment. A snapshot is: a build that is cancelled or killed leaves the
cache as it was before, and the next opening of the pool removes what it worked in, because no one knows the name. So
there is no state "in use" that could be wrong. Several builds at once work beside each other; the last to end leaves
its cache.

On disk every file belongs to the uid that it has inside, in directories that nobody but root can pass; a build sees
them shifted to its own range (mount_setattr(2)).

Where there is no pool, a build works in a tmpfs, and there is no cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isolat.images.pool import Pool
from isolat.linux import btrfs, mounts

CACHE = "builder"
DISK_BYTES = 20 << 30
CACHE_BYTES_MAX = 10 << 30
_WORK = "-work"
_STATE = "cache.json"


@dataclass(frozen=True)
class Workplace:
    """``graph``: buildah's storage. ``work``: everything else. ``cached``: it began with layers of earlier builds."""

    id: str
    graph: Path
    work: Path
    cached: bool
    bounded_by: str


class Storage:
    """The builds' storage of one state root. Safe for several threads."""

    def __init__(self, root: Path, pool: Pool) -> None:
        self.dir = root / "builder"
        self._pool = pool
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def workplace(self, id: str, disk_bytes: int, memory_bytes: int) -> Iterator[Workplace]:
        """A place for one build of so many bytes, gone at the end. Without a pool, it is of so much memory."""
        self.dir.mkdir(mode=0o700, exist_ok=True)
        with self._in_pool(id, disk_bytes) if self._pool.ensure() else self._in_memory(id, memory_bytes) as found:
            yield found

    @contextlib.contextmanager
    def _in_pool(self, id: str, disk_bytes: int) -> Iterator[Workplace]:
        pool = self._pool.path
        names = (f"build-{id}", f"build-{id}{_WORK}")
        try:
            with self._lock:
                cached = btrfs.is_subvolume(str(pool / CACHE))
                if cached:
                    btrfs.snapshot(str(pool / CACHE), str(pool), names[0])
                else:
                    btrfs.create(str(pool), names[0])
            btrfs.create(str(pool), names[1])
            for name in names:
                (pool / name).chmod(0o700)
                btrfs.set_limit(str(pool / name), disk_bytes)
            yield Workplace(id, pool / names[0], pool / names[1], cached, f"{disk_bytes >> 20} MiB of disk")
        finally:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    btrfs.destroy_whole(str(pool), name)

    @contextlib.contextmanager
    def _in_memory(self, id: str, memory_bytes: int) -> Iterator[Workplace]:
        """What is written counts as the build's memory, of which the programs must have their part."""
        size = memory_bytes * 3 // 4
        place = self.dir / f"build-{id}"
        place.mkdir(mode=0o700, exist_ok=True)
        mounts.mount("tmpfs", str(place), "tmpfs", mounts.MS_NODEV, f"mode=700,size={size}")
        try:
            for name in ("graph", "work"):
                (place / name).mkdir(mode=0o700)
            bound = f"{size >> 20} MiB of its memory, because there is no pool"
            yield Workplace(id, place / "graph", place / "work", False, bound)
        finally:
            mounts.umount(str(place), mounts.MNT_DETACH)
            with contextlib.suppress(FileNotFoundError):
                place.rmdir()

    def keep(self, place: Workplace) -> bool:
        """Let what this build leaves be the cache. False where there is none, or it has grown too large."""
        pool = self._pool.path
        if place.graph.parent != pool:
            return False
        with self._lock:
            before = self._recorded() if place.cached else 0
            size = before + btrfs.used_bytes(str(place.graph))
            if size > CACHE_BYTES_MAX:
                self._forget()
                return False
            btrfs.sync(str(pool))  # what a rename makes visible must be on the disk before it
            self._forget()
            place.graph.rename(pool / CACHE)
            self._record(size)
        return True

    def usage_bytes(self) -> int:
        """What the cache takes. An estimate from above: what builds have written, not what they removed again."""
        return self._recorded() if self._exists() else 0

    def prune(self) -> int:
        """Remove the cache. Returns the bytes that this freed."""
        with self._lock:
            freed = self.usage_bytes()
            self._forget()
            return freed

    def sweep(self) -> None:
        """Remove what builds without a pool left when their daemon was killed."""
        if self.dir.exists():
            mounts.umount_below(str(self.dir))
            for place in self.dir.glob("build-*"):
                with contextlib.suppress(OSError):
                    place.rmdir()

    def _exists(self) -> bool:
        return self._pool.mounted and btrfs.is_subvolume(str(self._pool.path / CACHE))

    def _forget(self) -> None:
        if self._exists():
            btrfs.destroy_whole(str(self._pool.path), CACHE)
        (self.dir / _STATE).unlink(missing_ok=True)

    def _recorded(self) -> int:
        try:
            return int(json.loads((self.dir / _STATE).read_text())["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _record(self, size_bytes: int) -> None:
        temporary = self.dir / f".{_STATE}"
        temporary.write_text(json.dumps({"bytes": size_bytes}))
        os.replace(temporary, self.dir / _STATE)  # noqa: PTH105 - Path.replace is the same
