"""What ``Incoming`` finds, made below an open directory that is empty: what an image has becomes a volume's content."""

from __future__ import annotations

import contextlib
import errno
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from isolat.volumes.archive import DIRECTORY, FILE, LINK, SYMLINK, Entry, copy_data
from isolat.volumes.below import parent

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM})


class Full(Exception):
    """No more can be made. Not an OSError, of which each is one file's matter."""


@dataclass
class Planter:
    """Takes the place of ``archive.Writer``. ``target``: the directory; every path begins with its name."""

    target: int
    _directories: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry, source: int = -1) -> None:
        """Raises Full, and OSError for what only this one can't be."""
        try:
            if entry.kind == DIRECTORY:
                self._directories.append(entry)
            if b"/" in entry.path:
                with self._parent(entry.path) as (dir_fd, name):
                    self._make(entry, source, dir_fd, name)
        except OSError as error:
            if error.errno in _FULL:
                raise Full(error.strerror) from error
            raise

    def finish(self) -> None:
        """Owners, modes and times of directories, once nothing is put into them any more."""
        for entry in reversed(self._directories):
            if b"/" in entry.path:
                with self._parent(entry.path) as (dir_fd, name):
                    fd = os.open(name, _OPEN, dir_fd=dir_fd)
            else:
                fd = os.open(".", _OPEN, dir_fd=self.target)
            _dress(fd, entry)

    def _make(self, entry: Entry, source: int, dir_fd: int, name: bytes) -> None:
        if entry.kind == DIRECTORY:
            os.mkdir(name, 0o700, dir_fd=dir_fd)
        elif entry.kind == FILE:
            fd = os.open(name, _NEW, 0o600, dir_fd=dir_fd)
            with contextlib.ExitStack() as unless:
                unless.callback(os.close, fd)
                os.ftruncate(fd, entry.size)
                copy_data(source, 0, fd, 0, entry.size)
                unless.pop_all()
            _dress(fd, entry)
        elif entry.kind == LINK:
            with self._parent(entry.target) as (from_fd, first):
                os.link(first, name, src_dir_fd=from_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        else:
            _node(entry, dir_fd, name)

    def _parent(self, path: bytes) -> AbstractContextManager[tuple[int, bytes]]:
        _, *below = path.split(b"/")
        return parent(self.target, below)


def _dress(fd: int, entry: Entry) -> None:
    """Owner, mode and time of what is open, which is closed."""
    try:
        os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, entry.mode)  # after the owner, whose change clears set-user-ID
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
    finally:
        os.close(fd)


def _node(entry: Entry, dir_fd: int, name: bytes) -> None:
    if entry.kind == SYMLINK:
        os.symlink(entry.target, name, dir_fd=dir_fd)
    else:
        os.mkfifo(name, entry.mode & 0o777, dir_fd=dir_fd)
    os.chown(name, entry.uid, entry.gid, dir_fd=dir_fd, follow_symlinks=False)
    os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=dir_fd, follow_symlinks=False)
