"""The few btrfs operations that a pool needs, by ioctl: a `btrfs` child process costs 30 times as much.

Numbers and structures are those of <linux/btrfs.h>. Deleting a subvolume is quick and returns before its space is
free: the kernel's cleaner does that in the background, and the quota group goes with it (Linux 6.12 and later; before
that an empty one stays behind, which ``destroy`` then removes where the kernel lets it).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from enum import IntEnum

ROOT_INODE = 256  # BTRFS_FIRST_FREE_OBJECTID: the inode number of every subvolume's root
SUPER_MAGIC = 0x9123683E


def _ioc(direction: int, number: int, size: int) -> int:
    return (direction << 30) | (size << 16) | (0x94 << 8) | number


_WRITE, _READ = 1, 2
_SUBVOL_CREATE = _ioc(_WRITE, 14, 4096)
_SNAP_DESTROY = _ioc(_WRITE, 15, 4096)
_INO_LOOKUP = _ioc(_READ | _WRITE, 18, 4096)
_QUOTA_CTL = _ioc(_READ | _WRITE, 40, 16)
_QGROUP_CREATE = _ioc(_WRITE, 42, 16)
_QGROUP_LIMIT = _ioc(_READ, 43, 48)
_QGROUP_LIMIT_MAX_RFER = 1


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


def destroy(parent: str, name: str) -> None:
    """Delete the subvolume. Raises OSError: ENOENT where it is not, EBUSY while something is mounted from it."""
    with _directory(parent) as descriptor:
        group = subvolume_id(f"{parent}/{name}")
        fcntl.ioctl(descriptor, _SNAP_DESTROY, _named(name))
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, _QGROUP_CREATE, struct.pack("<QQ", 0, group))


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
