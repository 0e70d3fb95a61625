"""The host layer: no decoupling at all, the baseline that the others are measured against.

The command runs on this kernel, with the host's processes, network and users, its root changed to the image and in a
control group of its own. That keeps nothing in: root can leave a changed root at will (chroot(2)).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from isolat.deadline import Deadline
from isolat.errors import InternalError
from isolat.layers import common, files
from isolat.layers.base import Boundary, Capabilities, Frame, Job, Layer, Plan, Probe
from isolat.linux import cgroup
from isolat.places.base import CgroupMode, Facts, Needs, Place
from isolat.places.rooted import RootedPlace
from isolat.places.steps import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    Cgroup,
    Idmap,
    Mount,
    Run,
    Step,
)

SYSTEM = MS_NOSUID | MS_NOEXEC | MS_NODEV
ALL_IDS = ((0, 0, 0xFFFFFFFF),)
SAME_IDS = ((0, 0, 65536),)  # an image's binds keep their owners; the clone is only there to be read-only


class HostLayer(Layer):
    name: ClassVar[str] = "host"
    capabilities: ClassVar[Capabilities] = Capabilities(
        boundary=Boundary.NONE,
        enter=True,
        limits=frozenset({"memory", "cpus", "pids", "disk"}),
        networks=frozenset({"host", "none"}),
        volumes=True,
        read_only=True,
        users=True,
        copies=True,
        apart=True,
    )

    def probe(self, place: Place, d: Deadline) -> Probe:
        """Ready where root is given, with overlayfs and control groups: nothing else is used."""
        facts = place.facts
        if not facts.root:
            return Probe(False, "it needs root, and the place does not give it", "put it on the machine, as root")
        missing = [name for name in ("overlay", "idmap") if name not in facts.features]
        if missing:
            return Probe(False, f"the kernel {facts.kernel} lacks {', '.join(missing)}", "use Linux 5.19 or later")
        if facts.cgroups.mode is CgroupMode.NONE:
            return Probe(False, "no control groups are mounted, so nothing could be limited", "mount cgroup2")
        return Probe(True)

    def plan(self, job: Job, probe: Probe) -> Plan:
        common.check(job, self.name, self.capabilities)
        common.check_options(self.name, job.spec.option(self.name), ())
        image = common.image_of(job, self.name)
        rootfs, volumes = f"{job.dir}/rootfs", job.spec.volumes
        steps: tuple[Step, ...] = (
            *common.upper_steps(job, 0),
            *_cgroup(job),
            *common.root_steps(job, image, read_only=job.spec.read_only and not volumes),
            *_binds(job, rootfs),
            Mount("proc", f"{rootfs}/proc", "proc", flags=SYSTEM),
            Mount("sysfs", f"{rootfs}/sys", "sysfs", flags=SYSTEM | MS_RDONLY),
            Mount("/dev", f"{rootfs}/dev", "", flags=MS_BIND | MS_REC),
            *_volumes(job, rootfs),
        )
        if volumes and job.spec.read_only:  # only now: places to mount volumes at may have had to be made
            steps += (Mount("", rootfs, "", flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NODEV),)
        join = cgroup.procs_files(job.facts.cgroups, job.cgroup, cgroup.PLAIN_V1)
        main = replace(common.main(job, ""), root=rootfs, cgroup_files=join) if job.command else None
        needs = Needs(job.spec.memory_bytes, job.spec.cpus, job.spec.disk_bytes, (image.digest,))
        return Plan(steps=steps, main=main, main_in_guest=False, needs=needs)

    def inside(self, frame: Frame, place: Place) -> Place:
        """The same place, with the root changed and the control group joined by every process."""
        if frame.main is None:
            raise InternalError("the host layer was entered without an application: it can't be part of a stack")
        return RootedPlace(place, frame.main.root, frame.main.cgroup_files)

    # its files

    def copier(self, frame: Frame, place: Place, agent: str) -> files.Copier:
        return files.Copier(place, agent, ("--root", files.overlay_of(frame).at))

    def root(self, frame: Frame, *, write: bool) -> files.Root:
        files.check_kept(frame)
        return files.overlay_of(frame).again(write=write)

    def writable(self, frame: Frame, facts: Facts) -> files.Writable:
        return files.of_overlay(frame, facts, ())


def _cgroup(job: Job) -> tuple[Step, ...]:
    facts = job.facts.cgroups
    paths = cgroup.directories(facts, job.cgroup, cgroup.PLAIN_V1)
    if not paths:
        return ()
    return (Cgroup(paths, cgroup.writes(facts, job.cgroup, cgroup.limits_of(job.spec))),)


def _binds(job: Job, rootfs: str) -> tuple[Step, ...]:
    attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    binds = common.binds(job)
    return tuple(Idmap(source, f"{rootfs}{target}", SAME_IDS, attributes) for source, target in binds)


def _volumes(job: Job, rootfs: str) -> tuple[Step, ...]:
    """Each volume as it is, then at its target as those see it whose root is the image: its links lead nowhere else.

    That is what the agent does in a machine, too. What it has mounted goes with the root.
    """
    steps: list[Step] = []
    for n, volume in enumerate(job.spec.volumes):
        at, mode = f"{job.dir}/volumes/{n}", "ro" if volume.read_only else "rw"
        attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (MOUNT_ATTR_RDONLY if volume.read_only else 0)
        descriptor = n if job.opened else -1
        steps.append(Idmap(common.volume_source(job, volume), at, ALL_IDS, attributes, descriptor))
        steps.append(Run((f"{job.libexec}/isolat-agent", "--bind", at, rootfs, volume.target, mode)))
    return tuple(steps)
