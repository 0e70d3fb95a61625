"""Jobs and machines to plan for, all invented: a plan must not depend on the machine that the tests run on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from isolat.layers.base import ImageRef, Job, MachineKit, Probe
from isolat.places.base import CgroupFacts, CgroupMode, Facts
from isolat.spec.model import Spec

V1 = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")
V1_MOUNTS = (*((name, f"/sys/fs/cgroup/{name}") for name in V1), ("name=systemd", "/sys/fs/cgroup/systemd"))
CGROUPS = {
    "v1": CgroupFacts(CgroupMode.V1, V1_MOUNTS),
    "hybrid": CgroupFacts(CgroupMode.HYBRID, (*V1_MOUNTS, ("unified", "/sys/fs/cgroup/unified"))),
    "v2": CgroupFacts(CgroupMode.V2, (("unified", "/sys/fs/cgroup"),)),
}
TOOLS = (("crun", "/usr/bin/crun"), ("runc", "/usr/sbin/runc"))
FEATURES = ("userns", "overlay", "erofs", "erofs-file", "idmap", "btrfs")
PROBE = Probe(True, data=(("oci:crun", "/usr/bin/crun"), ("oci:runc", "/usr/sbin/runc"), ("host-file", "/etc/hosts")))
IMAGE = ImageRef(
    digest="0" * 64,
    mount="/state/images/mounts/debian",
    env=(("LANG", "C.UTF-8"),),
    command=("bash",),
    working_dir="/srv",
    file="/state/images/debian.erofs",
)


KIT = MachineKit(
    qemu="/usr/bin/qemu-system-x86_64",
    qemu_version="7.2.22",
    qemu_identity="7.2.22 of a test",
    sandbox=True,
    accel="tcg",
    accel_reason="there is no /dev/kvm",
    tsc_khz=2000000,
    release="6.1.0-1-cloud-amd64",
    kernel="/guest/kernel/vmlinux",
    initramfs="/guest/initramfs.cpio",
    tools="/state/guest/tools.erofs",
    guest_key="1" * 64,
    jail="/state/mounts/jail",
    pc="/usr/bin/qemu-system-x86_64",
    virtiofsd="/usr/lib/qemu/virtiofsd",
)


def facts(mode: str = "hybrid", **changes: Any) -> Facts:
    whole = Facts(
        kernel="6.18.0",
        machine="x86_64",
        cgroups=CGROUPS[mode],
        tools=TOOLS,
        features=FEATURES,
        cpus=4,
        memory_bytes=16 << 30,
        root=True,
    )
    return replace(whole, **changes)


def job(mode: str = "hybrid", *, spec: dict[str, Any] | None = None, **changes: Any) -> Job:
    id = "0123456789abcdef0123456789abcdef"
    whole = Job(
        id=id,
        spec=Spec(image="debian", **(spec or {})),
        dir=f"/state/envs/{id}",
        facts=facts(mode),
        image=IMAGE,
        machine=KIT,
        uid_base=0x4007_0000,
        upper=f"/state/pool/{id}",
        cgroup=f"/isolat/tag/{id}",
        libexec="/libexec",
        runtime_root="/state/runtime",
        command=("sh", "-c", "true"),
        env=(("PATH", "/usr/bin:/bin"),),
    )
    return replace(whole, **changes)
