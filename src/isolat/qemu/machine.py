"""From a machine's command to the moment when something can be started in it: booted, or cloned from a template.

Everything goes through the keeper: it starts QEMU, holds its monitor's other end (``qmp``), its memory and its disks.
A daemon that is killed in between leaves a machine that the next one can find, ask and end.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from isolat.checkpoint import checkpoint
from isolat.deadline import Deadline
from isolat.errors import IsolatError
from isolat.layers.base import GUEST
from isolat.places.base import Command, Io, Place, Starting
from isolat.places.steps import Step
from isolat.qemu import argv, dialogue
from isolat.qemu.qmp import Qmp
from isolat.trace import mark

MONITOR, STATE, SAVED = "qmp", "state", "saved"
STATE_DESCRIPTOR = 6  # of QEMU's process: 3 is the agent's channel, 4 the memory, 5 the monitor
_LAST_WORDS_S = 5.0
_EXERCISE = "exercise"

Load = Callable[[Qmp], object]
"""What makes a machine that waits for its state what it was before."""


@contextlib.contextmanager
def monitor(place: Place, d: Deadline) -> Iterator[Qmp]:
    """The machine's monitor, for as long as one dialogue takes."""
    with Qmp.connect(socket.socket(fileno=place.fetch(MONITOR, d)), d) as qmp:
        yield qmp


def boot(place: Place, command: Command, disks: Mapping[str, tuple[str, bool]], d: Deadline) -> None:
    """Start a machine that is not a clone, and wait for its agent.

    ``disks``: device to (name of the held descriptor, read-only).
    """
    _start(place, begin(place, command, d), disks, None, d)


def clone(place: Place, command: Command, disks: Mapping[str, tuple[str, bool]], d: Deadline) -> None:
    """Start a machine with a template's state, and wait for its agent.

    It has its disks from the beginning and is told beforehand what it is to do, so nothing is waited for in between.
    """
    starting = begin(place, with_disks(command, disks), d)
    with socket.socket(fileno=place.fetch(MONITOR, d)) as sock:
        dialogue.load_ahead(sock, STATE_DESCRIPTOR, d)
    checkpoint()
    starting.finish(d)
    mark("agent-greeted")
    place.drop((f"{MONITOR}-peer",), d)  # QEMU has it: from now on its end is the end of every dialogue
    checkpoint()


def with_disks(command: Command, disks: Mapping[str, tuple[str, bool]]) -> Command:
    """QEMU's command with what is held for these disks, behind all that it has already."""
    first = STATE_DESCRIPTOR - command.held.index(STATE) + len(command.held)
    held = {device: argv.HeldDisk(name, first + n) for n, (device, (name, _)) in enumerate(disks.items())}
    names = tuple(disk.name for disk in held.values())
    return replace(command, argv=argv.with_disks(command.argv, held), held=(*command.held, *names))


def begin(place: Place, command: Command, d: Deadline) -> Starting:
    """Start QEMU, and don't wait for it."""
    return place.begin(GUEST, command, Io(), d)


def restore(place: Place, starting: Starting, disks: Mapping[str, tuple[str, bool]], load: Load, d: Deadline) -> None:
    """Let ``load`` give its state to a machine that was begun, and wait for its agent."""
    _start(place, starting, disks, load, d)


def _start(
    place: Place, starting: Starting, disks: Mapping[str, tuple[str, bool]], load: Load | None, d: Deadline
) -> None:
    checkpoint()
    try:
        place.drop((f"{MONITOR}-peer",), d)  # QEMU has it: from now on its end is the end of every dialogue
        with monitor(place, d) as qmp:
            mark("machine-monitor")
            if load is not None:
                load(qmp)
                mark("machine-loaded")
                checkpoint()
            for device, (name, read_only) in disks.items():
                swap(place, qmp, device, name, read_only=read_only, d=d)
            dialogue.cont(qmp, d)
            mark("machine-runs")
            checkpoint()
    except IsolatError:
        # Where it has died, the keeper knows its last words; what the monitor says is only that it is closed.
        starting.finish(d.sooner(_LAST_WORDS_S))
        raise
    starting.finish(d)
    mark("agent-greeted")
    checkpoint()


def swap(place: Place, qmp: Qmp, device: str, name: str, *, read_only: bool, d: Deadline) -> None:
    """Put the held file ``name`` behind the disk ``device``."""
    fd = place.fetch(name, d)
    try:
        dialogue.swap_disk(qmp, device, name, fd, read_only=read_only, d=d)
    finally:
        os.close(fd)


def save(
    place: Place,
    command: Command,
    disks: Mapping[str, tuple[str, bool]],
    steps: Sequence[Step],
    d: Deadline,
    *,
    exercise: Command | None = None,
    cloned: bool = False,
) -> None:
    """Make a machine, let it carry out these steps, save its state to the held descriptor ``saved`` and end it.

    What a template is made of: booted, or cloned from another one, whose disks its clones will have, too. The disks are
    what they were at that moment, for what a guest has not written yet is written before (SETTLE).
    """
    (clone if cloned else boot)(place, command, disks, d)
    inside = place.inside(GUEST, place.facts)
    inside.carry_out(steps, d)
    if exercise is not None:
        inside.spawn(_EXERCISE, exercise, Io(), d)
        inside.wait(_EXERCISE, d)
        inside.forget(_EXERCISE, d)
    inside.settle(d, keep_cache=cloned)
    state = place.fetch(SAVED, d)
    try:
        with monitor(place, d) as qmp:
            dialogue.save(qmp, d, to=state)
            dialogue.quit_(qmp, d)
    finally:
        os.close(state)
    place.wait(GUEST, d)
