"""Named moments of one request, for ``bench/profile_run.py``: where the time of ``isolat run`` goes.

``ISOLAT_TRACE=FILE`` in the environment of a client or a daemon makes each ``mark`` append one line
``name time_ns pid`` to FILE, on CLOCK_MONOTONIC, which all processes share. Unset, a mark costs one comparison.
Only modules that are built into the interpreter are imported: the client's hot path pays for every other one.
"""

from __future__ import annotations

import posix
import time


def _open(path: bytes) -> int:
    """Lines are appended whole (O_APPEND), so client and daemon may share the file; -1 where it can't be opened."""
    try:
        return posix.open(path, posix.O_WRONLY | posix.O_APPEND | posix.O_CREAT | posix.O_CLOEXEC, 0o600)
    except OSError:
        return -1


_path = posix.environ.get(b"ISOLAT_TRACE")
_fd = _open(_path) if _path else -1


def mark(name: str) -> None:
    """Note that ``name``, a word without spaces, is reached now."""
    if _fd >= 0:
        posix.write(_fd, b"%s %d %d\n" % (name.encode(), time.monotonic_ns(), posix.getpid()))
