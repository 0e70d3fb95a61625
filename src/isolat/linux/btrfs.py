"""The few btrfs operations that a pool needs, by ioctl: a `btrfs` child process costs 30 times as much.

Numbers and structures are those of <linux/btrfs.h>. Deleting a subvolume is quick and returns before its space is
free: the kernel's cleaner does that in the background, and the quota group goes with it (Linux 6.12 and later; before
that an empty one stays behind, which ``destroy`` then removes where the kernel lets it).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import uuid
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

ROOT_INODE = 256  # BTRFS_FIRST_FREE_OBJECTID: the inode number of every subvolume's root
SUPER_MAGIC = 0x9123683E


def _ioc(direction: int, number: int, size: int) -> int:
    return (direction << 30) | (size << 16) | (0x94 << 8) | number


_WRITE, _READ = 1, 2
_SYNC = _ioc(0, 8, 0)
_SUBVOL_CREATE = _ioc(_WRITE, 14, 4096)
_SNAP_DESTROY = _ioc(_WRITE, 15, 4096)
_INO_LOOKUP = _ioc(_READ | _WRITE, 18, 4096)
_FS_INFO = _ioc(_READ, 31, 1024)
_SNAP_CREATE = _ioc(_WRITE, 23, 4096)
_QUOTA_CTL = _ioc(_READ | _WRITE, 40, 16)
_QGROUP_CREATE = _ioc(_WRITE, 42, 16)
_QGROUP_LIMIT = _ioc(_READ, 43, 48)
_QGROUP_LIMIT_MAX_RFER = 1
_SYSFS = Path("/sys/fs/btrfs")


class Quota(IntEnum):
    """How space is counted (btrfs-quota(5)). SIMPLE charges an extent to whoever wrote it first (Linux 6.7)."""

    NONE = 0
    FULL = 1
    SIMPLE = 4


@contextlib.contextmanager
def _directory(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _named(name: str) -> bytearray:
    """struct btrfs_ioctl_vol_args, in a mutable buffer: Python copies at most 1024 bytes of an immutable one."""
    return bytearray(struct.pack("<q4088s", 0, os.fsencode(name)))


def is_subvolume(path: str) -> bool:
    try:
        return os.lstat(path).st_ino == ROOT_INODE
    except OSError:
        return False


def create(parent: str, name: str) -> None:
    with _directory(parent) as descriptor:
        fcntl.ioctl(descriptor, _SUBVOL_CREATE, _named(name))


def snapshot(source: str, parent: str, name: str) -> None:
    """A new subvolume with what the subvolume ``source`` holds now; from then on neither sees the other's changes."""
    with _directory(source) as original, _directory(parent) as descriptor:
        packed = struct.pack("<qQQ32x4040s", original, 0, 0, os.fsencode(name))  # struct btrfs_ioctl_vol_args_v2
        fcntl.ioctl(descriptor, _SNAP_CREATE, bytearray(packed))


def destroy(parent: str, name: str) -> None:
    """Delete the subvolume. Raises OSError: ENOENT where it is not, EBUSY while something is mounted from it."""
    with _directory(parent) as descriptor:
        group = subvolume_id(f"{parent}/{name}")
        fcntl.ioctl(descriptor, _SNAP_DESTROY, _named(name))
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, _QGROUP_CREATE, struct.pack("<QQ", 0, group))


def destroy_whole(parent: str, name: str) -> None:
    """``destroy``, with the subvolumes that somebody has made in it: the kernel deletes none that has others inside."""
    try:
        destroy(parent, name)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        for directory, inner, _ in os.walk(f"{parent}/{name}", topdown=False):
            for one in inner:
                if is_subvolume(f"{directory}/{one}"):
                    destroy(directory, one)
        destroy(parent, name)


def subvolume_id(path: str) -> int:
    """The id of the subvolume that ``path`` is in, which is also that of its quota group 0/ID."""
    buffer = bytearray(4096)
    struct.pack_into("<QQ", buffer, 0, 0, ROOT_INODE)
    with _directory(path) as descriptor:
        fcntl.ioctl(descriptor, _INO_LOOKUP, buffer)
    return int(struct.unpack_from("<Q", buffer)[0])


def set_limit(path: str, size_bytes: int) -> None:
    """At most so many bytes referenced by the subvolume ``path``; beyond them writes give EDQUOT."""
    values = struct.pack("<6Q", subvolume_id(path), _QGROUP_LIMIT_MAX_RFER, size_bytes, 0, 0, 0)
    with _directory(path) as descriptor:
        fcntl.ioctl(descriptor, _QGROUP_LIMIT, bytearray(values))


def enable_quota(path: str, quota: Quota) -> None:
    with _directory(path) as descriptor:
        fcntl.ioctl(descriptor, _QUOTA_CTL, bytearray(struct.pack("<QQ", quota, 0)))


def used_bytes(path: str) -> int:
    """What the subvolume ``path`` takes, with what is written and not yet on the disk.

    What was deleted counts until the next commit, which is 30 s away at most. Raises OSError.
    """
    group = _group(path)
    return _number(group / "exclusive") + _number(group / "rsv_data")


def limit_of(path: str) -> int:
    """The limit of the subvolume ``path``, in bytes. Raises OSError."""
    return _number(_group(path) / "max_referenced")


def sync(path: str) -> None:
    """Commit the file system that ``path`` is on: from then on ``used_bytes`` is exact."""
    with _directory(path) as descriptor:
        fcntl.ioctl(descriptor, _SYNC)


def _group(path: str) -> Path:
    """The kernel's directory of a subvolume's quota group (btrfs(5), /sys/fs/btrfs)."""
    buffer = bytearray(1024)
    with _directory(path) as descriptor:
        fcntl.ioctl(descriptor, _FS_INFO, buffer)
    return _SYSFS / str(uuid.UUID(bytes=bytes(buffer[16:32]))) / "qgroups" / f"0_{subvolume_id(path)}"


def _number(file: Path) -> int:
    return int(file.read_text())
