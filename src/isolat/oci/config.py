"""An OCI bundle's ``config.json`` as a pure function of what the container layer decided.

Only what every OCI runtime understands (OCI runtime specification 1.0.2, config and config-linux); nothing here is
crun's alone. What is set and why is told in docs/layers/container.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from isolat.linux.cgroup import Limits, oci_resources
from isolat.oci.capabilities import oci_capabilities
from isolat.oci.seccomp import oci_seccomp

OCI_VERSION = "1.0.2"
DEV_BYTES = 64 << 10
SHM_BYTES = 64 << 20

# Read through a bind of /dev/null, or an empty read-only tmpfs for a directory. Docker's, and then what a kernel
# shows to everybody by default (mode 0444) about the machine and its other users; /proc/pressure even takes
# triggers from everybody (mode 0666). What only the host's root may read (slabinfo, vmallocinfo, kpageflags, …) is
# closed by the user namespace already.
MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/proc/cmdline", "/proc/config.gz", "/proc/iomem", "/proc/ioports", "/proc/kallsyms", "/proc/key-users",
    "/proc/kmsg", "/proc/modules", "/proc/pressure", "/proc/softirqs", "/sys/kernel/notes", "/sys/kernel/vmcoreinfo",
)  # fmt: skip

READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

# type, major, minor; -1: every minor. The nodes themselves are binds of the host's: a user namespace can't mknod.
DEVICES = (
    (1, 3),  # null
    (1, 5),  # zero
    (1, 7),  # full
    (1, 8),  # random
    (1, 9),  # urandom
    (5, 0),  # tty
    (5, 2),  # ptmx
    (136, -1),  # pts/N
)


@dataclass(frozen=True)
class Bind:
    """Something of the place around, seen at ``target`` inside."""

    source: str
    target: str
    read_only: bool = False
    executable: bool = True


@dataclass(frozen=True)
class Memory:
    """A tmpfs inside."""

    target: str
    size_bytes: int


@dataclass(frozen=True)
class Bundle:
    """All that ``config.json`` says, before it is said."""

    rootfs: str
    args: tuple[str, ...]
    hostname: str
    machine: str
    uid_base: int
    uid_count: int
    limits: Limits
    cgroups_path: str = ""  # empty: the machine has no control groups
    own_groups: bool = False  # the runtime is started in its groups, with their limits set
    read_only: bool = False
    host_network: bool = False
    compat32: bool = False
    shm_bytes: int = SHM_BYTES
    binds: tuple[Bind, ...] = ()
    memories: tuple[Memory, ...] = ()


def _mount(kind: str, source: str, target: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _system_mounts(b: Bundle) -> list[dict[str, Any]]:
    closed = ("nosuid", "noexec", "nodev")
    return [
        _mount("proc", "proc", "/proc", *closed),
        _mount("tmpfs", "tmpfs", "/dev", "nosuid", "noexec", "strictatime", "mode=755", f"size={DEV_BYTES}"),
        _mount(
            "devpts", "devpts", "/dev/pts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("tmpfs", "shm", "/dev/shm", *closed, "mode=1777", f"size={b.shm_bytes}"),
        _mount("mqueue", "mqueue", "/dev/mqueue", *closed),
        _sys_mount(b),
        *([_mount("cgroup", "cgroup", "/sys/fs/cgroup", *closed, "relatime", "ro")] if b.cgroups_path else []),
    ]


def _sys_mount(b: Bundle) -> dict[str, Any]:
    """sysfs belongs to a network namespace: one that is not ours can't be mounted anew, only bound."""
    if b.host_network:
        return _mount("bind", "/sys", "/sys", "rbind", "nosuid", "noexec", "nodev", "ro")
    return _mount("sysfs", "sysfs", "/sys", "nosuid", "noexec", "nodev", "ro")


def _bind(bind: Bind) -> dict[str, Any]:
    options = ["bind", "nosuid", "nodev"]
    if bind.read_only:
        options.append("ro")
    if not bind.executable:
        options.append("noexec")
    return _mount("bind", bind.source, bind.target, *options)


def _mounts(b: Bundle) -> list[dict[str, Any]]:
    """The system's first, then ours by depth, so that a mount never hides one made before it below itself."""
    ours = [(bind.target, _bind(bind)) for bind in b.binds]
    for memory in b.memories:
        options = ("nosuid", "noexec", "nodev", "mode=1777", f"size={memory.size_bytes}")
        ours.append((memory.target, _mount("tmpfs", "tmpfs", memory.target, *options)))
    ours.sort(key=lambda pair: pair[0].rstrip("/").count("/"))
    return [*_system_mounts(b), *(mount for _, mount in ours)]


def _namespaces(b: Bundle) -> list[dict[str, str]]:
    kinds = ["pid", "ipc", "uts", "mount", "user"]
    if not b.host_network:
        kinds.append("network")
    if b.cgroups_path:
        kinds.append("cgroup")
    return [{"type": kind} for kind in kinds]


def device_rules() -> tuple[str, ...]:
    """The devices that are allowed, as the v1 hierarchy wants to be told."""
    return tuple(f"c {major}:{'*' if minor < 0 else minor} rw" for major, minor in DEVICES)


def _devices() -> list[dict[str, Any]]:
    """Deny all, then allow these. The user namespace and ``nodev`` everywhere say the same twice more."""
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    for major, minor in DEVICES:
        rule: dict[str, Any] = {"allow": True, "type": "c", "major": major, "access": "rw"}
        rules.append(rule if minor < 0 else rule | {"minor": minor})
    return rules


def _sysctl(b: Bundle) -> dict[str, str]:
    """In a network of its own, ping and low ports need no capability, as in Docker (ip-sysctl)."""
    if b.host_network:
        return {}
    return {
        "net.ipv4.ip_unprivileged_port_start": "0",
        "net.ipv4.ping_group_range": f"0 {b.uid_count - 1}",
    }


def _linux(b: Bundle) -> dict[str, Any]:
    mapping = [{"containerID": 0, "hostID": b.uid_base, "size": b.uid_count}]
    linux: dict[str, Any] = {
        "namespaces": _namespaces(b),
        "uidMappings": mapping,
        "gidMappings": mapping,
        "seccomp": oci_seccomp(b.machine, compat32=b.compat32),
        "maskedPaths": list(MASKED),
        "readonlyPaths": list(READ_ONLY),
        "sysctl": _sysctl(b),
    }
    if b.cgroups_path and not b.own_groups:
        linux["cgroupsPath"] = b.cgroups_path
        linux["resources"] = {"devices": _devices(), **oci_resources(b.limits)}
    return linux


def config(b: Bundle) -> dict[str, Any]:
    """The whole of ``config.json``.

    No rlimits: the environment inherits the daemon's, because raising one needs a capability that a machine may
    withhold even from root. Never a terminal: those are made by the init inside.
    """
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(b.args),
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": oci_capabilities(),
            "noNewPrivileges": True,
        },
        "root": {"path": b.rootfs, "readonly": b.read_only},
        "hostname": b.hostname,
        "mounts": _mounts(b),
        "linux": _linux(b),
    }


def config_text(b: Bundle) -> str:
    """Compact and in a fixed order: crun keys its cache of compiled filters by bytes."""
    return json.dumps(config(b), separators=(",", ":"))
