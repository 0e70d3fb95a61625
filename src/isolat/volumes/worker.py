"""Carry volumes one way, as those they are of. A program: ``python -I -S worker.py in|out|seed OPTION…``

It is given open descriptors and opens nothing by path, but for what nobody holds open any more. Before it looks at
anything it gives up what it does not need: it dies with whoever started it (PR_SET_PDEATHSIG), has no network and no
further privileges. Named volumes are first, as root: their owners are those of the inside. Then it is the caller with
none of its groups, as the inside of a container is: what the caller may not read is not read for them, and what they
may not write is not written.

``seed`` puts what an image has at a volume's place into the volume, which is empty.

It writes lines of JSON: ``{"left": PATH, "why": WHY}`` for each thing that was not carried, ``{"failed": WHY}`` last
where nothing was.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # -I leaves out where this is

from isolat.volumes import base
from isolat.volumes.archive import Damaged, Reader, Writer
from isolat.volumes.incoming import Incoming
from isolat.volumes.outgoing import Outgoing, TooMuch
from isolat.volumes.planting import Full, Planter

LEFT_MAX = 1000  # told of; a machine could otherwise fill the daemon's memory
FAILED = 3
_MEMORY_BYTES = 2 << 30
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWIPC, _CLONE_NEWNET = 0x08000000, 0x40000000

_told = 0


def main() -> int:
    asked = _arguments()
    _confine()
    try:
        {"in": _in, "out": _out, "seed": _seed}[asked.way](asked)
    except Damaged as error:
        return _failed(f"the archive can't be used: {error}")
    except (OSError, MemoryError) as error:
        return _failed(str(getattr(error, "strerror", None) or error or "out of memory"))
    except (Refused, TooMuch, Full) as error:
        return _failed(str(error))
    return 0


class Refused(Exception):
    pass


@dataclass(frozen=True)
class _Volume:
    name: bytes
    fd: int
    read_only: bool
    named: bool
    room: int  # bytes that there is still room for; -1: nobody bounds it


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("in", "out", "seed"))
    for name in ("uid", "gid", "archive", "base", "limit", "target"):
        parser.add_argument(f"--{name}", type=int, default=-1)
    parser.add_argument("--beside", default="")
    parser.add_argument("--volume", action="append", default=[], type=_volume)
    parser.add_argument("--reopen", action="append", default=[], nargs=2)  # NAME PATH
    return parser.parse_args()


def _volume(text: str) -> _Volume:
    """``NAME:DESCRIPTOR:ro|rw:given|named:ROOM``"""
    name, fd, mode, whose, room = text.split(":")
    return _Volume(os.fsencode(name), int(fd), mode == "ro", whose == "named", int(room))


def _confine() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC)
        os.setgroups([])
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _die_with(os.getppid())
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    os.umask(0)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("whoever started this is gone")


def _become(uid: int, gid: int) -> None:
    if os.geteuid() != 0 or uid == 0:
        return
    parent = os.getppid()
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _die_with(parent)  # the change of user has cleared it


def _passes(asked: argparse.Namespace) -> Iterator[tuple[list[_Volume], bool]]:
    """The volumes, and whether they are named ones: those first, since rights that are given up do not come back."""
    named = [volume for volume in asked.volume if volume.named]
    if named:
        yield named, True
    _become(asked.uid, asked.gid)
    yield [volume for volume in asked.volume if not volume.named], False


def _in(asked: argparse.Namespace) -> None:
    writer = Writer(asked.archive, asked.limit)
    rows = []
    for volumes, named in _passes(asked):
        incoming = Incoming(writer, 0 if named else asked.uid, 0 if named else asked.gid, _tell)
        for volume in volumes:
            incoming.add(volume.name, volume.fd, volume.read_only)
        rows += incoming.base
    writer.finish()
    if not writer.fits:
        raise Refused(f"they take {_mib(writer.offset)} MiB, and the environment's disk has {_mib(asked.limit)} MiB")
    base.write(asked.base, {os.fsdecode(volume.name): _identity(volume.fd) for volume in asked.volume}, rows)


def _out(asked: argparse.Namespace) -> None:
    if not Reader(asked.archive).finished():
        raise Damaged("it is not finished")
    sources, known = base.read(asked.base)
    beside = os.fsencode(asked.beside)
    for volumes, named in _passes(asked):
        fds = {volume.name: volume.fd for volume in volumes}
        if not named:
            fds |= {os.fsencode(name): _reopened(path, sources[name]) for name, path in asked.reopen}
        theirs = {path: one for path, one in known.items() if path.split(b"/", 1)[0] in fds}
        outgoing = Outgoing(asked.archive, theirs, fds, os.geteuid() == 0, beside, _tell)
        outgoing.check_room({volume.name: volume.room for volume in volumes if volume.room >= 0})
        outgoing.carry_out()


def _seed(asked: argparse.Namespace) -> None:
    (source,) = asked.volume
    planter = Planter(asked.target)
    Incoming(planter, 0, 0, _tell).add(source.name, source.fd, read_only=True)
    planter.finish()


def _identity(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


def _reopened(path: str, was: tuple[int, int]) -> int:
    """The only path that is ever opened, by the caller's rights: and it must lead to what it led to before."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"{path} can't be opened again: {error.strerror}") from error
    if _identity(fd) != was:
        raise Refused(f"{path} is no longer what it was")
    return fd


def _mib(count: int) -> int:
    return -(-count // (1 << 20))


def _tell(path: bytes, why: str) -> None:
    global _told
    _told += 1
    if _told <= LEFT_MAX:
        _say({"left": os.fsdecode(path), "why": why})


def _failed(why: str) -> int:
    _say({"failed": why})
    return FAILED


def _say(what: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    sys.exit(main())
