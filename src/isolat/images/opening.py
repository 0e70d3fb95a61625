"""The bytes of an archive from a stranger, whatever compresses them: what opens the compression is confined.

Plain archives are read where they are wanted. A compressed one goes through a process that has its descriptor, a pipe
to write to, and nothing else (linux/lockdown.py), because decompressors are C that reads a stranger's bytes. One that
is taken over can hand on whatever it likes, which is no more than an archive may hold anyway.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from isolat.errors import InvalidImage, StoreError, Unsupported, UsageError
from isolat.images.flatten import inflate
from isolat.images.flatten.bad import Bad
from isolat.linux import child, lockdown

More = Callable[[], bytes]  # the next bytes, empty at the end

HEAD_BYTES = 8
_READ_BYTES = 256 << 10
_POLL_MS = 500
_TOLD_BYTES = 4096
_MEMORY_BYTES = 1 << 30
_LZMA_BYTES = 256 << 20  # xz -9 needs 65 MiB
_CPU_S = 3600
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}  # what archives may be, and layers may not
_START = "import sys; sys.path[:0] = sys.argv[1].split(':'); from isolat.images.opening import main; main()"
_SOURCE = str(Path(__file__).resolve().parents[2])


def never() -> bool:
    """The caller that never hangs up."""
    return False


def invalid(bad: Bad, what: str) -> InvalidImage | Unsupported:
    """What the readers of archives found wrong, as an error of the tree, with a stage that is promised."""
    if bad.stage == "no-zstd":
        return Unsupported(str(bad), hint="pip install zstandard, or apt-get install python3-zstandard")
    kept = ("truncated", "too-large", "too-many-entries", "bad-compression")
    return InvalidImage(f"{what}: {bad.what}", stage=bad.stage if bad.stage in kept else "bad-archive")


@contextlib.contextmanager
def opened(descriptor: int, what: str, gone: Callable[[], bool] = never) -> Iterator[More]:
    """The uncompressed bytes of a file, pipe or socket. ``gone``: nobody waits for it any more.

    Raises UsageError for another kind of descriptor; ``More`` raises InvalidImage (bad-compression, truncated),
    StoreError where it can't be read, ConnectionResetError once the caller has gone.
    """
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise UsageError(f"{what} is neither a file nor a pipe")
    head = b""
    while len(head) < HEAD_BYTES and (more := _read(descriptor, HEAD_BYTES - len(head), gone)):
        head += more
    try:
        kind = _kind(head)
    except Bad as bad:
        raise invalid(bad, what) from None
    if kind == "tar":
        yield _Plain(descriptor, head, gone)
    else:
        with _Unpacked(descriptor, head, kind, what, gone) as unpacked:
            yield unpacked


def _kind(head: bytes) -> str:
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            return name
    return inflate.kind_of(head)


def _read(descriptor: int, most: int, gone: Callable[[], bool]) -> bytes:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not poll.poll(_POLL_MS):
        if gone():
            raise ConnectionResetError("the caller has gone")
    try:
        return os.read(descriptor, most)
    except OSError as error:
        raise StoreError(
            f"the archive can't be read: {error.strerror}", stage="read", errno=error.errno or 0
        ) from error


class _Plain:
    def __init__(self, descriptor: int, head: bytes, gone: Callable[[], bool]) -> None:
        self._descriptor = descriptor
        self._head = head
        self._gone = gone

    def __call__(self) -> bytes:
        found, self._head = self._head, b""
        return found or _read(self._descriptor, _READ_BYTES, self._gone)


class _Unpacked:
    """One confined process, what it writes, and how it went."""

    def __init__(self, descriptor: int, head: bytes, kind: str, what: str, gone: Callable[[], bool]) -> None:
        from isolat.images.flatten.flattening import packages

        self._what = what
        self._gone = gone
        self._data, data = os.pipe2(os.O_CLOEXEC)
        self._told, tell = os.pipe2(os.O_CLOEXEC)
        job = {"in": descriptor, "out": data, "tell": tell, "head": head.hex(), "kind": kind, "parent": os.getpid()}
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, ":".join((_SOURCE, *packages())), json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child.clean_environment(),
                process_group=0,
                pass_fds=(descriptor, data, tell),
            )
        except OSError as error:
            os.close(self._data)
            os.close(self._told)
            raise StoreError(f"{what}: could not start what opens it: {error.strerror}", stage="open") from error
        finally:
            os.close(data)
            os.close(tell)

    def __enter__(self) -> _Unpacked:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        os.close(self._data)
        os.close(self._told)

    def __call__(self) -> bytes:
        found = _read(self._data, _READ_BYTES, self._gone)
        if not found:
            self._check()
        return found

    def _check(self) -> None:
        """Raise what the process has told; one that ended without a word was killed, by a limit or as an attack."""
        told = os.read(self._told, _TOLD_BYTES)
        try:
            stage, what = json.loads(told)
        except (ValueError, TypeError, RecursionError):
            raise InvalidImage(
                f"{self._what}: opening its compression crashed",
                stage="crashed",
                hint="it may be an attack on what opens it: don't use it",
            ) from None
        if stage == "not-confined":
            raise Unsupported(
                f"{self._what}: {_plain(what)}", hint="run a kernel with seccomp on an x86_64 or aarch64 machine"
            )
        if stage:
            raise invalid(Bad(str(stage), _plain(what)), self._what)


def _plain(told: object) -> str:
    return "".join(char if char.isprintable() else "?" for char in str(told))


# What runs confined


def main() -> None:
    job = json.loads(sys.argv[2])
    stage, what = "", ""
    try:
        _work(job)
    except Bad as bad:
        stage, what = bad.stage, bad.what
    except MemoryError:
        stage, what = "too-large", "it needs more memory than is allowed to be opened"
    except BrokenPipeError:
        pass  # whoever wanted it has enough
    except Exception as error:
        stage, what = "bad-compression", f"{type(error).__name__}: {error}"
    os.write(int(job["tell"]), json.dumps([stage, what[:1000]]).encode())
    os._exit(0)


def _work(job: dict[str, Any]) -> None:
    opener = _opener(str(job["kind"]))
    try:
        lockdown.lock(int(job["parent"]), memory_bytes=_MEMORY_BYTES, file_bytes=0, cpu_s=_CPU_S)
    except OSError as error:
        raise Bad("not-confined", f"the process that opens it could not be confined: {error}") from error
    for piece in opener(_pieces(int(job["in"]), bytes.fromhex(job["head"]))):
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(int(job["out"]), rest) :]


def _pieces(descriptor: int, head: bytes) -> Iterator[bytes]:
    yield head
    while piece := os.read(descriptor, _READ_BYTES):
        yield piece


def _opener(kind: str) -> Callable[[Iterator[bytes]], Iterator[bytes]]:
    """Imported now: once it is locked, the process can't."""
    if kind == "bzip2":
        import bz2

        return lambda pieces: inflate.members(lambda: inflate.Member(bz2.BZ2Decompressor()), pieces)
    if kind == "xz":
        import lzma

        def make() -> inflate.Member:
            return inflate.Member(lzma.LZMADecompressor(lzma.FORMAT_XZ, _LZMA_BYTES))

        return lambda pieces: inflate.members(make, pieces)
    openers = inflate.Openers({kind})
    return lambda pieces: openers.open(kind, pieces)
