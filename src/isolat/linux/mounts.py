"""Mounting by mount(2) itself, and what is mounted where.

Why not mount(8): it makes a loop device for every regular file (milliseconds, and a resource that can leak), while
EROFS has been able to read a file directly since Linux 6.12. The kernel answers ENOTBLK where it cannot
(Documentation/filesystems/erofs.rst; ``erofs_fc_get_tree``); then, and only then, a loop device is made, with
LO_FLAGS_AUTOCLEAR, so that it goes with its mount whoever unmounts it (loop(4)).

Guarantees: every function raises StoreError with the errno or does what it says; unmounting what is not mounted is
fine.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from isolat.errors import StoreError
from isolat.linux import loop

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOATIME = 0x400
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SHARED = 1 << 20
MNT_DETACH = 0x2

_MOUNTINFO = Path("/proc/self/mountinfo")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class MountEntry:
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5)), its escapes undone."""

    root: str
    target: str
    fstype: str
    source: str
    super_options: tuple[str, ...] = ()


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes: space, tab, newline and backslash are written as \\040 and so on."""
    for code in ("040", "011", "012", "134"):
        field = field.replace("\\" + code, chr(int(code, 8)))
    return field


def parse_mountinfo(text: str) -> list[MountEntry]:
    """The mounts, oldest first. Lines of an unknown form are left out: the kernel may add fields, not take any."""
    found = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if not separator or len(before) < 6 or len(after) < 3:
            continue
        found.append(
            MountEntry(
                root=_unescape(before[3]),
                target=_unescape(before[4]),
                fstype=after[0],
                source=_unescape(after[1]),
                super_options=tuple(after[2].split(",")),
            )
        )
    return found


def mounts() -> list[MountEntry]:
    return parse_mountinfo(_MOUNTINFO.read_text(errors="surrogateescape"))


def mounted_at(target: str) -> MountEntry | None:
    """What is seen at ``target``: the youngest mount there."""
    path = os.path.realpath(target)
    found = [entry for entry in mounts() if entry.target == path]
    return found[-1] if found else None


def is_mountpoint(path: str) -> bool:
    return mounted_at(path) is not None


def mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    """mount(2). Raises StoreError with the kernel's errno."""
    number = _mount(source, target, fstype, flags, options)
    if number:
        raise _mount_error(source, target, fstype, number)


def _mount_error(source: str, target: str, fstype: str, number: int) -> StoreError:
    return StoreError(
        f"could not mount {fstype} {source} at {target}: {os.strerror(number)}",
        stage="mount",
        errno=number,
        hint="`dmesg | tail` has the kernel's own words",
    )


def _mount(source: str, target: str, fstype: str, flags: int, options: str) -> int:
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode(),
        ctypes.c_ulong(flags),
        options.encode() if options else None,
    )
    return ctypes.get_errno() if result else 0


def share(directory: str) -> None:
    """Make ``directory`` a mount of its own that is shared: what is unmounted below it goes in its slaves, too.

    A keeper's mount namespace sees all that is mounted when it starts, and would keep it busy for ever
    (mount_namespaces(7), "Shared subtrees").
    """
    if not is_mountpoint(directory):
        mount(directory, directory, "", MS_BIND | MS_REC)
    mount("none", directory, "", MS_SHARED)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2), not following a symbolic link. What is not mounted, or not there, is fine."""
    nofollow = 0x8
    if _libc.umount2(os.fsencode(target), flags | nofollow) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOENT):
        raise StoreError(
            f"could not unmount {target}: {os.strerror(number)}",
            stage="umount",
            errno=number,
            hint=f"`fuser -vm {target}` shows who uses it" if number == errno.EBUSY else "",
        )


def umount_below(directory: str) -> int:
    """Unmount all that is mounted below ``directory``, youngest first, detaching what is busy. Says how many."""
    prefix = os.path.realpath(directory) + "/"
    targets = [entry.target for entry in mounts() if entry.target.startswith(prefix)]
    for target in reversed(targets):
        umount(target, MNT_DETACH)
    return len(targets)


def mount_erofs(file: str, target: str) -> None:
    """Mount an EROFS file read-only, without devices and set-user-ID, directly or through a loop device."""
    flags = MS_RDONLY | MS_NODEV | MS_NOSUID
    number = _mount(file, target, "erofs", flags, "")
    if number == 0:
        return
    if number != errno.ENOTBLK:
        raise _mount_error(file, target, "erofs", number)
    with loop.attached(file, read_only=True) as device:
        mount(device, target, "erofs", flags)


def backing_file(entry: MountEntry) -> str:
    """The regular file that a mount reads: its source itself, or what its loop device is bound to."""
    if entry.source.startswith("/dev/loop"):
        return loop.backing_file(entry.source)
    return entry.source
