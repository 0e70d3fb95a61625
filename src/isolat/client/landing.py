"""An archive from inside, made into files of the caller's: by Docker's rules for where, and by nobody's word for how.

Whoever is inside may write into it what they like. Nothing is reached but by names below one open directory, one part
at a time and through no symbolic link, neither of the archive's nor of anybody's; a further name leads only to what
came in the same archive; nothing becomes set-user-ID or a device. Links are made as they are and followed by nobody
here. What is in the way of a file is replaced, what is a directory stays one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from isolat.errors import CopyFailed, NotFound, UsageError
from isolat.images.flatten.bad import escaped
from isolat.images.flatten.tar import DIRECTORY, FIFO, FILE, LINK, SYMLINK, Entry, Reader

_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MODES, _DIRECTORY_MODES = 0o777, 0o1777
_PART_MAX = 255
_NS = 10**9

Parts = tuple[bytes, ...]


@dataclass(frozen=True)
class Wanted:
    """Where to, and how. ``name``: what it is called inside; ``contents``: of a directory, not itself."""

    target: str
    name: str
    contents: bool = False
    owners: bool = False  # as inside, else the caller's


@dataclass
class Landing:
    """``tell`` hears of what is left out, and why."""

    wanted: Wanted
    tell: Callable[[str], None]
    _root: int = -1  # the directory that everything goes below
    _at: Parts = ()  # where in it the first entry goes
    _place: tuple[Parts, int] = ((), -1)  # of the latest entry, since the next one is mostly beside it
    _late: list[tuple[Parts, Entry]] = field(default_factory=list)
    _made: set[Parts] = field(default_factory=set)  # what further names may be of

    def take(self, reader: Reader) -> None:
        """Everything. Raises CopyFailed, NotFound and UsageError."""
        try:
            top: Parts | None = None
            for entry in reader:
                if top is None:
                    top = _parts(entry.name)
                    self._begin(entry.kind is DIRECTORY)
                    self._put(reader, entry, self._at, top)
                else:
                    self._put(reader, entry, self._below(top, entry.name), top)
            for parts, entry in reversed(self._late):
                with _told(parts):
                    fd = os.open(parts[-1], _OPEN, dir_fd=self._opened(parts[:-1]))
                    self._dress(fd, entry, _DIRECTORY_MODES)
            if top is None:
                raise CopyFailed("nothing came from inside")
        finally:
            for fd in (self._place[1], self._root):
                if fd >= 0:
                    os.close(fd)

    # where

    def _begin(self, directory: bool) -> None:
        target, name = self.wanted.target, os.fsencode(self.wanted.name)
        found = _stat(target)
        if found is not None and stat.S_ISDIR(found.st_mode):
            self._root = _directory(target)
            self._at = () if directory and self.wanted.contents else (_part(name),)
            return
        if found is not None and directory:
            raise UsageError(f"{target}: a directory can't be copied to a file")
        if found is None and target.endswith("/") and not directory:
            raise NotFound(f"{target}: there is no such directory")
        if found is not None and (target.endswith("/") or not stat.S_ISREG(found.st_mode)):
            raise UsageError(f"{target} is {'no directory' if target.endswith('/') else 'neither file nor directory'}")
        at, name = os.path.split(
            os.fsencode(os.path.realpath(target))
        )  # a link of the caller's own leads where it does
        self._root, self._at = _directory(os.fsdecode(at)), (_part(name),)

    def _below(self, top: Parts, name: bytes) -> Parts:
        parts = _parts(name)
        if len(parts) <= len(top) or parts[: len(top)] != top:
            raise CopyFailed(f"{escaped(name)} came from inside, and is not in what is copied")
        return (*self._at, *parts[len(top) :])

    def _walk(self, parts: Parts) -> int:
        """A new descriptor of the directory of these parts, which is there."""
        fd = os.open(".", _PLACE, dir_fd=self._root)
        for part in parts:
            try:
                inner = os.open(part, _PLACE, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return fd

    def _opened(self, parts: Parts) -> int:
        """The same, kept open until another one is asked for."""
        if self._place[1] < 0 or self._place[0] != parts:
            fd = self._walk(parts)
            if self._place[1] >= 0:
                os.close(self._place[1])
            self._place = (parts, fd)
        return self._place[1]

    # what

    def _put(self, reader: Reader, entry: Entry, parts: Parts, top: Parts) -> None:
        if not parts:
            return  # the caller's own directory stays as it is
        with _told(parts):
            at = self._opened(parts[:-1])
            if entry.kind is DIRECTORY:
                self._make_directory(entry, parts, at)
                return
            make = self._maker(reader, entry, at, top)
            if make is None:
                self.tell(f"{_shown(parts)}: it is a device")
                return
            _replace(at, parts[-1], make)
            self._made.add(parts)

    def _make_directory(self, entry: Entry, parts: Parts, at: int) -> None:
        try:
            os.mkdir(parts[-1], 0o700, dir_fd=at)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(parts[-1], dir_fd=at).st_mode):
                raise
        self._late.append((parts, entry))

    def _maker(self, reader: Reader, entry: Entry, at: int, top: Parts) -> Callable[[bytes], None] | None:
        if entry.kind is FILE:
            return lambda name: self._file(reader, entry, at, name)
        if entry.kind is LINK:
            return lambda name: self._link(entry, at, name, top)
        if entry.kind in (SYMLINK, FIFO):
            return lambda name: self._node(entry, at, name)
        return None

    def _file(self, reader: Reader, entry: Entry, at: int, name: bytes) -> None:
        fd = os.open(name, _NEW, 0o600, dir_fd=at)
        try:
            try:
                for offset, length in entry.segments if entry.segments is not None else [(0, entry.size)]:
                    _fill(reader, fd, offset, length)
                os.ftruncate(fd, entry.size)
            except BaseException:
                os.close(fd)
                raise
            self._dress(fd, entry, _MODES)
        except BaseException:
            os.unlink(name, dir_fd=at)
            raise

    def _link(self, entry: Entry, at: int, name: bytes, top: Parts) -> None:
        first = self._below(top, entry.link)
        if first not in self._made:
            raise CopyFailed(f"{escaped(entry.name)} is a further name of {escaped(entry.link)}, which did not come")
        there = self._walk(first[:-1])
        try:
            os.link(first[-1], name, src_dir_fd=there, dst_dir_fd=at, follow_symlinks=False)
        finally:
            os.close(there)

    def _node(self, entry: Entry, at: int, name: bytes) -> None:
        if entry.kind is SYMLINK:
            os.symlink(entry.link, name, dir_fd=at)
        else:
            os.mkfifo(name, entry.mode & _MODES, dir_fd=at)
        if self.wanted.owners:
            os.chown(name, entry.uid, entry.gid, dir_fd=at, follow_symlinks=False)
        os.utime(name, ns=_times(entry), dir_fd=at, follow_symlinks=False)

    def _dress(self, fd: int, entry: Entry, modes: int) -> None:
        """Owner, mode and time of what is open, which is closed."""
        try:
            if self.wanted.owners:
                os.fchown(fd, entry.uid, entry.gid)
            os.fchmod(fd, entry.mode & modes)
            os.utime(fd, ns=_times(entry))
        finally:
            os.close(fd)


@contextlib.contextmanager
def _told(parts: Parts) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        number = (error.errno if isinstance(error, OSError) else 0) or 0
        raise CopyFailed(f"{_shown(parts)} can't be made: {why}", errno=number) from error


def _shown(parts: Parts) -> str:
    return escaped(b"/".join(parts))


def _replace(at: int, name: bytes, make: Callable[[bytes], None]) -> None:
    """Whole or not at all, where something is there; a directory stays."""
    try:
        found: os.stat_result | None = os.lstat(name, dir_fd=at)
    except FileNotFoundError:
        found = None
    if found is None:
        make(name)
        return
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(21, "a directory is there", os.fsdecode(name))
    beside = b".isolat-" + secrets.token_hex(8).encode()
    try:
        make(beside)
        os.rename(beside, name, src_dir_fd=at, dst_dir_fd=at)
    finally:
        # Still there also where both were names of one file already: rename(2) then does nothing.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside, dir_fd=at)


def _fill(reader: Reader, fd: int, offset: int, length: int) -> None:
    for piece in reader.data(length):
        view = piece
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done


def _times(entry: Entry) -> tuple[int, int]:
    ns = entry.mtime_s * _NS + entry.mtime_ns
    return ns, ns


def _parts(name: bytes) -> Parts:
    return tuple(_part(part) for part in name.rstrip(b"/").split(b"/"))


def _part(name: bytes) -> bytes:
    if name in (b"", b".", b"..") or len(name) > _PART_MAX or b"\0" in name:
        raise CopyFailed(f"{escaped(name) or 'nothing'} is no name for a file")
    return name


def _stat(path: str) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be looked at: {getattr(error, 'strerror', None) or error}") from error


def _directory(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such directory") from None
    except OSError as error:
        raise UsageError(f"{path} can't be opened: {error.strerror}") from error
