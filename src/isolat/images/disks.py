"""The bootable disks that were made, kept as long as nothing that went into them changes.

::

    DISKS/kernel/                        the distribution's kernel with all of its modules
    DISKS/IMAGE-SIZE-KEY.disk            a disk: the beginning of its image's digest, MiB, disk.key()
    DISKS/lock                           flock: one maker at a time

A disk is a base: an environment gets a copy (guest/blank.py, ``copy_sparse``), 0.3 GB of data in as many GiB as wanted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from isolat.deadline import NEVER, Deadline
from isolat.guest import kernel as kernels
from isolat.images import disk
from isolat.images.progress import Progress, no_progress

_KERNEL = "kernel"
_DIGITS = 16
_LOCK_POLL_S = 0.05


def ensure(
    directory: Path,
    digest: str,
    image_mount: Path,
    agent: Path,
    size_bytes: int,
    progress: Progress = no_progress,
    d: Deadline = NEVER,
) -> Path:
    """The disk of this image, agent and size, made where it is missing (2 s; the first also fetches a kernel).

    Disks of the same image and size that were made with another kernel or agent are removed. Raises what
    ``disk.build_disk`` and guest/kernel.py's ``fetch`` raise, and DeadlineExceeded while somebody else makes one.
    """
    disk.check(image_mount)
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    with _locked(directory, d):
        tree = _kernel(directory, progress, d)
        name = f"{digest[:_DIGITS]}-{size_bytes >> 20}-"
        key = disk.key(digest, disk.find_kernel(tree).release, agent, size_bytes)
        path = directory / f"{name}{key}.disk"
        if not path.exists():
            _sweep(directory)
            disk.build_disk(image_mount, tree, agent, path, size_bytes, progress, d)
            for old in directory.glob(f"{name}*.disk"):
                if old != path:
                    old.unlink()
    return path


def kernel(directory: Path, progress: Progress = no_progress, d: Deadline = NEVER) -> None:
    """Fetch the kernel that the disks get, where it is missing. Raises what guest/kernel.py's ``fetch`` raises."""
    if not (directory / _KERNEL).exists():
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        with _locked(directory, d):
            _kernel(directory, progress, d)


def prune(directory: Path, digests: Collection[str]) -> int:
    """Remove the disks of images other than these; says how many."""
    kept = {digest[:_DIGITS] for digest in digests}
    gone = [path for path in directory.glob("*.disk") if path.name.partition("-")[0] not in kept]
    for path in gone:
        path.unlink(missing_ok=True)
    return len(gone)


def _kernel(directory: Path, progress: Progress, d: Deadline) -> Path:
    tree = directory / _KERNEL
    if not tree.exists():
        kernels.fetch(tree, progress=progress, d=d)
        (tree / kernels.VMLINUX).unlink()  # of microVMs, which have their own
    return tree


def _sweep(directory: Path) -> None:
    """What a maker that was killed has left; the lock says that there is none at work."""
    for path in directory.glob(".disk-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path, d: Deadline) -> Iterator[None]:
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                d.check("waiting for a disk that somebody else makes")
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
