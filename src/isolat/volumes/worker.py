"""Carry volumes one way, as the caller they are of. A program: ``python -I -S worker.py in|out OPTION…``

It is given open descriptors and opens nothing by path, but for what nobody holds open any more. Before it looks at
anything it gives up what it does not need: it dies with whoever started it (PR_SET_PDEATHSIG), has no network and no
further privileges, and is the caller with none of its groups, as the inside of a container is: what the caller may not
read is not read for them, and what they may not write is not written.

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
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # -I leaves out where this is

from isolat.volumes import base
from isolat.volumes.archive import Damaged, Reader, Writer
from isolat.volumes.incoming import Incoming
from isolat.volumes.outgoing import Outgoing

LEFT_MAX = 1000  # told of; a machine could otherwise fill the daemon's memory
FAILED = 3
_MEMORY_BYTES = 2 << 30
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWIPC, _CLONE_NEWNET = 0x08000000, 0x40000000

_told = 0


def main() -> int:
    asked = _arguments()
    _confine(asked.uid, asked.gid)
    try:
        (_in if asked.way == "in" else _out)(asked)
    except Damaged as error:
        return _failed(f"the archive can't be used: {error}")
    except (OSError, MemoryError) as error:
        return _failed(str(getattr(error, "strerror", None) or error or "out of memory"))
    except Refused as error:
        return _failed(str(error))
    return 0


class Refused(Exception):
    pass


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("in", "out"))
    for name in ("uid", "gid", "archive", "base", "limit"):
        parser.add_argument(f"--{name}", type=int, default=-1)
    parser.add_argument("--beside", default="")
    parser.add_argument("--volume", action="append", default=[])  # NAME:DESCRIPTOR:ro|rw
    parser.add_argument("--reopen", action="append", default=[], nargs=2)  # NAME PATH
    return parser.parse_args()


def _confine(uid: int, gid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getppid()
    if os.geteuid() == 0:
        libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after the change of user, which clears it
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("whoever started this is gone")
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    os.umask(0)


def _volumes(asked: argparse.Namespace) -> list[tuple[bytes, int, bool]]:
    parts = [text.split(":") for text in asked.volume]
    return [(os.fsencode(name), int(fd), mode == "ro") for name, fd, mode in parts]


def _in(asked: argparse.Namespace) -> None:
    writer = Writer(asked.archive, asked.limit)
    incoming = Incoming(writer, asked.uid, asked.gid, _tell)
    for name, fd, read_only in _volumes(asked):
        incoming.add(name, fd, read_only)
    writer.finish()
    if not writer.fits:
        raise Refused(f"they take {_mib(writer.offset)} MiB, and the environment's disk has {_mib(asked.limit)} MiB")
    base.write(asked.base, {os.fsdecode(name): _identity(fd) for name, fd, _ in _volumes(asked)}, incoming.base)


def _out(asked: argparse.Namespace) -> None:
    if not Reader(asked.archive).finished():
        raise Damaged("it is not finished")
    sources, known = base.read(asked.base)
    volumes = {name: fd for name, fd, _ in _volumes(asked)}
    volumes |= {os.fsencode(name): _reopened(path, sources[name]) for name, path in asked.reopen}
    beside = os.fsencode(asked.beside)
    Outgoing(asked.archive, known, volumes, os.geteuid() == 0, beside, _tell).carry_out()


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
