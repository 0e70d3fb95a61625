"""The end of an environment that is in another one.

It shares that one's keeper, which goes on; what it has outside is its directory, with its log and its exit record, and
all else is undone in the place that it is in. Where that place is gone, everything in it went with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence

from isolat.deadline import Deadline
from isolat.engine import entering
from isolat.engine.environment import Environment
from isolat.engine.handle import guest_words, read_exit
from isolat.errors import IsolatError, Lost
from isolat.layers.base import State
from isolat.linux import cgroup
from isolat.places.base import Exit, Facts, Place
from isolat.places.steps import Cgroup, Step
from isolat.places.wired import WiredPlace

_LOOK_S = 10.0
_KILL_S = 10.0
_REVERT_S = 60.0
_TEXT_BYTES = 64 << 10  # of a control group's file; whoever runs the guest's kernel may say any number of them


def place_of(env: Environment, facts: Facts) -> Place | None:
    """The place that it is in; None where that is gone, or its keeper is."""
    around, outer = env.handle.around, env.outer
    if around is None or outer is None or outer.link is None:
        return None
    try:
        found = WiredPlace(outer.live_link, facts).procs(around.to, Deadline(_LOOK_S))
    except Lost:
        return None
    if not any(proc.key == around.to and proc.exit is None for proc in found):
        return None
    return entering.outermost(env, facts)


def end(env: Environment, facts: Facts) -> None:
    """Kill what of it still runs, and wait until its keeper has recorded that: then nothing more is written."""
    place = place_of(env, facts)
    if place is None:
        return
    d, first = Deadline(_KILL_S), env.handle.frames[0]
    key = first.guest_key if first.has_guest else first.main_key
    with contextlib.suppress(IsolatError):
        for proc in place.procs(key, d):
            if proc.key == key and proc.exit is None:
                place.signal(key, signal.SIGKILL, d)
                place.wait(key, d)
    with contextlib.suppress(IsolatError):
        link, main = env.live_link(d), env.handle.main_name
        if any(proc.key == main and proc.exit is None for proc in WiredPlace(lambda _: link, facts).procs(main, d)):
            link.wait_exit(main, d)


def revert(env: Environment, steps: Sequence[Step], facts: Facts) -> None:
    """Undo these in the place that it is in. Raises what could not be undone while that place is there."""
    place = place_of(env, facts)
    if place is None:
        return
    try:
        place.revert(steps, Deadline(_REVERT_S))
    except IsolatError:
        if place_of(env, facts) is not None:
            raise


def forget(env: Environment, facts: Facts) -> None:
    """Nobody asks for its processes any more: what keeper and agents remember of them goes, the inner ones first."""
    place = place_of(env, facts)
    if place is None:
        return
    with contextlib.suppress(IsolatError):
        first = env.handle.frames[0].guest_key
        for proc in sorted(place.procs(first, Deadline(_LOOK_S)), key=lambda proc: -proc.key.count("/")):
            place.forget(proc.key, Deadline(_LOOK_S))


def oom(env: Environment, facts: Facts) -> bool:
    """Whether the kernel inside killed something of it for want of memory."""
    groups = [step for step in env.handle.frames[0].steps if isinstance(step, Cgroup)]
    place = place_of(env, facts) if groups else None
    if place is None:
        return False
    return any(cgroup.v2_oom_kills(path, lambda path: _text(place, path)) for path in groups[0].paths)


def _text(place: Place, path: str) -> str | None:
    """What the guest says is in this file, as much of it as we have room for."""
    fd = os.memfd_create("text", os.MFD_CLOEXEC)
    try:
        place.get(path, fd, _TEXT_BYTES, Deadline(_LOOK_S))
        return os.pread(fd, _TEXT_BYTES, 0).decode("ascii", "replace")
    except (IsolatError, OSError):
        return None
    finally:
        os.close(fd)


def fate(env: Environment, exit: Exit | None, facts: Facts) -> str:
    """Why it ended where that is the end of what it was in; empty where it ended by itself, or was asked to."""
    around, outer = env.handle.around, env.outer
    if around is None or (exit is not None and (not exit.with_guest or exit.forced)):
        return ""
    if place_of(env, facts) is not None:
        return "what it ran in ended under it" if exit else ""
    who, unknown = f"{around.name}, which it was in,", "" if exit else ", so it is not known how the application ended"
    if outer is None:
        return f"{who} is gone{unknown}"
    if outer.parting:
        return f"{who} {outer.parting}{unknown}"
    if outer.state is State.LOST:
        return f"{who} is lost{unknown}"
    own = read_exit(outer.directory)
    words = guest_words(outer.directory) if own and own.with_guest and not outer.forced else ""
    return f"{who} ended under it{f', its last words: {words}' if words else ''}{unknown}"
