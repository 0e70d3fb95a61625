"""The layers of a stack started one inside the other, the outermost first; the last of them starts the application."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence

from isolat.checkpoint import checkpoint
from isolat.deadline import Deadline
from isolat.engine.creation import Planned
from isolat.engine.environment import Environment
from isolat.engine.supervisor import Supervisor
from isolat.engine.table import Table
from isolat.layers.base import CanEnter, State
from isolat.places.base import Io, Place
from isolat.trace import mark

Prepare = Callable[[int, Planned, Place], None]  # the depth, what is planned there, where
Start = Callable[[Planned, Place], object]


def start_layers(
    planned: Sequence[Planned], place: Place, prepare: Prepare, start: Start, io: Io, attach: bool, d: Deadline
) -> socket.socket | None:
    """Our end of the application's streams where ``attach`` asks for it. Raises what ``prepare`` and ``start`` do."""
    ours = None
    for depth, item in enumerate(planned):
        prepare(depth, item, place)
        mark("steps-carried-out")
        last = depth == len(planned) - 1
        if last and attach:
            ours = adopt(place, item.frame.main_key, io.stdin, d)
        try:
            start(item, place)
        except BaseException:
            if ours is not None:
                ours.close()
            raise
        checkpoint()
        if not last:
            assert isinstance(item.layer, CanEnter)
            place = item.layer.inside(item.frame, place)
    mark("application-started")
    return ours


def running(env: Environment, table: Table, supervisor: Supervisor) -> None:
    """Written down and told: the application has been started."""
    env.save(state=State.RUNNING, started_ns=time.time_ns())
    checkpoint()
    table.publish("start", env)
    supervisor.rearm(env)


def adopt(place: Place, key: str, stdin: bool, d: Deadline) -> socket.socket:
    """Attach to a process, started or not yet. Returns the client's end."""
    ours, theirs = socket.socketpair()
    try:
        place.adopt(key, theirs.detach(), stdin, d)
    except BaseException:
        ours.close()
        raise
    return ours
