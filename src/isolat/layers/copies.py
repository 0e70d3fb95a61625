"""Copies of running microVMs: what is asked of keeper, agent and QEMU, in which order.

While the copy is taken nothing travels between keeper and agent (docs/protocol.md, Silence). The copy's own keeper
greets the agent as a new host, which makes it forget the old one; then the copy is told the time and given randomness
and names of its own, and the application is bound to its new keeper by the key that it has.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from isolat.deadline import Deadline
from isolat.errors import InternalError, Lost, NotFound, StartFailed, Unsupported
from isolat.layers.base import GUEST, Copied, Copy, Frame
from isolat.places.base import Identity, Io, Place, Proc, Starting
from isolat.places.steps import PutFile, Step
from isolat.qemu import argv, dialogue, forks, machine, memory
from isolat.qemu.qmp import Qmp
from isolat.trace import mark

COPY_VERSION = 1  # raise it when a copy of before can't go on any more
_SPEAK_S = 10.0
_HOSTS_MOST_BYTES = 64 << 10
_PAUSED = "paused"
_TSC_DRIFT = 500e-6  # what two measurements of one counter may differ by, and a guest's clock be wrong by


def options(asked: argv.Machine, qemu_identity: str, *, possible: bool) -> tuple[tuple[str, Any], ...]:
    """What a machine's frame says of what its copy can go on in."""
    return (("copy_key", _key(asked, qemu_identity)), ("tsc_khz", asked.tsc_khz)) if possible else ()


def _key(asked: argv.Machine, qemu_identity: str) -> str:
    """The same build of QEMU and the same devices. Kernel, initramfs and agent come along in the memory."""
    bare = replace(asked, incoming=True, share=False, vmlinux="", initramfs="", kernel_arguments=())
    parts = {"version": COPY_VERSION, "argv": argv.microvm_argv(bare), "qemu": qemu_identity}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check(frame: Frame) -> None:
    if not frame.option("copy_key"):
        raise Unsupported(
            "this machine can't be copied: it was booted for itself, or by an older Isolat",
            hint="copies are made of machines that were cloned from a template",
        )


def going_on(copied: Frame, now: Frame) -> Frame:
    """What it was booted with stays true of it: the kernel, and the speed of the time stamp counter."""
    check(now)
    if copied.option("copy_key") != now.option("copy_key"):
        raise Unsupported(
            "the copy is of a machine with another QEMU or other devices than are made here now",
            hint="a copy goes on under the very QEMU that it was made with; make a new one",
        )
    then_khz, now_khz = int(copied.option("tsc_khz") or 0), int(now.option("tsc_khz") or 0)
    if abs(then_khz - now_khz) > then_khz * _TSC_DRIFT:
        raise Unsupported(
            f"the copy's clock counts {then_khz} kHz, and this processor's time stamp counter has {now_khz}",
            hint="start it on a machine with the same processor",
        )
    kept = {name: copied.option(name) for name in ("release", "tsc_khz")}
    return replace(now, options=tuple({**dict(now.options), **kept}.items()))


def take(place: Place, to: Copy, d: Deadline) -> Copied:
    """Copy the machine behind this place."""
    inside, pid = place.inside(GUEST, place.facts), _pid(place, d)
    with _disk(place, d) as disk, machine.monitor(place, d) as qmp, _silence(inside, d):
        mark("machine-silent")
        disks = (forks.DiskCopy(disk, to.disk),)
        found = forks.capture(qmp, pid, memory.Inode.of(to.ram), to.state, to.delta, d, disks=disks, room=to.room)
    mark("machine-copied")
    return Copied(found.stopped_ms, found.own_bytes)


def go_on(place: Place, d: Deadline) -> None:
    """Let the machine run that is stopped."""
    with machine.monitor(place, d) as qmp:
        if dialogue.status(qmp, d) == _PAUSED:
            dialogue.cont(qmp, d)


def begin(frame: Frame, place: Place, d: Deadline) -> Starting:
    if frame.guest is None:
        raise InternalError("a copy has no command")
    return machine.begin(place, frame.guest, d)


def restore(
    frame: Frame,
    place: Place,
    starting: Starting,
    disks: Mapping[str, tuple[str, bool]],
    copy: Copy,
    identity: Identity,
    names: tuple[Step, ...],
    hosts: str,
    io: Io,
    d: Deadline,
) -> Proc | None:
    """Make the machine that was begun this copy, and bind its application to its keeper.

    ``hosts``: where its hosts file is; empty where nothing can be written.
    """
    if frame.main is None:
        raise InternalError("a copy has no application")
    machine.restore(place, starting, disks, lambda qmp: _load(place, qmp, copy, d), d)
    inside = place.inside(GUEST, place.facts)
    inside.resume(identity, d)
    mark("machine-resumed")
    inside.carry_out(names, d)
    if hosts:
        _rename_in(inside, hosts, identity.host, d)
    mark("machine-named")
    return place.spawn(frame.main_key, frame.main, replace(io, main=True), d)


def _load(place: Place, qmp: Qmp, copy: Copy, d: Deadline) -> None:
    if copy.delta >= 0:
        forks.restore(qmp, _pid(place, d), memory.Inode.of(copy.ram), machine.STATE_DESCRIPTOR, copy.delta, d)
        return
    dialogue.stop(qmp, d)  # else it would run at once, before it has its disks: see forks.restore
    dialogue.load(qmp, machine.STATE_DESCRIPTOR, d)


def _rename_in(inside: Place, hosts: str, name: str, d: Deadline) -> None:
    """Have its own name where the other's was; what the application has added there stays.

    What is there may be anything by now: what can't be read as a small file is left alone.
    """
    fd = os.memfd_create("hosts", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, _HOSTS_MOST_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        inside.get(hosts, fd, _HOSTS_MOST_BYTES + 1, d)  # of one that is larger the last byte has no room
        text = os.pread(fd, os.lseek(fd, 0, os.SEEK_CUR), 0).decode()
    except (OSError, UnicodeError, NotFound, StartFailed):
        return
    finally:
        os.close(fd)
    renamed = re.sub(r"(?m)^127\.0\.1\.1\t.*$", f"127.0.1.1\t{name}", text)
    if renamed != text:
        inside.carry_out((PutFile(hosts, renamed),), d)


def _pid(place: Place, d: Deadline) -> int:
    found = [proc.pid for proc in place.procs(GUEST, d) if proc.key == GUEST and proc.exit is None]
    if not found:
        raise Lost("the machine is gone")
    return found[0]


@contextlib.contextmanager
def _disk(place: Place, d: Deadline) -> Iterator[int]:
    """Opened anew: looking for its data moves the offset."""
    held = place.fetch("disk", d)
    try:
        fd = os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(held)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _silence(inside: Place, d: Deadline) -> Iterator[None]:
    try:
        inside.hush(d)
        yield
    finally:
        inside.speak(Deadline(_SPEAK_S))
