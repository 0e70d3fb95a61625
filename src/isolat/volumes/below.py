"""Names below an open directory, walked one part at a time and through no symbolic link (openat(2), O_NOFOLLOW)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def parent(directory: int, parts: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """The open directory that the last part is in, and that part. Raises OSError for what is no directory on the way.

    None of ``parts`` may be ``..``: that is the caller's to refuse.
    """
    *between, name = parts
    fd = os.open(".", _PLACE, dir_fd=directory)
    try:
        for part in between:
            inner = os.open(part, _PLACE, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd, name
    finally:
        os.close(fd)
