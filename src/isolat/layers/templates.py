"""What the templates of microVMs are, as data: one that knows no image, and those of images, which go on from it.

The layer says which steps are the same in every machine, and in every machine with one image.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from isolat.layers.base import Descriptor, ImageRef, Job, MachineKit, Source, TemplatePlan
from isolat.places.base import Command
from isolat.places.steps import Step
from isolat.qemu import argv, machine

READ_BYTES = 8 << 20
READ = (
    "/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6", "/lib64/libc.so.6", "/lib/ld-musl-x86_64.so.1",
    "/etc/ld.so.cache", "/etc/passwd", "/etc/group", "true", "sh",
)  # fmt: skip
_TO_SAVE = (Descriptor(machine.SAVED, Source.MEMORY), Descriptor(machine.MONITOR, Source.PAIR))


def first(job: Job, kit: MachineKit, asked: argv.Machine, guest: Command, steps: tuple[Step, ...]) -> TemplatePlan:
    """Its disk belongs to it: the file system is mounted when it is saved, so that no clone has to."""
    machine_key = argv.template_key(asked, kit.guest_key, kit.qemu_identity)
    booted = argv.microvm_argv(replace(asked, share=True))
    disk = Descriptor("disk", Source.DISK, size_bytes=job.spec.disk_bytes, writable=True)
    memory = Descriptor("ram", Source.MEMORY, size_bytes=asked.memory_mib << 20)
    return TemplatePlan(
        key=_key(machine_key, job.spec.disk_bytes, steps),
        guest=replace(guest, argv=booted, cgroup_files=(), held=("ram", "qmp-peer"), park_s=0.0),
        descriptors=(memory, *_TO_SAVE, disk),
        inside=steps,
        disk_bytes=job.spec.disk_bytes,
        memory_bytes=asked.memory_mib << 20,
        cpus=asked.cpus,
        accel=kit.accel,
        release=kit.release,
        disks=(("vdb", "disk", False),),
    )


def of_image(
    image: ImageRef,
    base: TemplatePlan,
    asked: argv.Machine,
    guest: Command,
    steps: tuple[Step, ...],
    disks: tuple[tuple[str, str, bool], ...],
    exercise: Command,
) -> TemplatePlan:
    """What clones of ``base`` with this image are after these steps."""
    cloned = argv.microvm_argv(replace(asked, incoming=True, share=True))
    return replace(
        base,
        key=_key(base.key, image.digest, steps, exercise.argv),
        guest=replace(guest, argv=cloned, cgroup_files=(), park_s=0.0),
        descriptors=(
            Descriptor("ram", Source.TEMPLATE_COPY, size_bytes=base.memory_bytes),
            Descriptor("state", Source.TEMPLATE_STATE),
            *_TO_SAVE,
            Descriptor("image", Source.FILE, image.file),
            Descriptor("disk", Source.TEMPLATE_DISK, size_bytes=base.disk_bytes, writable=True),
        ),
        inside=steps,
        disks=disks,
        exercise=exercise,
        base=base,
        image=image,
    )


def reader(image: ImageRef) -> Command:
    """It reads what that program will read which is run most, and nothing of what anybody asked for.

    It is our own: code of the image would leave in all clones what it remembers.
    """
    words = (*image.entrypoint, *image.command)
    return Command(("/proc/self/exe", "--ahead", str(READ_BYTES), *READ, *words[:1]))


def _key(*parts: Any) -> str:
    text = json.dumps(parts, default=lambda step: step.to_json())
    return hashlib.sha256(text.encode()).hexdigest()
