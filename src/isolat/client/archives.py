"""Archives of images, opened with the caller's rights: the daemon gets a descriptor and no path.

A file is handed on as it is. What is no file (a pipe, a terminal, a socket) is pumped through a pipe of ours: its other
end closes with this process, so the daemon never waits for somebody who has gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Iterator

from isolat.errors import IsolatError, StoreError, UsageError

STANDARD = "-"
_CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def source(path: str) -> Iterator[int]:
    """A descriptor to read the archive from; ``-`` is standard input. Raises UsageError."""
    _check(path)
    try:
        descriptor = os.dup(0) if path == STANDARD else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{path} can't be opened: {error.strerror}") from error
    try:
        if os.isatty(descriptor):
            raise UsageError("an archive does not come from a terminal", hint="name a file, or redirect standard input")
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise UsageError(f"{path} is a directory, and no archive")
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            yield descriptor
            return
        reading, writing = os.pipe2(os.O_CLOEXEC)
        _begin(os.dup(descriptor), writing)
        try:
            yield reading
        finally:
            os.close(reading)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def target(path: str) -> Iterator[int]:
    """A descriptor to write the archive to; ``-`` is standard output. A file is there whole or not at all.

    A new file is its owner's alone, because an image may hold secrets; one that was there keeps its mode.

    Raises UsageError, and StoreError where what is no file can't be written to.
    """
    _check(path)
    if path != STANDARD and (not os.path.lexists(path) or os.path.isfile(path)):  # noqa: PTH113
        yield from _file(path)
        return
    try:
        descriptor = os.dup(1) if path == STANDARD else os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from error
    try:
        if os.isatty(descriptor):
            raise UsageError("an archive is not written to a terminal", hint="name a file with -o, or redirect")
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            yield descriptor
            return
        yield from _pumped(descriptor, path)
    finally:
        os.close(descriptor)


def _check(path: str) -> None:
    if not path:
        raise UsageError("the archive's name is empty", hint=f"name a file; {STANDARD} is the standard stream")


def _file(path: str) -> Iterator[int]:
    path = os.path.realpath(path)  # what a link leads to is replaced, not the link
    making = f"{path}.{secrets.token_hex(4)}.part"
    try:
        descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from error
    try:
        _like(path, descriptor)
        yield descriptor
        os.rename(making, path)  # noqa: PTH104
    except BaseException:
        os.unlink(making)  # noqa: PTH108
        raise
    finally:
        os.close(descriptor)


def _like(path: str, descriptor: int) -> None:
    """Give the new file the owner and the mode of the one that it replaces, as far as the caller may."""
    try:
        old = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return
    with contextlib.suppress(PermissionError):
        os.fchown(descriptor, old.st_uid, old.st_gid)
    new = os.fstat(descriptor)
    # Where the owners are others than before, they don't get the rights of those
    group = 0o070 if new.st_gid == old.st_gid else 0
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode) & (0o707 | group))


def _pumped(descriptor: int, path: str) -> Iterator[int]:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pump = _begin(reading, os.dup(descriptor))
    failed: Exception | None = None
    try:
        yield writing
    except (IsolatError, OSError) as error:
        failed = error  # it may be but a consequence
    finally:
        os.close(writing)  # the last one, once the daemon has closed its own
        pump.join()
    if pump.error is not None and pump.error.errno != errno.EPIPE:
        where = "standard output" if path == STANDARD else path
        raise StoreError(
            f"{where} can't be written: {pump.error.strerror}", stage="write", errno=pump.error.errno or 0
        ) from pump.error
    if failed is not None:
        raise failed
    if pump.error is not None:
        raise pump.error


def _begin(reading: int, writing: int) -> _Pump:
    pump = _Pump(reading, writing)
    pump.start()
    return pump


class _Pump(threading.Thread):
    """Everything from one descriptor to the other; both are closed at the end."""

    def __init__(self, reading: int, writing: int) -> None:
        super().__init__(daemon=True)
        self._reading = reading
        self._writing = writing
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            with open(self._writing, "wb", buffering=0) as out, open(self._reading, "rb", buffering=0) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[out.write(rest) :]
        except OSError as error:
            self.error = error
