"""What an environment has written, read from its directory: records with time and stream, over rotated files.

The daemon gives the directory's descriptor and is not needed any more, so following goes on when it dies. The keeper
appends whole records and rotates by rename (docs/protocol.md); a reader recognises a file by its inode.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

HEADER_BYTES = 16
MAX_RECORD_BYTES = 1 << 24
STREAMS = {1: "stdout", 2: "stderr"}
_READ_BYTES = 1 << 20
_POLL_S = 0.1
_WAIT_S = 0.5


@dataclass(frozen=True)
class LogRecord:
    """What was written at one moment: bytes as they came, not lines."""

    time_ns: int
    stream: str
    data: bytes


def read(
    directory: int, *, follow: bool = False, ended: int = -1, lines: int | None = None, since_ns: int = 0
) -> Iterator[LogRecord]:
    """The records, oldest first: not older than ``since_ns``, and of those the last ``lines`` lines.

    With ``follow`` it goes on until the environment has ended. ``ended`` is a descriptor that becomes readable at
    that end; without it, only the exit record tells.
    """
    watcher = _Watcher(directory, ended) if follow else None
    try:
        found = (r for r in _read(directory, watcher) if r is None or r.time_ns >= since_ns)
        if lines is not None:
            yield from tail(iter(lambda: next(found, None), None), lines)  # until it would wait for the first time
        for record in found:
            if record is not None:
                yield record
    finally:
        if watcher is not None:
            watcher.close()


def _read(directory: int, watcher: _Watcher | None) -> Iterator[LogRecord | None]:
    """Records, and None whenever everything that is there has been read and more is waited for."""
    done = None  # the inode of the file that was read last
    while True:
        over = watcher is not None and watcher.over  # asked before looking, so that nothing is missed
        files = _files(directory)
        inodes = [inode for _, inode in files]
        # A file that was rotated away was older than all that are left.
        behind = files[inodes.index(done) + 1 :] if done is not None and done in inodes else files
        for name, inode in behind:
            fd = _open(directory, name, inode)
            if fd < 0:
                break
            try:
                yield from _file(directory, fd, inode, watcher)
            finally:
                os.close(fd)
            done = inode
        else:
            if watcher is None or (over and not behind):
                return
            if not behind:
                yield None
                watcher.wait()


def _open(directory: int, name: str, inode: int) -> int:
    """The file, or -1 when it was rotated since it was listed."""
    try:
        fd = os.open(f"log/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return -1
    if os.fstat(fd).st_ino == inode:
        return fd
    os.close(fd)
    return -1


def _file(directory: int, fd: int, inode: int, watcher: _Watcher | None) -> Iterator[LogRecord | None]:
    """The records of one file: as far as it goes now, or followed while it is the newest."""
    left = os.fstat(fd).st_size
    rest = bytearray()
    while True:
        over = watcher is None or watcher.over
        newest = _inode(directory, "log/0") == inode
        data = os.read(fd, _READ_BYTES if watcher else min(left, _READ_BYTES))
        left -= len(data)
        rest += data
        yield from take(rest)
        if data:
            continue
        if over or not newest:
            return
        assert watcher is not None
        yield None
        watcher.wait()


def take(data: bytearray) -> Iterator[LogRecord]:
    """The whole records at the beginning of ``data``, which are removed from it."""
    at = 0
    while len(data) - at >= HEADER_BYTES:
        length = int.from_bytes(data[at + 8 : at + 12], "little")
        end = at + HEADER_BYTES + length
        if length > MAX_RECORD_BYTES:  # damaged: nothing behind it can be understood
            at = len(data)
            break
        if end > len(data):
            break
        stream = STREAMS.get(data[at + 12], "stdout")
        yield LogRecord(int.from_bytes(data[at : at + 8], "little"), stream, bytes(data[at + HEADER_BYTES : end]))
        at = end
    del data[:at]


def _inode(directory: int, name: str) -> int | None:
    try:
        return os.stat(name, dir_fd=directory).st_ino
    except OSError:
        return None


def _files(directory: int) -> list[tuple[str, int]]:
    """Name and inode of the log's files, oldest first. Looked at twice: a rotation in between could hide one."""
    found = _list(directory)
    while found != (found := _list(directory)):
        pass
    return found


def _list(directory: int) -> list[tuple[str, int]]:
    try:
        fd = os.open("log", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return []
    try:
        listed = os.listdir(fd)  # noqa: PTH208  pathlib cannot list a descriptor
    finally:
        os.close(fd)
    names = sorted((name for name in listed if name.isdecimal()), key=int, reverse=True)
    found = [(name, _inode(directory, f"log/{name}")) for name in names]
    return [(name, inode) for name, inode in found if inode is not None]


def tail(found: Iterable[LogRecord], lines: int) -> list[LogRecord]:
    """The last ``lines`` lines, whatever stream they are of. An unfinished last line counts."""
    kept: deque[LogRecord] = deque()
    seen = 0
    for record in found:
        kept.append(record)
        seen += record.data.count(b"\n")
        while seen - kept[0].data.count(b"\n") > lines:
            seen -= kept.popleft().data.count(b"\n")
    return _cut(kept, lines)


def _cut(kept: deque[LogRecord], lines: int) -> list[LogRecord]:
    found: deque[LogRecord] = deque()
    left = lines
    last = True  # the final newline ends a line and begins none
    while kept and lines:
        record = kept.pop()
        at = len(record.data)
        while True:
            end = at - 1 if last and record.data.endswith(b"\n") and at == len(record.data) else at
            last = False if record.data else last
            at = record.data.rfind(b"\n", 0, end)
            if at < 0:
                break
            left -= 1
            if not left:
                if record.data[at + 1 :]:
                    found.appendleft(replace(record, data=record.data[at + 1 :]))
                return list(found)
        found.appendleft(record)
    return list(found)


class _Watcher:
    """Waits until something is written, rotated, or over: by inotify(7), else by looking now and then."""

    def __init__(self, directory: int, ended: int) -> None:
        self._directory = directory
        self._ended = ended
        self._over = False
        self._inotify = _Inotify(f"/proc/self/fd/{directory}")

    @property
    def over(self) -> bool:
        """The environment has ended: its exit record is there, its directory gone, or ``ended`` says so."""
        if not self._over and self._ended >= 0:
            poll = select.poll()
            poll.register(self._ended, select.POLLIN)
            self._over = bool(poll.poll(0))
        if not self._over:
            gone = os.fstat(self._directory).st_nlink == 0
            self._over = gone or _inode(self._directory, "exit.json") is not None
        return self._over

    def wait(self) -> None:
        if self._inotify.fd < 0:
            time.sleep(_POLL_S)
            return
        if self._inotify.add("log"):
            return  # something may have been written before it was watched
        poll = select.poll()
        poll.register(self._inotify.fd, select.POLLIN)
        if self._ended >= 0 and not self._over:
            poll.register(self._ended, select.POLLIN)
        for fd, _ in poll.poll(_WAIT_S * 1000):
            if fd == self._inotify.fd:
                os.read(fd, 65536)

    def close(self) -> None:
        self._inotify.close()


class _Inotify:
    """inotify on a directory and one of its subdirectories, which may come later."""

    MODIFY, MOVED_TO, CREATE, DELETE = 0x2, 0x80, 0x100, 0x200

    def __init__(self, path: str) -> None:
        self._path = path
        self._watched: set[str] = set()
        self.fd = -1
        try:
            import ctypes

            self._libc = ctypes.CDLL(None, use_errno=True)
            self.fd = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ImportError, AttributeError):
            return
        self.add(".")

    def add(self, name: str) -> bool:
        """Watch this directory too. True when it was not watched before and is now."""
        if self.fd < 0 or name in self._watched:
            return False
        mask = self.MODIFY | self.MOVED_TO | self.CREATE | self.DELETE
        if self._libc.inotify_add_watch(self.fd, f"{self._path}/{name}".encode(), mask) < 0:
            return False
        self._watched.add(name)
        return True

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
