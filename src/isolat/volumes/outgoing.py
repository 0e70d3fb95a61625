"""What a machine has changed in its volumes, carried back: new and changed files put in place whole, lost ones removed.

The archive is hostile. Nothing is reached but by names below the volume's open directory, one part at a time and
through no symbolic link; nothing becomes set-user-ID; there are no devices. What is in the way stays, and is told.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from isolat.volumes.archive import DIRECTORY, FIFO, FILE, LINK, SYMLINK, Damaged, Entry, Reader, copy_data, data_bytes
from isolat.volumes.base import LEFT_OUT, Known, known
from isolat.volumes.below import parent

_PART_MAX = 255
_MODES = 0o1777
_NAME_BYTES = 1024  # about what a file system keeps of each file beside its data
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TYPES = {FILE: stat.S_IFREG, LINK: stat.S_IFREG, DIRECTORY: stat.S_IFDIR, SYMLINK: stat.S_IFLNK, FIFO: stat.S_IFIFO}

# Not one file's matter: no more can be done, and what is left to do must not be forgotten.
_OF_THE_WHOLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENOMEM})

Tell = Callable[[bytes, str], None]


class InTheWay(Exception):
    """Why one entry is not carried out."""


class TooMuch(Exception):
    """What a volume would then hold is more than it may."""


@dataclass
class Outgoing:
    """``volumes``: name to O_PATH descriptor. ``beside``: a name that nothing of anybody has. ``tell``: see above."""

    archive: int
    base: Mapping[bytes, Known]
    volumes: Mapping[bytes, int]
    root: bool  # owners are root's to give; anybody else's files are their own
    beside: bytes
    tell: Tell
    _rewritten: set[bytes] = field(default_factory=set)

    def check_room(self, room: Mapping[bytes, int]) -> None:
        """Raises TooMuch where what comes takes so much more than what goes. ``room``: volume to bytes.

        Counted is data, not holes, and something for each name. Counting again after a half of it is done is fine.
        """
        more = dict.fromkeys(room, 0)
        there: dict[bytes, bytes] = {}
        for entry, offset in Reader(self.archive):
            there[entry.path] = entry.kind
            volume = entry.path.split(b"/", 1)[0]
            if volume in more and not entry.same:
                data = data_bytes(self.archive, offset, entry.size) if entry.kind == FILE else 0
                more[volume] += data + _NAME_BYTES - self._taken(entry.path)
        for path, was in self.base.items():
            volume = path.split(b"/", 1)[0]
            if volume in more and was.kind != LEFT_OUT and path not in there:
                more[volume] -= self._taken(path)
        for volume, count in more.items():
            if count > room[volume]:
                name, free = os.fsdecode(volume), max(0, room[volume]) >> 20
                raise TooMuch(f"{name}: what was written takes {_mib(count)} MiB more, and {free} MiB are left in it")

    def _taken(self, path: bytes) -> int:
        """What is given back when what is at this path goes, or is replaced."""
        if b"/" not in path:
            return _NAME_BYTES
        with contextlib.suppress(OSError, InTheWay), self._parent(path) as (dir_fd, name):
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            data = st.st_blocks * 512 if stat.S_ISREG(st.st_mode) and st.st_nlink == 1 else 0
            return data + _NAME_BYTES
        return 0

    def carry_out(self) -> None:
        """Raises Damaged, before anything is changed, for what is no whole archive of a machine.

        Raises OSError in the middle where there is no room for more, or the volume can't be written at all.
        """
        reader = Reader(self.archive)
        if not reader.finished():
            raise Damaged("it is not finished")
        there = {entry.path: entry.kind for entry, _ in reader}
        self._remove(there)
        for entry, offset in reader:
            if entry.path.split(b"/", 1)[0] in self.volumes:
                self._try(entry.path, lambda e=entry, o=offset: self._put(e, o))  # type: ignore[misc]

    def _try(self, path: bytes, what: Callable[[], None]) -> None:
        try:
            what()
        except (OSError, InTheWay) as error:
            if getattr(error, "errno", 0) in _OF_THE_WHOLE:
                raise
            self.tell(path, getattr(error, "strerror", None) or str(error))

    # what is gone

    def _remove(self, there: Mapping[bytes, bytes]) -> None:
        """What came in and does not go out, or as another kind: the inner before the outer."""
        for path in sorted(self.base, reverse=True):
            was = self.base[path]
            gone = _type(there.get(path)) != _type(was.kind)
            if gone and was.kind != LEFT_OUT and b"/" in path:
                self._try(path, lambda p=path, w=was: self._remove_one(p, w))  # type: ignore[misc]

    def _remove_one(self, path: bytes, was: Known) -> None:
        with contextlib.suppress(FileNotFoundError), self._parent(path) as (dir_fd, name):
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if stat.S_IFMT(st.st_mode) != _TYPES[was.kind] or (was.kind == FILE and _changed(st, was)):
                raise InTheWay("it was changed outside meanwhile, so it stays")
            if was.kind == DIRECTORY:
                os.rmdir(name, dir_fd=dir_fd)
            else:
                os.unlink(name, dir_fd=dir_fd)

    # what is there

    def _put(self, entry: Entry, offset: int) -> None:
        was = self.base.get(entry.path)
        if was is not None and was.kind == LEFT_OUT:
            raise InTheWay("what is there was not copied in, so it stays")
        if entry.same and (was is None or was.kind not in (entry.kind, FILE, LINK)):
            raise InTheWay("it is said to be as it came, and never came")
        if entry.kind == DIRECTORY:
            self._put_directory(entry, was)
        elif not self._unchanged(entry, was):
            self._put_other(entry, offset)

    def _unchanged(self, entry: Entry, was: Known | None) -> bool:
        """A file whose content comes along was touched, even where its size and time are as before."""
        if entry.kind == LINK and entry.target in self._rewritten:
            return False
        return entry.same or (entry.kind != FILE and was == known(entry))

    def _put_directory(self, entry: Entry, was: Known | None) -> None:
        if b"/" not in entry.path:
            if was == known(entry):
                return
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.volumes[entry.path])
            self._dress(fd, entry)
            return
        with self._parent(entry.path) as (dir_fd, name):
            made = False
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=dir_fd)
                made = True
            if made or was != known(entry):
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
                self._dress(fd, entry)

    def _dress(self, fd: int, entry: Entry) -> None:
        """Owner and mode of an open directory, which is closed."""
        try:
            if self.root:
                os.fchown(fd, entry.uid, entry.gid)
            os.fchmod(fd, entry.mode & _MODES)
        finally:
            os.close(fd)

    def _put_other(self, entry: Entry, offset: int) -> None:
        if entry.kind not in _TYPES:
            raise InTheWay("there is no such kind of file")
        if b"/" not in entry.path:
            self._put_whole(entry, offset)
            return
        with self._parent(entry.path) as (dir_fd, name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.beside, dir_fd=dir_fd)  # of one who was killed here
            try:
                self._make(entry, offset, dir_fd)
                os.rename(self.beside, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            finally:
                # Still there also where both were names of one file already: rename(2) then does nothing.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.beside, dir_fd=dir_fd)
        self._rewritten.add(entry.path)

    def _put_whole(self, entry: Entry, offset: int) -> None:
        """A volume that is a file: it has no name of ours, so it is written as it lies there."""
        if entry.kind != FILE or not stat.S_ISREG(os.fstat(self.volumes[entry.path]).st_mode):
            raise InTheWay("a volume stays what it is, a directory or a file")
        fd = os.open(f"/proc/self/fd/{self.volumes[entry.path]}", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            self._fill(fd, entry, offset)
        finally:
            os.close(fd)

    def _fill(self, fd: int, entry: Entry, offset: int) -> None:
        os.ftruncate(fd, entry.size)
        copy_data(self.archive, offset, fd, 0, entry.size)

    def _make(self, entry: Entry, offset: int, dir_fd: int) -> None:
        if entry.kind == FILE:
            fd = os.open(self.beside, _NEW, 0o600, dir_fd=dir_fd)
            try:
                self._fill(fd, entry, offset)
                if self.root:
                    os.fchown(fd, entry.uid, entry.gid)
                os.fchmod(fd, entry.mode & _MODES)
                os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
            finally:
                os.close(fd)
        elif entry.kind == LINK:
            self._link(entry, dir_fd)
        else:
            self._node(entry, dir_fd)

    def _link(self, entry: Entry, dir_fd: int) -> None:
        if entry.target.split(b"/", 1)[0] != entry.path.split(b"/", 1)[0]:
            raise InTheWay("it is a name of a file in another volume")
        with self._parent(entry.target) as (from_fd, name):
            if not stat.S_ISREG(os.stat(name, dir_fd=from_fd, follow_symlinks=False).st_mode):
                raise InTheWay("it is a further name of what is no file")
            os.link(name, self.beside, src_dir_fd=from_fd, dst_dir_fd=dir_fd, follow_symlinks=False)

    def _node(self, entry: Entry, dir_fd: int) -> None:
        if entry.kind == SYMLINK:
            os.symlink(entry.target, self.beside, dir_fd=dir_fd)
        else:
            os.mkfifo(self.beside, entry.mode & 0o777, dir_fd=dir_fd)
        if self.root:
            os.chown(self.beside, entry.uid, entry.gid, dir_fd=dir_fd, follow_symlinks=False)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(self.beside, ns=times, dir_fd=dir_fd, follow_symlinks=False)

    def _parent(self, path: bytes) -> AbstractContextManager[tuple[int, bytes]]:
        """The open directory that the path's last part is in, and that part."""
        volume, *below = path.split(b"/")
        if volume not in self.volumes or not below or not all(map(_part, below)):
            raise InTheWay("this is no name in a volume")
        return parent(self.volumes[volume], below)


def _part(name: bytes) -> bool:
    return name not in (b"", b".", b"..") and len(name) <= _PART_MAX


def _type(kind: bytes | None) -> bytes | None:
    """The first and the further names of a file are of one kind."""
    return FILE if kind == LINK else kind


def _mib(count: int) -> int:
    return -(-count // (1 << 20))


def _changed(st: os.stat_result, was: Known) -> bool:
    return (st.st_size, st.st_mtime_ns) != (was.size, was.mtime_ns)
