"""What the engine calls: volumes into an archive, and an archive back into volumes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isolat.deadline import Deadline
from isolat.errors import StoreError, UsageError
from isolat.linux import child
from isolat.volumes.archive import Reader

ARCHIVE = "volumes.tar"
BASE = "volumes.base"
ALIGN_BYTES = 1 << 20  # a machine reads its disk in larger pieces than an archive has
_STAGE = "volumes"
_WORKER = Path(__file__).resolve().with_name("worker.py")
_TOLD = 5


@dataclass(frozen=True)
class Volume:
    name: str  # in the archive
    fd: int  # of its source, opened by the caller with O_PATH; -1: nobody holds it any more
    read_only: bool = False
    path: str = ""  # where it was: on the way back it is opened again, where it is still the same
    named: bool = False  # its owners are those of the inside: carried as root, whoever the caller is
    room_bytes: int = -1  # how much more may be in it than is; -1: nobody bounds it


@dataclass(frozen=True)
class Owner:
    """Whose volumes they are: everything is done with their rights, and no more."""

    uid: int = 0
    gid: int = 0


def bring_in(path: Path, volumes: Sequence[Volume], owner: Owner, limit_bytes: int, d: Deadline) -> list[str]:
    """Write the archive ``path``, and beside it what the volumes are now. What was left out, in words.

    The file is then as large as the machine may make its own archive, and sparse. Raises UsageError where the volumes
    are larger than ``limit_bytes`` or can't be read, StoreError where the archive can't be written.
    """
    limit = -(-limit_bytes // ALIGN_BYTES) * ALIGN_BYTES
    with contextlib.ExitStack() as opened:
        archive, base = (_open_new(opened, path.with_name(name)) for name in (path.name, BASE))
        try:
            left = _work("in", volumes, owner, archive, base, ["--limit", str(limit)], d)
        except _Refused as error:
            raise UsageError(f"the volumes can't be copied into the machine: {error}", hint="see --disk") from None
        os.ftruncate(archive, limit)
    return left


def take_back(path: Path, volumes: Sequence[Volume], owner: Owner, mark: str, d: Deadline) -> list[str]:
    """Carry what the machine's archive ``path`` says into the volumes. What was left out, in words.

    Doing it again is fine. Raises StoreError where nothing could be carried. ``mark`` is part of a name that files
    have while they are written.
    """
    with contextlib.ExitStack() as opened:
        archive, base = (_open(opened, path.with_name(name), os.O_RDONLY) for name in (path.name, BASE))
        try:
            return _work("out", volumes, owner, archive, base, ["--beside", f".isolat-{mark}.new"], d)
        except _Refused as error:
            raise StoreError(str(error), stage=_STAGE) from None


def seed(source: int, target: int, d: Deadline) -> list[str]:
    """Put everything below the directory ``source`` into ``target``, which is empty. What was left out, in words.

    Both are descriptors, opened with O_PATH. Raises StoreError where not all of it could be made.
    """
    image = _option(Volume("image", source, read_only=True, named=True))
    try:
        return _run("seed", [image], ["--target", str(target)], (source, target), d)
    except _Refused as error:
        raise StoreError(str(error), stage=_STAGE) from None


def is_finished(path: Path) -> bool:
    """Whether the machine has written the whole archive. Nothing but its first block is looked at."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return Reader(file.fileno()).finished()
    return False


def in_words(left: Sequence[str]) -> str:
    """At most a few of them."""
    more = len(left) - _TOLD
    return "; ".join(left[:_TOLD]) + (f"; and {more} more" if more > 0 else "")


class _Refused(Exception):
    pass


def _work(
    way: str, volumes: Sequence[Volume], owner: Owner, archive: int, base: int, options: list[str], d: Deadline
) -> list[str]:
    words = ["--uid", str(owner.uid), "--gid", str(owner.gid), "--archive", str(archive), "--base", str(base)]
    given = [_option(volume) for volume in volumes if volume.fd >= 0]
    for volume in volumes:
        words += [] if volume.fd >= 0 else ["--reopen", volume.name, volume.path]
    fds = (archive, base, *(volume.fd for volume in volumes if volume.fd >= 0))
    return _run(way, given, [*options, *words], fds, d)


def _option(volume: Volume) -> str:
    mode, whose = "ro" if volume.read_only else "rw", "named" if volume.named else "given"
    return f"--volume={volume.name}:{volume.fd}:{mode}:{whose}:{volume.room_bytes}"


def _run(way: str, volumes: Sequence[str], options: Sequence[str], fds: Sequence[int], d: Deadline) -> list[str]:
    argv = [sys.executable, "-I", "-S", str(_WORKER), way, *options, *volumes]
    left: list[str] = []
    failed: list[str] = []

    def take(line: str) -> None:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            said = json.loads(line)
            if "failed" in said:
                failed.append(str(said["failed"]))
            else:
                left.append(f"{said['left']}: {said['why']}")

    try:
        child.run(argv, f"copying volumes {way}", d, on_line=take, pass_fds=fds)
    except StoreError:
        if failed:
            raise _Refused(failed[0]) from None
        raise
    return left


def _open_new(opened: contextlib.ExitStack, path: Path) -> int:
    """Empty: what a former try left is of no use."""
    path.unlink(missing_ok=True)
    return _open(opened, path, os.O_RDWR | os.O_CREAT | os.O_EXCL)


def _open(opened: contextlib.ExitStack, path: Path, flags: int) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", stage=_STAGE, errno=error.errno or 0) from error
    opened.callback(os.close, fd)
    return fd
