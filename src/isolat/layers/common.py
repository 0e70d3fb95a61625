"""What the layers that run an image on this kernel share: its root, its writable part, the application's command."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from isolat.errors import InternalError, Unsupported
from isolat.layers.base import Capabilities, ImageRef, Job
from isolat.places.base import Command
from isolat.places.steps import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    Idmap,
    MakeDir,
    Mount,
    Step,
    Subvolume,
)
from isolat.spec.model import DEFAULT_CPUS, DEFAULT_DISK_BYTES, DEFAULT_MEMORY_BYTES, DEFAULT_PIDS, Volume

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def image_of(job: Job, layer: str) -> ImageRef:
    if job.image is None:
        raise InternalError(f"the layer {layer} was asked to plan {job.id} without an image")
    return job.image


def check(job: Job, layer: str, can: Capabilities) -> None:
    """Refuse what the spec asks for and the layer's capabilities don't declare."""
    spec = job.spec
    if spec.network_mode not in can.networks:
        have = ", ".join(sorted(can.networks))
        raise Unsupported(
            f"the {layer} layer has no network {spec.network_mode!r}; it has: {have}",
            hint=f"choose one of these with network_mode or --network: {have}",
        )
    asked = (
        *((f"the limit {name}", True, name in can.limits) for name in limits_asked(job)),
        ("volumes", bool(spec.volumes), can.volumes),
        ("tmpfs", bool(spec.tmpfs), can.tmpfs),
        ("read_only", spec.read_only, can.read_only),
        ("hostname", bool(spec.hostname), can.hostname),
        ("user", bool(spec.user), can.users),
        ("x-accel", spec.accel != "auto", can.machine),
        ("x-kernel", bool(spec.kernel), can.machine),
    )
    refused = [field for field, wanted, possible in asked if wanted and not possible]
    if refused:
        raise Unsupported(
            f"the {layer} layer can't do what is asked for with {', '.join(refused)}",
            hint="leave that out, or use the container layer",
        )


def limits_asked(job: Job) -> tuple[str, ...]:
    """The limits that differ from what everything has anyway."""
    spec = job.spec
    usual = (DEFAULT_CPUS, min(DEFAULT_CPUS, float(job.facts.cpus)))
    asked = (
        ("memory", spec.memory_bytes != DEFAULT_MEMORY_BYTES or spec.memory_swap_bytes is not None),
        ("cpus", spec.cpus not in usual),
        ("pids", spec.pids_limit != DEFAULT_PIDS),
        ("disk", spec.disk_bytes != DEFAULT_DISK_BYTES),
    )
    return tuple(name for name, differs in asked if differs)


def check_options(layer: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise Unsupported(
            f"the {layer} layer knows no option {', '.join(unknown)}",
            hint=f"x-{layer} may hold: {', '.join(sorted(known)) or 'nothing yet'}",
        )


def binds(job: Job) -> tuple[tuple[str, str], ...]:
    """What an image without files of its own shows of the place around: (source, target)."""
    return job.image.binds if job.image else ()


def hostname(job: Job) -> str:
    return job.spec.hostname or job.id[:12]


def volume_source(job: Job, volume: Volume) -> str:
    """The path of what a volume shows; a named one's data is a directory of that name."""
    return f"{job.volumes}/{volume.source}" if volume.named else volume.source


def volume_lines(job: Job, volume: Volume) -> tuple[tuple[int, int, int], ...]:
    """Named volumes and root's keep every number inside; another caller's files belong to root inside, no others do."""
    if volume.named or job.caller_uid == 0:
        return ((0, job.uid_base, job.uid_count),)
    return ((job.caller_uid, job.uid_base, 1),)


def check_owners(job: Job) -> None:
    """Raises Unsupported where ``volume_lines`` would not do."""
    uid, gid = job.caller_uid, job.caller_gid
    if uid != gid and not all(volume.named for volume in job.spec.volumes):
        raise Unsupported(
            f"volumes of a caller with user {uid} and group {gid} are not supported: one map serves both numbers",
            hint=f"run it as root, or with a primary group of the number {uid}",
        )


def upper(job: Job) -> str:
    """The directory that everything writable is in, bounded as a whole."""
    return job.upper or f"{job.dir}/upper"


def upper_steps(job: Job, owner: int) -> tuple[Step, ...]:
    """The bounded directory with the overlay's two inside: ``u``, owned by root inside, and ``w``, the kernel's own.

    Nobody but root inside may look into it. Without btrfs it is memory: no more than the environment may use anyway,
    and gone when it ends. The subvolume comes twice, because steps are undone backwards: deleting it whole is quick,
    emptying it file by file first is not.
    """
    at = upper(job)
    whole = MakeDir(at, 0o700, owner, owner, keep=True)
    parts = (MakeDir(f"{at}/u", 0o755, owner, owner, keep=True), MakeDir(f"{at}/w", 0o700, keep=True))
    if job.upper_bounded:
        return (whole, *parts)
    if job.upper:
        volume = Subvolume(at, job.spec.disk_bytes, keep=True)
        return (volume, whole, *parts, volume)
    size = min(job.spec.disk_bytes, job.spec.memory_bytes or job.spec.disk_bytes)
    options = f"size={size},mode=0700,uid={owner},gid={owner}"
    return (whole, Mount("tmpfs", at, "tmpfs", options, MS_NOSUID | MS_NODEV), *parts)


def root_steps(
    job: Job, image: ImageRef, *, idmap: tuple[tuple[int, int, int], ...] = (), read_only: bool = False
) -> tuple[Step, ...]:
    """An overlay of the image and the upper directory at ``dir/rootfs``.

    An overlay itself can't be idmapped (EINVAL), the EROFS under it can. ``volatile``: no sync on unmount, because
    nobody mounts this upper directory again after a crash of the host.
    """
    at, lower, rootfs = upper(job), image.mount, f"{job.dir}/rootfs"
    steps: list[Step] = []
    if idmap:
        lower = f"{job.dir}/image"
        attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
        steps += [MakeDir(lower, 0o700), Idmap(image.mount, lower, idmap, attributes)]
    options = f"lowerdir={lower},upperdir={at}/u,workdir={at}/w,volatile"
    flags = MS_NODEV | (MS_RDONLY if read_only else 0)
    return (*steps, MakeDir(rootfs, 0o755), Mount("overlay", rootfs, "overlay", options, flags))


def main(job: Job, host: str) -> Command:
    """The application's command; what neither spec nor image says is the place's own."""
    image = job.image
    env = {"PATH": PATH}
    env |= {"HOSTNAME": host} if host else {}
    env |= {"TERM": "xterm"} if job.spec.tty else {}
    env |= dict(image.env) if image else {}
    env |= dict(job.env)
    return Command(
        argv=job.command,
        env=tuple(env.items()),
        cwd=job.spec.working_dir or (image.working_dir if image else "") or "/",
        user=job.spec.user or (image.user if image else ""),
        after=job.after,
    )
