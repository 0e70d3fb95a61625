"""Volumes of machines: copied in before the application starts, and copied back when it has ended.

Or shared while it runs, where that is asked for: see ``live``, to which all here passes such a job on.

A machine that is cloned has private memory, so nothing can share a directory with it as virtiofs does (QEMU's
vhost-user devices want memory that they can map: docs/system/devices/vhost-user.rst). The machine gets one archive of
all its volumes as a disk, unpacks it on its own disk and shows what is there; what is written goes out as an archive
on the same disk, after the application's end and before that end is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from isolat.errors import Unsupported
from isolat.layers import live
from isolat.layers.base import Capabilities, Descriptor, Job, Shares, Source
from isolat.places.steps import Run, Step
from isolat.spec.model import Volume
from isolat.volumes.transfer import ARCHIVE

DEVICE = "vdd"
HELD = "volumes"
MOST_WRITABLE = 8  # a keeper holds sixteen descriptors, and a machine needs some itself
_AGENT = "/proc/1/exe"  # the agent is PID 1 there, and its file has no name any more


def are_copied(can: Capabilities, service: Mapping[str, object]) -> bool:
    """Whether an environment whose outermost layer can this works on copies. ``service``: its spec, as written."""
    return not can.volumes_live and not live.asked(service.get("x-microvm"))


def check(job: Job) -> None:
    held = 0 if live.wanted(job.spec) else len(_held(job))
    if held > MOST_WRITABLE:
        raise Unsupported(
            f"a machine has at most {MOST_WRITABLE} directories of the host that are written to, not {held}",
            hint="make some of them read-only (:ro), give a directory that holds them, or use named volumes",
        )


def descriptors(job: Job) -> tuple[Descriptor, ...]:
    """The archive, and every source that something goes back to: a daemon may have to do that which never saw it.

    But for named volumes, which every daemon finds.
    """
    volumes = job.spec.volumes
    if not volumes:
        return ()
    if live.wanted(job.spec):
        return live.descriptors(job)
    read_only, named = tuple(one.read_only for one in volumes), tuple(one.named for one in volumes)
    shares = Shares(job.caller_uid, job.caller_gid, read_only, named)
    archive = Descriptor(
        HELD, Source.VOLUMES, f"{job.dir}/{ARCHIVE}", job.spec.disk_bytes, writable=True, shares=shares
    )
    return (archive, *(Descriptor(source_name(n), Source.GIVEN, given=n) for n in _held(job)))


def options(job: Job) -> tuple[tuple[str, Any], ...]:
    """What the frame says: that there are some; and to whom which are carried back."""
    if not job.spec.volumes or live.wanted(job.spec):
        return ()
    writable = _writable(job)
    carried = (("carried", (job.caller_uid, job.caller_gid, writable)),) if writable else ()
    return (("volumes", len(job.spec.volumes)), *carried)


def source_name(n: int) -> str:
    return f"volume-{n}"


def unpack_steps(job: Job, at: str) -> tuple[Step, ...]:
    """Have them below ``at``, by their numbers."""
    if live.wanted(job.spec):
        return live.mount_steps(job, at)
    return (Run((_AGENT, "--unpack", f"/dev/{DEVICE}", at)),) if job.spec.volumes else ()


def bind_steps(job: Job, at: str, root: str) -> tuple[Step, ...]:
    """As those see them whose root is ``root``, whatever links an image has there."""
    return tuple(
        Run((_AGENT, "--bind", f"{at}/{n}", root, volume.target, "ro" if volume.read_only else "rw"))
        for n, volume in enumerate(job.spec.volumes)
    )


def after(job: Job, at: str, group: str, disk: str) -> tuple[str, ...]:
    """What the agent does when the application has ended: end what is left in ``group`` and pack; and write to the
    disk what is still in memory, where somebody may want to see that: the machine is killed next.
    """
    names = () if live.wanted(job.spec) else tuple(str(n) for n in _writable(job))
    pack = ("--pack", f"/dev/{DEVICE}", at, str(job.spec.disk_bytes), group, *names) if names else ()
    flush = () if job.spec.remove else ("--flush", disk)
    return (_AGENT, *flush, *pack) if flush or pack else ()


def inner(job: Job, at: str) -> tuple[Volume, ...]:
    """The same volumes, as a layer inside the machine finds them."""
    return tuple(replace(volume, source=f"{at}/{n}") for n, volume in enumerate(job.spec.volumes))


def _held(job: Job) -> tuple[int, ...]:
    return tuple(n for n in _writable(job) if not job.spec.volumes[n].named)


def _writable(job: Job) -> tuple[int, ...]:
    return tuple(n for n, volume in enumerate(job.spec.volumes) if not volume.read_only)
