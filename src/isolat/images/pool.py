"""Where environments write: one btrfs file, in which each has a subvolume with a quota of its own.

Why: an application must not fill the machine's disk, and this is the one kind of quota for directories that needs
nothing of the disk's own file system. Measured here: 0.09 ms for a subvolume with its limit, 0.2 ms to delete
one, EDQUOT when the limit is reached, also through an overlay's upper directory.

Simple quotas (Linux 6.7) are tried first: they count an extent once, when it is written, where the older quota groups
walk references whenever a subvolume with shared extents is deleted. Either is used only after a write beyond a limit
has really been refused.

The file is sparse and grows as it is written to; deleted data is given back (discard). The kernel's loop device goes
with the mount. A killed daemon leaves the pool mounted, and the next one finds it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path

from isolat.deadline import Deadline
from isolat.errors import Refused, StoreError
from isolat.linux import btrfs, child, loop, mounts

MIN_BYTES = 2 << 30
SHARE_OF_FREE = 0.8
_MKFS_S = 60.0
_LOOP_S = 3.0  # a device that is just being let go
_PROBE_LIMIT_BYTES = 1 << 20
_PROBE_WRITE_BYTES = 8 << 20
_READY = ".isolat-pool"
_VOLUMES = "volumes"


class Pool:
    """The pool of one state root. Safe for several threads; the state root's lock keeps other processes away."""

    def __init__(self, root: Path, size_bytes: int | None = None) -> None:
        """``size_bytes``: instead of 80 % of what is free."""
        self.file = root / "pool.img"
        self.path = root / "pool"
        self.reason = ""
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._failed = False

    def exists(self) -> bool:
        return self.file.exists()

    @property
    def mounted(self) -> bool:
        """One stat(2): a subvolume's root has an inode number that a plain directory never has."""
        return btrfs.is_subvolume(str(self.path))

    @property
    def available(self) -> bool:
        """Whether this machine can have a pool at all; ``reason`` says why not. Changes nothing."""
        self.reason = self._objection()
        return not self.reason

    def _objection(self) -> str:
        if not _knows_btrfs():
            return "this kernel has no btrfs"
        if shutil.which("mkfs.btrfs", path=child.SAFE_PATH) is None:
            return "could not find mkfs.btrfs, which is required to make the pool (apt-get install btrfs-progs)"
        if not Path("/dev/loop-control").exists():
            return "this machine gives no loop devices (/dev/loop-control)"
        if not self.exists():
            try:
                self._choose_size()
            except Refused as error:
                return error.message
        return ""

    def ensure(self) -> bool:
        """Have the pool mounted with quotas that hold. False, with ``reason``, where this machine can't have one.

        Raises Refused when the disk is too full, StoreError when what should work does not.
        """
        if self.mounted:
            return True
        with self._lock:
            if self._failed:
                return False
            if self.mounted:
                return True
            self.reason = self._objection()
            if self.reason:
                self._failed = True
                return False
            self._make_and_mount()
        return True

    def _make_and_mount(self) -> None:
        self.path.mkdir(mode=0o711, parents=True, exist_ok=True)
        if self.exists():
            self._mount()
            if (self.path / _READY).exists():
                return
            self.close()  # a maker was killed half-way: nothing is in it yet
        self._format()
        self._mount()
        try:
            self._enable_quota()
        except BaseException:
            self.close()
            raise
        self.path.chmod(0o711)
        (self.path / _READY).touch(mode=0o600)

    def _choose_size(self) -> int:
        if self._size_bytes is not None:
            return self._size_bytes
        parent = next(path for path in self.file.parents if path.exists())
        free = shutil.disk_usage(parent).free
        size = int(free * SHARE_OF_FREE)
        if size < MIN_BYTES:
            raise Refused(
                f"the pool needs {MIN_BYTES >> 30} GiB and {parent} has {free >> 20} MiB free, of which "
                f"{SHARE_OF_FREE:.0%} may be used",
                hint="free some space, or put the state root on another disk with --root",
            )
        return size

    def _format(self) -> None:
        """A new file system, whole or not at all under its name."""
        making = self.file.with_name(f"pool.img.new-{secrets.token_hex(4)}")
        for stale in self.file.parent.glob("pool.img.new-*"):
            stale.unlink()
        try:
            with making.open("xb") as stream:
                os.fchmod(stream.fileno(), 0o600)
                stream.truncate(self._choose_size())
            argv = ["mkfs.btrfs", "--quiet", "--metadata", "single", "--data", "single", "--nodiscard", str(making)]
            child.run(argv, "making the pool", Deadline(_MKFS_S))
            making.rename(self.file)
        finally:
            making.unlink(missing_ok=True)

    def _mount(self) -> None:
        self._wait_for_no_other()
        with loop.attached(str(self.file), read_only=False, direct_io=True) as device:
            flags = mounts.MS_NOATIME | mounts.MS_NODEV
            mounts.mount(device, str(self.path), "btrfs", flags, "discard=async")

    def _wait_for_no_other(self) -> None:
        """One file system mounted twice through two devices is soon none: refuse while another device has the file."""
        d = Deadline(_LOOP_S)
        while others := loop.devices_of(str(self.file)):
            if d.passed:
                raise StoreError(
                    f"{self.file} is held by {', '.join(others)}, from a mount that is hidden or in another namespace",
                    hint=f"find and end what holds it (`losetup`, `findmnt -A`), then `losetup -d {others[0]}`",
                )
            time.sleep(0.02)

    def _enable_quota(self) -> None:
        """Simple quotas where they hold, else full ones; StoreError when neither refuses what is too much."""
        for quota in (btrfs.Quota.SIMPLE, btrfs.Quota.FULL):
            with contextlib.suppress(OSError):
                btrfs.enable_quota(str(self.path), quota)
                if self._limit_holds():
                    return
        raise StoreError(
            f"quotas on {self.path} do not hold: a subvolume took more than its limit",
            stage="pool",
            hint="run a kernel with btrfs quotas, or do without a disk limit",
        )

    def _limit_holds(self) -> bool:
        """Write beyond a small limit and see whether the kernel refuses (EDQUOT)."""
        name = f".probe-{secrets.token_hex(4)}"
        btrfs.create(str(self.path), name)
        try:
            btrfs.set_limit(str(self.path / name), _PROBE_LIMIT_BYTES)
            with (self.path / name / "file").open("wb") as stream:
                stream.write(bytes(_PROBE_WRITE_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            return error.errno == errno.EDQUOT
        finally:
            btrfs.destroy(str(self.path), name)
        return False

    def upper(self, id: str) -> Path:
        """Where the subvolume of the environment ``id`` is, or will be."""
        return self.path / id

    @property
    def volumes(self) -> Path:
        """Where named volumes are, one subvolume each. Not for anybody else's eyes: what is in them may be anything."""
        return self.path / _VOLUMES

    def sweep(self, keep_ids: Collection[str]) -> list[str]:
        """Delete the subvolumes of environments that are not known any more. Says which; busy ones stay for later."""
        if not self.mounted:
            return []
        gone = []
        for entry in os.scandir(self.path):
            if (
                entry.name in (*keep_ids, _VOLUMES)
                or not entry.is_dir(follow_symlinks=False)
                or not _is_subvolume(entry)
            ):
                continue
            with contextlib.suppress(OSError):
                btrfs.destroy(str(self.path), entry.name)
                gone.append(entry.name)
        return sorted(gone)

    def close(self) -> None:
        """Unmount; the loop device goes with it. What still uses the pool keeps it until it ends."""
        mounts.umount(str(self.path), mounts.MNT_DETACH)

    def remove(self) -> None:
        """Unmount and delete the file with all that is in it."""
        self.close()
        self.file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()


def _is_subvolume(entry: os.DirEntry[str]) -> bool:
    return entry.inode() == btrfs.ROOT_INODE or btrfs.is_subvolume(entry.path)


def _knows_btrfs() -> bool:
    """Built in, or to be had as a module: mount(2) loads it by itself."""
    if "\tbtrfs\n" in Path("/proc/filesystems").read_text():
        return True
    return any(Path("/lib/modules", os.uname().release).glob("kernel/fs/btrfs/btrfs.ko*"))
