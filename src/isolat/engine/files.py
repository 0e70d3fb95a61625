"""``cp`` and ``export``: the daemon introduces, the archive goes between the caller and a program inside.

The program is one of ours and runs as root of the inside (reaching.py); its streams are those of any process, so a
daemon that is killed cuts nothing off that goes to one that runs.
"""

from __future__ import annotations

import contextlib
import posixpath
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from isolat.deadline import Deadline
from isolat.engine import states
from isolat.engine.environment import Environment
from isolat.engine.maker import START_S
from isolat.engine.reaching import Reaching
from isolat.engine.starting import adopt
from isolat.engine.states import Verb
from isolat.engine.supervisor import OPERATION_WAIT_S
from isolat.errors import IsolatError, UsageError
from isolat.layers.common import PATH
from isolat.layers.files import Copier
from isolat.places.base import Command, Io, Place

_END_S = 5.0
_LOOK_AGAIN_S = 0.01
NAME_MAX = 255


@dataclass(frozen=True)
class In:
    """``archive``: one of somebody's own. ``contents``: of the directory that it is of, and not that itself."""

    path: str
    name: str = ""
    archive: bool = False
    contents: bool = False
    owners: bool = False


@dataclass(frozen=True)
class Out:
    """``whole``: the root file system as it is on disk, without what is mounted in it. ``name``: of the first entry."""

    path: str
    name: str
    follow: bool = False
    whole: bool = False


class Files:
    """All of it for one engine."""

    def __init__(self, reaching: Reaching) -> None:
        self._reaching = reaching

    @contextlib.contextmanager
    def copy_in(self, env: Environment, wanted: In) -> Iterator[socket.socket]:
        """The caller's end of a program that reads an archive from its standard input."""
        flags = [f"--{name}" for name in ("archive", "contents", "owners") if getattr(wanted, name)]
        name = _name(wanted.name) if not wanted.archive else ""
        words = ("--copy-in", *flags, _clean(wanted.path), name)
        with self._moving(env, Verb.COPY, words, write=True) as ours:
            yield ours

    @contextlib.contextmanager
    def copy_out(self, env: Environment, wanted: Out) -> Iterator[socket.socket]:
        """The caller's end of a program that writes an archive to its standard output."""
        flags = [f"--{name}" for name in ("follow", "whole") if getattr(wanted, name)]
        words = ("--copy-out", *flags, _clean(wanted.path), _name(wanted.name))
        verb = Verb.EXPORT if wanted.whole else Verb.COPY
        with self._moving(env, verb, words, write=False) as ours:
            yield ours

    @contextlib.contextmanager
    def _moving(self, env: Environment, verb: Verb, words: tuple[str, ...], *, write: bool) -> Iterator[socket.socket]:
        """What runs is held by nobody: it may end meanwhile, and the program with it."""
        states.check(verb, env.state, env.name)
        with contextlib.ExitStack() as held:
            if not env.state.alive:
                held.enter_context(env.operation("being copied", Deadline(OPERATION_WAIT_S)))
                states.check(verb, env.state, env.name)
            copier = held.enter_context(self._reaching.copier(env, write=write))
            yield held.enter_context(running(env, copier, (words[0], *copier.options, *words[1:]), stdin=write))


@contextlib.contextmanager
def running(env: Environment, copier: Copier, words: tuple[str, ...], *, stdin: bool) -> Iterator[socket.socket]:
    """A program, attached to; at the end it is ended, and nothing of it remembered."""
    key, place, d = env.new_exec_key(), copier.place, Deadline(START_S)
    with adopt(place, key, stdin, d) as ours:
        try:
            place.spawn(key, Command((copier.program, *words), (("PATH", PATH),)), Io(stdin=stdin), d)
            yield ours
        finally:
            ours.close()
            with contextlib.suppress(IsolatError):
                _end(place, key, Deadline(_END_S))


def _end(place: Place, key: str, d: Deadline) -> None:
    place.signal(key, signal.SIGKILL, d)
    while any(proc.key == key and proc.exit is None for proc in place.procs(key, d)):
        d.check("ending what copies")
        time.sleep(_LOOK_AGAIN_S)
    place.forget(key, d)


def _clean(path: str) -> str:
    """An absolute path without dots, as Docker reads it; with a slash at its end where it must be a directory."""
    if not path:
        raise UsageError("a path inside is missing", hint="ENV:/PATH")
    directory = path.endswith("/") or posixpath.basename(path) in (".", "..")
    clean = posixpath.normpath(f"/{path.lstrip('/')}")
    return f"{clean}/" if directory and clean != "/" else clean


def _name(name: str) -> str:
    if "/" in name or name in ("", "..") or len(name) > NAME_MAX:
        raise UsageError(f"{name!r:.80} is no name for what is copied")
    return name
