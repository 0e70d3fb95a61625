"""Volumes into an archive: a walk through open directories, with the rights of whoever walks."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from isolat.volumes.archive import DIRECTORY, FIFO, FILE, LINK, NAME_MAX, SYMLINK, Entry
from isolat.volumes.base import LEFT_OUT, Known, known

DEPTH_MAX = 256
NOBODY = 65534
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: SYMLINK, stat.S_IFIFO: FIFO}

Tell = Callable[[bytes, str], None]


class Sink(Protocol):
    """Where what is found goes."""

    def add(self, entry: Entry, source: int = -1) -> None:
        """``source``: the open file whose first ``entry.size`` bytes are its content."""


@dataclass
class Incoming:
    """``tell`` hears of what is left out, and why: devices, sockets, what the caller may not read."""

    writer: Sink
    uid: int  # whose files are root's inside; root's volumes keep every number
    gid: int
    tell: Tell
    base: list[tuple[bytes, Known]] = field(default_factory=list)  # of volumes that may be written
    _names: dict[tuple[int, int], bytes] = field(default_factory=dict)  # of files that have several
    _keeps: bool = True

    def add(self, name: bytes, source: int, read_only: bool) -> None:
        """The volume behind the O_PATH descriptor ``source``, as ``name``. Raises what opening it raises."""
        self._keeps = not read_only
        st = os.fstat(source)
        if stat.S_ISDIR(st.st_mode):
            self._put(name, st)
            self._walk(name, os.open(".", _OPEN | os.O_DIRECTORY, dir_fd=source))
        elif stat.S_ISREG(st.st_mode):
            fd = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._put(name, st, fd)
            finally:
                os.close(fd)
        else:
            raise OSError(0, "it is neither a directory nor a file")

    def _walk(self, top: bytes, fd: int) -> None:
        """By a stack of open directories: how deep it may be is not Python's to say."""
        levels = [(top, fd, _listed(fd))]
        try:
            while levels:
                path, fd, names = levels[-1]
                name = next(names, None)
                if name is None:
                    levels.pop()
                    os.close(fd)
                    continue
                inner = self._visit(fd, name, path + b"/" + name, len(levels))
                if inner >= 0:
                    levels.append((path + b"/" + name, inner, _listed(inner)))
        finally:
            for _, fd, _ in levels:
                os.close(fd)

    def _visit(self, dir_fd: int, name: bytes, path: bytes, depth: int) -> int:
        """Add it; for a directory, a descriptor to walk through it."""
        try:
            return self._visit_kind(dir_fd, name, path, depth)
        except OSError as error:
            self._leave_out(path, error.strerror or str(error))
            return -1

    def _visit_kind(self, dir_fd: int, name: bytes, path: bytes, depth: int) -> int:
        st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        kind = _KINDS.get(stat.S_IFMT(st.st_mode))
        if kind is None or len(path) > NAME_MAX or depth >= DEPTH_MAX:
            why = "a device or a socket" if kind is None else "its name is too long, or it is too deep"
            self._leave_out(path, why)
        elif kind == SYMLINK:
            self._put(path, st, target=os.readlink(name, dir_fd=dir_fd))
        elif kind == FIFO:
            self._put(path, st)
        else:
            fd = os.open(name, _OPEN, dir_fd=dir_fd)
            try:
                st = os.fstat(fd)  # what is there now, whatever was there before
                if _KINDS.get(stat.S_IFMT(st.st_mode)) != kind:
                    raise OSError(0, "it changed meanwhile")
                self._put(path, st, fd)
            except BaseException:
                os.close(fd)
                raise
            if kind == DIRECTORY:
                return fd
            os.close(fd)
        return -1

    def _put(self, path: bytes, st: os.stat_result, fd: int = -1, target: bytes = b"") -> None:
        kind = _KINDS[stat.S_IFMT(st.st_mode)]
        if kind != DIRECTORY and st.st_nlink > 1:
            first = self._names.setdefault((st.st_dev, st.st_ino), path)
            # Not across volumes: outside they may be of different file systems.
            if first != path and first.split(b"/", 1)[0] == path.split(b"/", 1)[0]:
                kind, target = LINK, first
        entry = Entry(
            kind,
            path,
            target,
            st.st_size if kind == FILE else 0,
            st.st_mtime_ns,
            stat.S_IMODE(st.st_mode),
            self._inside(st.st_uid, self.uid),
            self._inside(st.st_gid, self.gid),
        )
        self.writer.add(entry, fd)
        if self._keeps:
            self.base.append((path, known(entry)))

    def _inside(self, number: int, theirs: int) -> int:
        if self.uid == 0:
            return number
        return 0 if number == theirs else NOBODY

    def _leave_out(self, path: bytes, why: str) -> None:
        self.tell(path, why)
        if self._keeps:
            self.base.append((path, Known(LEFT_OUT)))


def _listed(fd: int) -> Iterator[bytes]:
    return iter(sorted(os.fsencode(name) for name in os.listdir(fd)))
