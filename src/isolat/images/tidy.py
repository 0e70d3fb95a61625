"""What is taken out of a fresh root file system before it is packed: caches, logs, identity, and the time of making.

An image is shared by everything that is started from it. So it must not hold what has to be different each time
(machine identity, host keys), nor what tells about the machine that it was made on (name, resolver, users' dates).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

_EMPTY_DIRS = (
    "dev",
    "proc",
    "run",
    "sys",
    "tmp",
    "var/cache/apt",
    "var/cache/debconf",
    "var/cache/ldconfig",
    "var/lib/apt/lists",
    "var/log",
    "var/tmp",
)
_GONE = (
    "etc/.pwd.lock",
    "etc/group-",
    "etc/gshadow-",
    "etc/passwd-",
    "etc/shadow-",
    "etc/subgid-",
    "etc/subuid-",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/status-old",
    "var/lib/systemd/random-seed",
)
_EMPTY_FILES = ("etc/hostname", "etc/machine-id", "etc/resolv.conf")


def tidy(tree: Path) -> None:
    """All of the above, in place."""
    for name in _EMPTY_DIRS:
        _empty(tree / name)
    for name in (*_GONE, *(str(path.relative_to(tree)) for path in tree.glob("etc/ssh/ssh_host_*"))):
        (tree / name).unlink(missing_ok=True)
    for name in _EMPTY_FILES:
        path = tree / name
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            path.touch(mode=0o644)
    clamp_times(tree, newest_packaged_ns(tree))


def _empty(directory: Path) -> None:
    if directory.is_symlink() or not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def newest_packaged_ns(tree: Path) -> int:
    """The latest time of a copyright file: those come from the packages and are touched by nothing afterwards."""
    times = (path.lstat().st_mtime_ns for path in tree.glob("usr/share/doc/*/copyright"))
    return max(times, default=0)


def clamp_times(tree: Path, newest_ns: int) -> None:
    """What was written while the tree was made gets the time ``newest_ns``; what is older keeps its own."""
    for directory, names, files in os.walk(tree, topdown=False):
        for name in (*files, *names):
            _clamp(os.path.join(directory, name), newest_ns)  # noqa: PTH118 - thousands of files
    _clamp(str(tree), newest_ns)


def _clamp(path: str, newest_ns: int) -> None:
    found = os.lstat(path)
    if found.st_mtime_ns > newest_ns:
        os.utime(path, ns=(newest_ns, newest_ns), follow_symlinks=False)


def drop_special_files(tree: Path) -> None:
    """Take out device nodes and sockets: the image is mounted without devices anyway."""
    for directory, _, files in os.walk(tree):
        for name in files:
            path = Path(directory) / name
            kind = path.lstat().st_mode
            if stat.S_ISBLK(kind) or stat.S_ISCHR(kind) or stat.S_ISSOCK(kind):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
