"""Carrying back what a machine has changed in its volumes, once its application has ended.

The machine has written an archive before that end was told. The sources are descriptors that its keeper holds, opened
by the caller when it began, so a daemon that has been restarted since can do it as well. A keeper leaves when its
application has ended and no daemon is there: then they are opened again, with the caller's rights, where they are still
the same. Doing it again is fine, and the archive is there until it has been done.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from isolat.checkpoint import checkpoint
from isolat.deadline import Deadline
from isolat.engine.environment import Environment
from isolat.engine.journal import log
from isolat.engine.volumes import Volumes
from isolat.errors import IsolatError, Lost, NotFound
from isolat.layers.volumes import source_name
from isolat.places.base import Facts
from isolat.places.wired import WiredPlace
from isolat.volumes import transfer

CARRY_S = 600.0


@dataclass(frozen=True)
class Carried:
    said: str = ""  # what went otherwise than one would think
    kept: bool = False  # the archive is there still, and nobody else has what is in it


def in_all(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)


def left_out(left: Sequence[str]) -> str:
    return f"not everything in its volumes could be copied in: {transfer.in_words(left)}" if left else ""


def carries(env: Environment) -> bool:
    """Whether there is something to be carried back when it ends."""
    frames = env.handle.frames
    return bool(frames and frames[0].option("carried")) and (env.directory / transfer.ARCHIVE).exists()


def carry_back(env: Environment, facts: Facts, named: Volumes) -> Carried:
    """Never raises what a machine or a volume may be the cause of: how its application ended is true all the same."""
    if not carries(env):
        return Carried()
    archive = env.directory / transfer.ARCHIVE
    if not transfer.is_finished(archive):
        return Carried("its volumes are as they were: the machine did not get to hand over what it has changed there")
    checkpoint()
    try:
        left = _carry(env, facts, named)
    except (IsolatError, OSError) as error:
        why = error.message if isinstance(error, IsolatError) else str(error)
        log(f"{env.name}: its volumes could not be carried back: {why}")
        said = f"what it has changed in its volumes could not be carried back: {why}; `isolat rm` removes {archive}"
        return Carried(said, kept=True)
    checkpoint()
    if not left or env.handle.remove:
        archive.unlink()
        checkpoint()
        (env.directory / transfer.BASE).unlink(missing_ok=True)
    if not left:
        return Carried()
    where = "" if env.handle.remove else f"; all of it is in {archive} until `isolat rm`"
    return Carried(f"not everything in its volumes could be carried back: {transfer.in_words(left)}{where}")


def _carry(env: Environment, facts: Facts, named: Volumes) -> list[str]:
    uid, gid, writable = env.handle.frames[0].option("carried")
    d = Deadline(CARRY_S)
    archive = env.directory / transfer.ARCHIVE
    with ExitStack() as opened:
        volumes = [_open(env, n, facts, named, archive, opened, d) for n in writable]
        return transfer.take_back(archive, volumes, transfer.Owner(uid, gid), env.id[:12], d)


def _open(
    env: Environment, n: int, facts: Facts, named: Volumes, archive: Path, opened: ExitStack, d: Deadline
) -> transfer.Volume:
    source = env.spec.volumes[n].source
    if env.spec.volumes[n].named:
        fd, room = opened.enter_context(named.room(source, archive.stat().st_blocks * 512))
        return transfer.Volume(str(n), fd, named=True, room_bytes=room)
    fd = -1
    with contextlib.suppress(Lost, NotFound):
        fd = WiredPlace(env.live_link, facts).fetch(source_name(n), d)
        opened.callback(os.close, fd)
    return transfer.Volume(str(n), fd, path=source)
