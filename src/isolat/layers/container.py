"""The container layer: namespaces divide what an application sees, control groups divide what it gets.

The kernel is shared. Every container has a user namespace with a uid range of its own, so that root inside is nobody
outside and an escapee can't even signal a neighbour. Owners are shifted by the mount (mount_setattr(2)), never by
changing files. An OCI runtime makes the namespaces once; from then on the small init inside starts everything through
the wire protocol, which is quicker than the runtime's exec and the same as in a machine.

The order of the steps is the order of dependence, so that undoing them backwards kills first and removes last.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from isolat.deadline import Deadline
from isolat.errors import IsolatError, Unsupported
from isolat.layers import common, files
from isolat.layers.base import Boundary, Capabilities, Frame, Job, Layer, Plan, Probe
from isolat.linux import cgroup
from isolat.oci.config import SHM_BYTES, Bind, Bundle, Memory, config_text, device_rules
from isolat.oci.runtime import Runtime, choose, installed, try_out, version
from isolat.places.base import CgroupFacts, CgroupMode, Command, Facts, Needs, Place
from isolat.places.steps import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    Cgroup,
    Idmap,
    Leftover,
    MakeDir,
    PutFile,
    Run,
    Step,
)

INSIDE_LIBEXEC = "/dev/.isolat"
INIT = "isolat-init"
CLOSED = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
NEEDED_FEATURES = ("userns", "overlay", "idmap")
OPTIONS = frozenset({"compat32", "shm_bytes"})
PROBE_TIMEOUT_S = 10.0
HOST_FILES = ("/etc/hosts", "/etc/resolv.conf")


class ContainerLayer(Layer):
    name: ClassVar[str] = "container"
    capabilities: ClassVar[Capabilities] = Capabilities(
        boundary=Boundary.NAMESPACES,
        enter=True,
        limits=frozenset({"memory", "cpus", "pids", "disk"}),
        networks=frozenset({"none", "host"}),
        volumes=True,
        tmpfs=True,
        read_only=True,
        users=True,
        hostname=True,
        own_uids=True,
        copies=True,
        apart=True,
    )

    def probe(self, place: Place, d: Deadline) -> Probe:
        """Ready when the place says what is needed is there and, on this machine, a container really ran."""
        try:
            return _probe(place.facts, d.sooner(PROBE_TIMEOUT_S))
        except (IsolatError, OSError, ValueError) as error:
            return Probe(ready=False, reason=f"the probe itself failed: {error}", remedy="isolat doctor")

    def plan(self, job: Job, probe: Probe) -> Plan:
        options = _checked(job, self.capabilities)
        image = common.image_of(job, self.name)
        runtime = _runtime(job, probe)
        binds, bind_steps = _outside(job, probe)
        bundle = f"{job.dir}/bundle"
        steps: tuple[Step, ...] = (
            *common.upper_steps(job, job.uid_base),
            *_files(job),
            *_cgroup(job, runtime),
            *common.root_steps(job, image, idmap=((0, job.uid_base, job.uid_count),)),
            *bind_steps,
            MakeDir(bundle, 0o700, keep=True),
            PutFile(f"{bundle}/config.json", config_text(_bundle(job, options, binds, runtime)), 0o600, keep=True),
            _forgetting(job, runtime),
        )
        pidfile = f"{bundle}/guest.pid"
        return Plan(
            steps=steps,
            guest=Command(
                runtime.run(job.id, bundle, pidfile), cgroup_files=_join(job, runtime), control=True, pidfile=pidfile
            ),
            main=common.main(job, common.hostname(job)) if job.command else None,
            needs=Needs(job.spec.memory_bytes, job.spec.cpus, job.spec.disk_bytes, (image.digest,)),
        )

    def inside(self, frame: Frame, place: Place) -> Place:
        """The place that the init is: no mounts, no control groups, no tools we know of."""
        outer = place.facts
        facts = Facts(
            kernel=outer.kernel,
            machine=outer.machine,
            cgroups=CgroupFacts(CgroupMode.NONE),
            cpus=outer.cpus,
            memory_bytes=outer.memory_bytes,
        )
        return place.inside(frame.guest_key, facts)

    # its files

    def copier(self, frame: Frame, place: Place, agent: str) -> files.Copier:
        return files.Copier(self.inside(frame, place), f"{INSIDE_LIBEXEC}/{INIT}")

    def root(self, frame: Frame, *, write: bool) -> files.Root:
        files.check_kept(frame)
        return files.overlay_of(frame).again(write=write)

    def writable(self, frame: Frame, facts: Facts) -> files.Writable:
        return files.of_overlay(frame, facts, files.NAMES)


def _probe(facts: Facts, d: Deadline) -> Probe:
    if not facts.root:
        return Probe(False, "it needs root, and the place does not give it", "put it on the machine, as root")
    missing = [name for name in NEEDED_FEATURES if name not in facts.features]
    if missing:
        return Probe(False, f"the kernel {facts.kernel} lacks {', '.join(missing)}", "use Linux 5.19 or later")
    if facts.cgroups.mode is CgroupMode.NONE:
        return Probe(False, "no control groups are mounted, so nothing could be limited", "mount cgroup2")
    found = installed(facts)
    if not found:
        return Probe(False, "no OCI runtime was found", "apt-get install crun")
    data = [(f"oci:{name}", path) for name, path in found]
    if facts.kernel != os.uname().release:
        return Probe(True, data=tuple(data), warnings=("not tried: the place is not this machine",))
    versions = tuple((name, version(path, d)) for name, path in found)
    failed = try_out(found[0][1], facts, d)
    if failed:
        reason = f"{found[0][0]} {versions[0][1]} could not run a trial container: {failed}"
        return Probe(False, reason, "isolat doctor", versions, data=tuple(data))
    data += [("host-file", path) for path in HOST_FILES if os.path.exists(path)]  # noqa: PTH110
    return Probe(True, versions=versions, data=tuple(data))


def _runtimes(probe: Probe) -> tuple[tuple[str, str], ...]:
    return tuple((key.removeprefix("oci:"), path) for key, path in probe.data if key.startswith("oci:"))


def _checked(job: Job, capabilities: Capabilities) -> Mapping[str, Any]:
    """The layer's own options. Raises Unsupported for what this layer does not do (yet)."""
    common.check(job, "container", capabilities)
    if not job.spec.init:
        raise Unsupported(
            "a container without an init is not supported: exec, terminals and copies go through the init",
            hint="leave out --no-init; the application is then process 2 and loses nothing but the number 1",
        )
    common.check_owners(job)
    return _options(job)


def _options(job: Job) -> Mapping[str, Any]:
    options = job.spec.option("container")
    common.check_options("container", options, OPTIONS)
    compat32, shm_bytes = options.get("compat32", False), options.get("shm_bytes", SHM_BYTES)
    if not isinstance(compat32, bool):
        raise Unsupported(f"x-container: compat32 is {compat32!r}", hint="it may be true or false")
    if isinstance(shm_bytes, bool) or not isinstance(shm_bytes, int) or shm_bytes <= 0:
        raise Unsupported(f"x-container: shm_bytes is {shm_bytes!r}", hint="it is a number of bytes: 67108864")
    return options


def _files(job: Job) -> tuple[Step, ...]:
    """/etc/hostname, hosts and resolv.conf, in the bounded upper directory because root inside may write them."""
    where, owner, host = f"{common.upper(job)}/etc", job.uid_base, common.hostname(job)
    hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{host}\n"
    texts = (("hostname", f"{host}\n"), ("hosts", hosts), ("resolv.conf", ""))
    files = (PutFile(f"{where}/{name}", text, 0o644, owner, owner, keep=True) for name, text in texts)
    return (MakeDir(where, 0o755, owner, owner, keep=True), *files)


def _runtime(job: Job, probe: Probe) -> Runtime:
    """crun on v1 is started inside its groups, which is quicker (``cgroup.tasks_files``); others make them."""
    runtime = Runtime(choose(job.spec.oci_runtime, _runtimes(probe)), job.runtime_root)
    v1 = job.facts.cgroups.mode in (CgroupMode.V1, CgroupMode.HYBRID)
    return replace(runtime, own_groups=v1 and bool(job.cgroup) and runtime.can_inherit_groups)


def _joined(facts: CgroupFacts) -> tuple[str, ...]:
    """All hierarchies but cpuset: a new cpuset takes no member before it has been given CPUs and memory nodes."""
    return tuple(name for name, _ in cgroup.hierarchies(facts) if name != cgroup.UNPREPARED_V1)


def _join(job: Job, runtime: Runtime) -> tuple[str, ...]:
    facts = job.facts.cgroups
    return cgroup.tasks_files(facts, job.cgroup, _joined(facts)) if runtime.own_groups else ()


def _forgetting(job: Job, runtime: Runtime) -> Step:
    """Undone before the group, which kills what is left: only what the runtime remembers has to go.

    In a machine (whose disk bounds the upper directory) crun makes the group where the plan has it, too, and each start
    of crun is 100 ms of emulation.
    """
    known = runtime.own_groups or (job.upper_bounded and runtime.can_inherit_groups)
    return Leftover(runtime.state(job.id)) if known else Run((), runtime.delete(job.id))


def _cgroup(job: Job, runtime: Runtime) -> tuple[Step, ...]:
    """The group with its limits; where the runtime makes it, the directories that it would leave on a failure.

    In hybrid mode crun then also makes one, with a plain file in it, where the keeper has unmounted the unified
    hierarchy.
    """
    facts = job.facts.cgroups
    if runtime.own_groups:
        limits = cgroup.writes(facts, job.cgroup, cgroup.limits_of(job.spec))
        devices = cgroup.device_writes(facts, job.cgroup, device_rules())
        return (Cgroup(cgroup.directories(facts, job.cgroup, _joined(facts)), (*limits, *devices)),)
    paths = cgroup.directories(facts, job.cgroup)
    hidden = (MakeDir(path) for path in cgroup.hidden_directories(facts, job.cgroup))
    return (*hidden, *((Cgroup(paths),) if paths else ()))


def _outside(job: Job, probe: Probe) -> tuple[tuple[Bind, ...], tuple[Step, ...]]:
    """What is seen inside of the place around: volumes, an image's own binds, and the files of /etc and the init."""
    binds: list[Bind] = []
    steps: list[Step] = []
    for n, volume in enumerate(job.spec.volumes):
        at = f"{job.dir}/volumes/{n}"
        attributes = CLOSED | (MOUNT_ATTR_RDONLY if volume.read_only else 0)
        source, descriptor = common.volume_source(job, volume), n if job.opened else -1
        steps.append(Idmap(source, at, common.volume_lines(job, volume), attributes, descriptor))
        binds.append(Bind(at, volume.target, volume.read_only))
    for n, (source, target) in enumerate(common.binds(job)):
        at = f"{job.dir}/binds/{n}"
        steps.append(Idmap(source, at, ((0, job.uid_base, job.uid_count),), CLOSED | MOUNT_ATTR_RDONLY))
        binds.append(Bind(at, target, read_only=True))
    binds += _etc(job, probe)
    binds.append(Bind(f"{job.libexec}/{INIT}", f"{INSIDE_LIBEXEC}/{INIT}", read_only=True))
    return tuple(binds), tuple(steps)


def _etc(job: Job, probe: Probe) -> list[Bind]:
    """Our own files; on the host's network its own hosts and resolv.conf, to be read only, where it has them."""
    theirs = {path for key, path in probe.data if key == "host-file"} if job.spec.network_mode == "host" else set()
    return [
        Bind(path, path, read_only=True, executable=False)
        if path in theirs
        else Bind(f"{common.upper(job)}{path}", path, executable=False)
        for path in ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
    ]


def _bundle(job: Job, options: Mapping[str, Any], binds: tuple[Bind, ...], runtime: Runtime) -> Bundle:
    spec = job.spec
    limited = job.cgroup and job.facts.cgroups.mode is not CgroupMode.NONE
    return Bundle(
        rootfs=f"{job.dir}/rootfs",
        args=(f"{INSIDE_LIBEXEC}/{INIT}",),
        hostname=common.hostname(job),
        machine=job.facts.machine,
        uid_base=job.uid_base,
        uid_count=job.uid_count,
        limits=cgroup.limits_of(spec),
        cgroups_path=cgroup.runtime_path(job.facts.cgroups, job.cgroup) if limited else "",
        own_groups=runtime.own_groups,
        read_only=spec.read_only,
        host_network=spec.network_mode == "host",
        compat32=options.get("compat32", False),
        shm_bytes=options.get("shm_bytes", SHM_BYTES),
        binds=binds,
        memories=tuple(Memory(tmpfs.target, tmpfs.size_bytes) for tmpfs in spec.tmpfs),
    )
