"""The root directory that every QEMU of a state root runs in: its program and libraries, four devices, nothing else.

::

    PATH                 a tmpfs of our own, read-only when it is finished
    PATH/usr             this machine's /usr, read-only, without set-user-ID and devices
    PATH/bin, lib, …     links into usr, as this machine has them
    PATH/guest           the guest's kernel and initramfs, read-only
    PATH/dev             null, zero, random, urandom; kvm where it is used
    PATH/proc            empty: each keeper mounts its own machine's there, in a mount namespace of its own

Why one for all: it holds nothing that belongs to any machine. Why not the machine's root: a QEMU that its guest took
over finds no file of any user, no socket and no other process.

Idempotent: a half-made one (we were killed) is torn down and made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from isolat.errors import StoreError
from isolat.linux import mounts

_DEVICES = ("null", "zero", "random", "urandom")
_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_MS_REMOUNT = 0x20
_READ_ONLY = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV
_FINISHED = "finished"


def ensure(path: Path, guest_dir: Path, *, kvm: bool = False) -> None:
    """Make the jail at ``path`` unless it is there, for machines that boot from ``guest_dir``. Raises StoreError.

    A few system calls where it is there. It is made anew where /usr or ``guest_dir`` is another one than it was, and
    where it lacks /dev/kvm and ``kvm`` is wanted; machines that run keep the one that they started in.
    """
    if _is_ready(path, guest_dir, kvm):
        return
    guest_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _lock(path):
        if not _is_ready(path, guest_dir, kvm):
            _unmount(path)
            _make(path, guest_dir, kvm)


def remove(path: Path) -> None:
    """Take it away. What is not there is fine.

    A machine that runs in it may lose sight of its files (the unmounting reaches its mount namespace) and does not
    need them any more: tried with disks swapped and a state saved after that.
    """
    if not path.exists():
        return
    with _lock(path):
        _unmount(path)
        with contextlib.suppress(OSError):
            path.rmdir()


def _is_ready(path: Path, guest_dir: Path, kvm: bool) -> bool:
    try:
        return (
            (path / _FINISHED).exists()
            and _same(path / "usr", Path("/usr"))
            and _same(path / "guest", guest_dir)
            and (not kvm or (path / "dev/kvm").exists())
        )
    except OSError:
        return False


def _same(one: Path, other: Path) -> bool:
    """Whether both are the same directory, seen through a bind mount or not."""
    return os.path.samestat(one.stat(), other.stat())


def _make(path: Path, guest_dir: Path, kvm: bool) -> None:
    try:
        mounts.mount("jail", str(path), "tmpfs", mounts.MS_NOSUID, "mode=755,size=64k,nr_inodes=64")
        for name in ("usr", "guest", "dev", "proc"):
            (path / name).mkdir(mode=0o755)
        _bind(Path("/usr"), path / "usr")
        _bind(guest_dir, path / "guest")
        for name in _LINKS:
            _link(path, name)
        for name in (*_DEVICES, *(("kvm",) if kvm else ())):
            _device(Path("/dev", name), path / "dev" / name)
        (path / _FINISHED).touch()
        mounts.mount("jail", str(path), "", _MS_REMOUNT | mounts.MS_BIND | mounts.MS_RDONLY | mounts.MS_NOSUID)
    except OSError as error:
        _unmount(path)
        raise StoreError(
            f"could not make the root directory of machines, {path}: {error}", stage="jail", errno=error.errno or 0
        ) from error
    except BaseException:
        _unmount(path)
        raise


def _bind(source: Path, target: Path) -> None:
    """mount(2) takes the flags of a bind mount only when it is mounted again."""
    mounts.mount(str(source), str(target), "", mounts.MS_BIND)
    mounts.mount("none", str(target), "", _MS_REMOUNT | mounts.MS_BIND | _READ_ONLY)


def _link(path: Path, name: str) -> None:
    """A directory of the root, as this machine has it: a link into /usr, or, where /usr is not merged, its own."""
    source = Path("/", name)
    if source.is_symlink():
        (path / name).symlink_to(source.readlink())
    elif source.is_dir():
        (path / name).mkdir(mode=0o755)
        _bind(source, path / name)


def _device(source: Path, target: Path) -> None:
    """A node of our own that everybody may open: only /dev/kvm is narrower outside, and in here are only machines.

    Where nodes can't be made (a container's root), the outer one is bound, with its own mode.
    """
    found = source.stat()
    try:
        os.mknod(target, stat.S_IFCHR | 0o666, found.st_rdev)
        target.chmod(0o666)
        os.close(os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except PermissionError:
        target.unlink(missing_ok=True)
        target.touch()
        mounts.mount(str(source), str(target), "", mounts.MS_BIND)


def _unmount(path: Path) -> None:
    """All that is mounted below and at ``path``, however often it was."""
    mounts.umount_below(str(path))
    while mounts.is_mountpoint(str(path)):
        mounts.umount(str(path), mounts.MNT_DETACH)
        mounts.umount_below(str(path))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One maker at a time: flock(2) of the directory above, which needs no file of its own."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
