"""Volumes of a machine that are shared with this one while it runs (``x-microvm: {volumes: live}``), by virtiofs.

For each a server of files runs beside QEMU: QEMU's own virtiofsd, which speaks with the guest's driver through memory
that QEMU, it and the guest map (docs/system/devices/vhost-user.rst, docs/tools/virtiofsd.rst of QEMU 7.2). So such a
machine is booted for itself: what is cloned has private memory.

A server is root of a user namespace with the environment's ids and of nothing else (docs/adr/0015). It sees the volume
through a mount on which the ids of the disk are these, as a container does: whoever may have it in a container may have
it here. It gets a socket on which QEMU has connected already, so neither opens a path for it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isolat.deadline import Deadline
from isolat.errors import Unsupported, UsageError
from isolat.layers import common
from isolat.layers.base import Descriptor, Frame, Job, MachineKit, Source
from isolat.linux import cgroup
from isolat.places.base import Command, Io, Place
from isolat.places.steps import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    Idmap,
    Mount,
    Step,
)
from isolat.qemu.argv import live_tag
from isolat.spec.model import Spec, Volume

COPIED, LIVE = "copied", "live"
MOST = 8  # the machine has 24 places for devices, of which eleven are taken
SPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # NEWNS, UTS, IPC, USER, PID, NET
_LAYER, _OPTION = "microvm", "volumes"
_SERVER_BYTES = 24 << 20  # what one has in memory, generously; the files that it reads are the page cache's
_COPIED_HINT = "copied volumes can do that: leave x-microvm: {volumes: live} out"


def asked(options: object) -> bool:
    """Whether a service's ``x-microvm`` asks for it."""
    return isinstance(options, Mapping) and options.get(_OPTION) == LIVE


def wanted(spec: Spec) -> bool:
    """Whether these volumes are shared. Only the outermost layer is one that knows the option."""
    return spec.layers[0] == _LAYER and bool(spec.volumes) and asked(spec.option(_LAYER))


def check_options(options: Mapping[str, Any]) -> None:
    way = options.get(_OPTION, COPIED)
    if way not in (COPIED, LIVE):
        raise Unsupported(f"x-microvm: volumes is {way!r}", hint=f"it may be {COPIED} or {LIVE}")
    if way == LIVE and options.get("template") is True:
        raise Unsupported(
            "x-microvm: template is true and volumes is live: a clone's memory is its own, and nobody can share it",
            hint="leave template out: a machine with live volumes is booted for itself",
        )


def check(job: Job, kit: MachineKit) -> None:
    """Raises Unsupported for what can't be shared, and where something for it is missing."""
    count = len(job.spec.volumes)
    if not job.command:
        raise Unsupported(
            "live volumes can't be given to a layer in the machine: its container needs mounts with ids of its own,"
            " which virtiofs does not have in the guest's kernel",
            hint=_COPIED_HINT,
        )
    if count > MOST:
        raise Unsupported(f"a machine has at most {MOST} live volumes, not {count}", hint=_COPIED_HINT)
    if kit.live_lacks:
        raise Unsupported(f"live volumes are not possible here: {kit.live_lacks}", hint=kit.live_remedy)
    common.check_owners(job)


def check_sources(volumes: Sequence[Volume], given: Iterable[int]) -> None:
    """``given``: the sources that are no named volumes, in order, opened. Raises UsageError where one is a file."""
    for volume, fd in zip((one for one in volumes if not one.named), given, strict=True):
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise UsageError(
                f"{volume.source} is no directory, and only directories can be live volumes of a machine",
                hint=f"give the directory that it is in, or copy it: {_COPIED_HINT}",
            )


def check_way(directory: Path) -> None:
    """Raises Unsupported where a server, which is nobody's user, could not get to what is in ``directory``."""
    for one in (directory, *directory.parents):
        if not one.stat().st_mode & stat.S_IXOTH:
            raise Unsupported(
                f"live volumes are not possible here: their servers have no privileges, and {one}, which they are"
                " below, lets nobody through",
                hint=f"chmod o+x {one}, or keep the state elsewhere: --root",
            )


# outside


def steps(job: Job) -> tuple[Step, ...]:
    """The mounts that the servers show, each in the keeper's mount namespace, so that they go with it."""
    found = []
    for n, volume in enumerate(job.spec.volumes):
        attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (MOUNT_ATTR_RDONLY if volume.read_only else 0)
        source, descriptor = common.volume_source(job, volume), n if job.opened else -1
        found.append(Idmap(source, _at(job, n), common.volume_lines(job, volume), attributes, descriptor))
    return tuple(found)


def _at(job: Job, n: int) -> str:
    return f"{job.dir}/volumes/{n}"


def descriptors(job: Job) -> tuple[Descriptor, ...]:
    return tuple(
        Descriptor(live_tag(n), Source.LISTENING, f"{job.dir}/{live_tag(n)}") for n in range(len(job.spec.volumes))
    )


def peers(job: Job) -> tuple[str, ...]:
    """QEMU's ends, as they are held."""
    return tuple(f"{live_tag(n)}-peer" for n in range(len(job.spec.volumes)))


def beside(job: Job, kit: MachineKit) -> tuple[tuple[str, Command], ...]:
    """The servers, each with its key."""
    return tuple((live_tag(n), _server(job, kit, n)) for n in range(len(job.spec.volumes)))


def _server(job: Job, kit: MachineKit, n: int) -> Command:
    """``--rlimit-nofile=0``: what the keeper gave it, all that it may. Each file that the guest knows is one open here.

    ``timeout``: for so many seconds the guest's kernel believes what it knows of a name, or of a file's size and time.
    With 0 it would ask each time, and looking at 3,000 files again would take 2.1 s instead of 0.12 under emulation.
    """
    options = (f"source={_escaped(_at(job, n))}", "sandbox=namespace", "cache=auto", "timeout=1", "log_level=err")
    return Command(
        argv=(kit.virtiofsd, "-f", "--fd=4", "--rlimit-nofile=0", *(word for one in options for word in ("-o", one))),
        env=(("PATH", common.PATH), ("MALLOC_ARENA_MAX", "1")),
        user=str(job.uid_base),
        cgroup_files=cgroup.join_files(job.facts.cgroups, job.cgroup),
        held=(live_tag(n),),
        spaces=SPACES,
    )


def _escaped(path: str) -> str:
    """A comma ends an option of FUSE's, and a backslash makes the next character one of the value (fuse_opt.c)."""
    return path.replace("\\", "\\\\").replace(",", "\\,")


def memory_bytes(job: Job) -> int:
    """What the machine's control group gets for the servers."""
    return _SERVER_BYTES * len(job.spec.volumes)


def serve(frame: Frame, place: Place, d: Deadline) -> None:
    """Start the servers. Each then has the only socket of its name: where it ends, QEMU is told so."""
    for key, command in frame.beside:
        place.spawn(key, command, Io(beside=True), d)
        place.drop(command.held, d)


def let_go(frame: Frame, place: Place, d: Deadline) -> None:
    """QEMU has its ends: from now on its end is that of every server."""
    if frame.beside:
        place.drop(tuple(f"{key}-peer" for key, _ in frame.beside), d)


# inside


def mount_steps(job: Job, at: str) -> tuple[Step, ...]:
    closed = MS_NOSUID | MS_NODEV
    return tuple(
        Mount(live_tag(n), f"{at}/{n}", "virtiofs", "", closed | (MS_RDONLY if volume.read_only else 0))
        for n, volume in enumerate(job.spec.volumes)
    )
