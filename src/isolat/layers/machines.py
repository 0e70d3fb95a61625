"""What the layers that make machines with QEMU share: when they are ready, and what is around QEMU outside."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace

from isolat.errors import InternalError, Unsupported
from isolat.guest import blank
from isolat.layers import common
from isolat.layers.base import Frame, Job, MachineKit, Probe
from isolat.linux import cgroup
from isolat.places.base import CgroupMode, Command, Identity, Place
from isolat.places.steps import Cgroup, Step

THREADS_MAX = 128  # of QEMU: one for each processor, one for each file that is just read, and a few
ENTROPY_BYTES = 64
_STATE_BYTES = 64 << 20  # of processors and devices, which a template saves; a few of them are used
SPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET


def probe(place: Place) -> Probe:
    """Ready where root is given and QEMU is there; what it can do is asked when a machine is made."""
    facts = place.facts
    if not facts.root:
        return Probe(False, "it needs root, and the place does not give it", "put it on the machine, as root")
    if facts.tool("qemu-system-x86_64") is None:
        return Probe(False, "QEMU was not found", "apt-get install qemu-system-x86")
    if facts.machine != "x86_64":
        return Probe(False, f"machines of {facts.machine} are not made yet", "use an x86_64 machine")
    if facts.cgroups.mode is CgroupMode.NONE:
        return Probe(False, "no control groups are mounted, so nothing could be limited", "mount cgroup2")
    return Probe(True)


def kit_of(job: Job, layer: str) -> MachineKit:
    if job.machine is None:
        raise InternalError(f"the layer {layer} was asked to plan {job.id} without a kernel and QEMU")
    return job.machine


def cpus(job: Job) -> int:
    """One processor unless more were asked for: under emulation a second one costs more than it brings."""
    return max(1, math.ceil(job.spec.cpus)) if "cpus" in common.limits_asked(job) else 1


def check_disk(job: Job) -> None:
    """Raises Unsupported where no file could be a disk of this size."""
    if job.spec.disk_bytes > blank.MOST_BYTES:
        raise Unsupported(
            f"a disk of {job.spec.disk_bytes >> 40} TiB is more than a machine can have",
            hint=f"give it at most {blank.MOST_BYTES >> 40} TiB; it takes only what is written to it",
        )


def digests(job: Job) -> tuple[str, ...]:
    return (job.image.digest,) if job.image else ()


def outside(job: Job, overhead_bytes: int) -> tuple[Step, ...]:
    """The control group around QEMU: the guest's memory, and what QEMU needs for itself."""
    facts = job.facts.cgroups
    paths = cgroup.directories(facts, job.cgroup, cgroup.PLAIN_V1)
    if not paths:
        return ()
    limits = cgroup.limits_of(job.spec)
    memory = job.spec.memory_bytes + overhead_bytes
    swap = max(memory, limits.memory_swap_bytes + overhead_bytes)
    limits = replace(limits, memory_bytes=memory, memory_swap_bytes=swap, pids=THREADS_MAX)
    return (Cgroup(paths, cgroup.writes(facts, job.cgroup, limits)),)


def guest(job: Job, kit: MachineKit, argv: tuple[str, ...], held: tuple[str, ...]) -> Command:
    """QEMU: in the jail, with a uid and namespaces of its own, and its descriptors from 4 on as in ``held``.

    It writes its disk, an archive of volumes that is as large at most, and a template's state: no file of it needs to
    become larger, and one that its guest took over can make none so.
    """
    return Command(
        argv=argv,
        env=(("PATH", common.PATH), ("MALLOC_ARENA_MAX", "1")),
        user=f"{job.uid_base}:{job.uid_base}",
        root=kit.jail,
        cgroup_files=cgroup.join_files(job.facts.cgroups, job.cgroup),
        control=True,
        serial=True,
        held=held,
        spaces=SPACES,
        confined=True,
        file_bytes=max(job.spec.disk_bytes, _STATE_BYTES),
    )


def identity(frame: Frame, devices: tuple[str, ...] = ()) -> Identity:
    """What the machine gets before anything of anybody runs in it: fresh randomness, the time, its names."""
    return Identity(
        entropy=os.urandom(ENTROPY_BYTES),
        time_ns=time.time_ns(),
        host=str(frame.option("host") or ""),
        mac=str(frame.option("mac") or ""),
        devices=devices,
    )
