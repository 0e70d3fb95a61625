"""What must outlast a power cut: the data on the disk before the name that stands for it.

A file's ``fsync`` says nothing of the directory that it is named in, which has one of its own (fsync(2), NOTES).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def sync(paths: Iterable[Path]) -> None:
    """Have these files' data, or these directories' names, on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Write whole or not at all, for nobody but root: names, environments and labels of images are nobody's business.

    On disk before it is seen, because a description stands for a file of megabytes.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync([path.parent])


def sweep(directory: Path) -> None:
    """Remove what a killed ``replace`` left; for those whom no other may be replacing beside."""
    for path in directory.glob(".*.json.*"):
        path.unlink(missing_ok=True)


def make_private(paths: Iterable[Path]) -> None:
    """What older versions wrote for everybody's eyes."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
