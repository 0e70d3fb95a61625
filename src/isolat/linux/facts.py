"""What this machine is and has, recorded once as data: the input of every plan that is carried out on it.

Nothing is assumed from a distribution's name. Features are found by asking the kernel where that is cheap, else from
what it lists; what only a longer trial can tell (does KVM really run a guest?) is the probe of the layer that needs it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from isolat.linux import mounts
from isolat.places.base import CgroupFacts, CgroupMode, Facts

CGROUP_BASE_VARIABLE = "ISOLAT_CGROUP_BASE"
UNIFIED = "unified"
TOOL_DIRS = ("/usr/sbin", "/sbin")
TOOLS = (
    "apparmor_parser",
    "btrfs",
    "crun",
    "ip",
    "java",
    "mkfs.btrfs",
    "mkfs.erofs",
    "mmdebstrap",
    "nft",
    "qemu-img",
    "qemu-system-x86_64",
    "qemu-system-x86_64-microvm",
    "runc",
    "runsc",
    "setpriv",
    "skopeo",
    "systemd-run",
    "unshare",
    "virsh",
    "wasmtime",
    "youki",
)
_FILESYSTEMS = ("btrfs", "erofs", "fuse", "overlay", "squashfs", "xfs")
_NAMESPACES = {"user": "userns", "pid": "pidns", "net": "netns", "cgroup": "cgroupns", "time": "timens"}
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_MOUNT_SETATTR = 442
_LANDLOCK_CREATE_RULESET_VERSION = 1
_EROFS_FILE_SINCE = (6, 12)
_EROFS_IDMAP_SINCE = (5, 19)


def record_facts() -> Facts:
    """This machine, now. A few milliseconds; never raises for something that is merely absent."""
    kernel = os.uname().release
    return Facts(
        kernel=kernel,
        machine=os.uname().machine,
        cgroups=record_cgroups(),
        tools=find_tools(),
        features=find_features(kernel),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        root=os.geteuid() == 0,
    )


def record_cgroups() -> CgroupFacts:
    own = _read("/proc/self/cgroup")
    override = os.environ.get(CGROUP_BASE_VARIABLE, "")
    found = parse_cgroups(_read("/proc/self/mountinfo"), own, override)
    if found.mode is CgroupMode.V2 and not override:
        delegated = _delegated_base(found.mount(UNIFIED) or "", unified_path(own))
        return CgroupFacts(found.mode, found.mounts, delegated or "/")
    return found


def parse_cgroups(mountinfo: str, own: str, base: str = "") -> CgroupFacts:
    """The mode, and where each controller is mounted, from /proc/self/mountinfo and /proc/self/cgroup (cgroups(7)).

    A v1 mount says its controllers among its options; the kernel's own list of them is the first column of ``own``.
    Ours go to the root of every hierarchy unless ``base`` says otherwise: whoever started us may be moved or removed.
    """
    known = {name for line in own.splitlines() for name in line.split(":", 2)[1].split(",") if name}
    found: dict[str, str] = {}
    for entry in mounts.parse_mountinfo(mountinfo):
        if entry.fstype == "cgroup2":
            found.setdefault(UNIFIED, entry.target)
        elif entry.fstype == "cgroup":
            for name in known.intersection(entry.super_options):
                found.setdefault(name, entry.target)
    v1 = [name for name in found if name != UNIFIED]
    if v1:
        mode = CgroupMode.HYBRID if UNIFIED in found else CgroupMode.V1
    else:
        mode = CgroupMode.V2 if found else CgroupMode.NONE
    return CgroupFacts(mode, tuple(sorted(found.items())), _clean_base(base))


def _clean_base(base: str) -> str:
    parts = [part for part in base.split("/") if part not in ("", ".", "..")]
    return "/" + "/".join(parts)


def unified_path(own: str) -> str:
    """This process's place in the unified hierarchy: the line ``0::/…``."""
    for line in own.splitlines():
        if line.startswith("0::"):
            return line[3:]
    return "/"


def _delegated_base(mount: str, path: str) -> str:
    """The nearest control group above us that systemd has delegated (systemd.resource-control(5), Delegate=).

    systemd marks it with the extended attribute trusted.delegate, and since version 251 with user.delegate.
    """
    parts = [part for part in path.split("/") if part]
    for length in range(len(parts), 0, -1):
        below = "/" + "/".join(parts[:length])
        if any(_attribute(mount + below, name) == b"1" for name in ("trusted.delegate", "user.delegate")):
            return below
    return ""


def _attribute(path: str, name: str) -> bytes:
    try:
        return os.getxattr(path, name)
    except OSError:
        return b""


def find_tools(names: Iterable[str] = TOOLS, path: str | None = None) -> tuple[tuple[str, str], ...]:
    """Those of ``names`` that are there, with their absolute paths: in PATH, then where a user's PATH often ends."""
    wanted = os.environ.get("PATH", os.defpath) if path is None else path
    directories = [part for part in wanted.split(os.pathsep) if part.startswith("/")]
    directories += [part for part in TOOL_DIRS if part not in directories] if path is None else []
    found = []
    for name in sorted(names):
        where = next((f"{part}/{name}" for part in directories if _executable(f"{part}/{name}")), None)
        if where is not None:
            found.append((name, where))
    return tuple(found)


def _executable(path: str) -> bool:
    return os.access(path, os.X_OK) and not os.path.isdir(path)  # noqa: PTH112 - a hundred paths at every start


def find_features(kernel: str) -> tuple[str, ...]:
    """Names of what the kernel offers, sorted."""
    found = {name for name in _FILESYSTEMS if _filesystem(name, kernel)}
    found |= {feature for name, feature in _NAMESPACES.items() if Path("/proc/self/ns", name).exists()}
    if _read("/proc/sys/user/max_user_namespaces").strip() == "0":
        found.discard("userns")
    version = kernel_version(kernel)
    if "erofs" in found and version >= _EROFS_FILE_SINCE:
        found.add("erofs-file")
    if _has_mount_setattr():
        found.add("idmap")
        if "erofs" in found and version >= _EROFS_IDMAP_SINCE:
            found.add("erofs-idmap")
    found |= {name for name, path in (("kvm", "/dev/kvm"), ("tun", "/dev/net/tun")) if _opens(path)}
    found |= {"loop"} if Path("/dev/loop-control").exists() else set()
    found |= {"seccomp"} if "errno" in _read("/proc/sys/kernel/seccomp/actions_avail").split() else set()
    found |= {"landlock"} if _landlock_version() > 0 else set()
    found |= {"binfmt-misc"} if Path("/proc/sys/fs/binfmt_misc").is_dir() else set()
    found |= {"apparmor"} if _read("/sys/module/apparmor/parameters/enabled").startswith("Y") else set()
    return tuple(sorted(found))


def kernel_version(release: str) -> tuple[int, int]:
    """Major and minor number of a release such as ``6.1.0-18-amd64``; (0, 0) for one of another form."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def _filesystem(name: str, kernel: str) -> bool:
    """Known to the kernel, or there as a module, which mount(2) loads by itself."""
    if any(line.split()[-1] == name for line in _read("/proc/filesystems").splitlines() if line.strip()):
        return True
    directory = Path("/lib/modules", kernel, "kernel/fs", "overlayfs" if name == "overlay" else name)
    return any(directory.glob(f"{name}.ko*"))


def _has_mount_setattr() -> bool:
    """mount_setattr(2) with a null structure: EINVAL where it exists (Linux 5.12), ENOSYS where not."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_SYS_MOUNT_SETATTR, -1, b"", 0, None, ctypes.c_size_t(0))
    return ctypes.get_errno() != errno.ENOSYS


def _landlock_version() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION))


def _opens(path: str) -> bool:
    """A character device that really opens: a node alone says nothing."""
    try:
        if not stat.S_ISCHR(os.stat(path).st_mode):  # noqa: PTH116
            return False
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="surrogateescape")
    except OSError:
        return ""
