"""The Debian packages that Isolat uses: one table, for ``isolat setup``, for ``doctor``'s remedies and for make.

It imports nothing beyond the standard library, because make asks it before anything is installed:
``python3 -S -m isolat.setup.packages required develop`` prints what is missing of these groups, one a line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Group(StrEnum):
    REQUIRED = "required"  # without it something of the first example fails
    OPTIONAL = "optional"  # a further way, or a further layer
    DEVELOP = "develop"  # building and testing Isolat itself
    BENCH = "bench"  # what it is compared with


@dataclass(frozen=True)
class Package:
    name: str
    purpose: str
    group: Group
    layer: str = ""  # empty: for all
    command: str = ""  # a command that it brings, by which it is recognised whoever installed it


PACKAGES = (
    Package("crun", "the OCI runtime that makes containers", Group.REQUIRED, "container", "crun"),
    Package("erofs-utils", "packs the tools of machines (mkfs.erofs)", Group.REQUIRED, command="mkfs.erofs"),
    Package(
        "btrfs-progs", "makes the pool with a disk limit for each environment", Group.REQUIRED, command="mkfs.btrfs"
    ),
    Package("mmdebstrap", "makes Debian images from packages", Group.REQUIRED, command="mmdebstrap"),
    Package("debian-archive-keyring", "the keys that Debian's packages are checked with", Group.REQUIRED),
    Package("gpg", "lets mmdebstrap find the right key", Group.REQUIRED, command="gpg"),
    Package("mount", "mounts inside a root that mmdebstrap is making", Group.REQUIRED, command="mount"),
    Package(
        "util-linux", "unshare and setpriv confine the programs that build images", Group.REQUIRED, command="setpriv"
    ),
    Package(
        "qemu-system-x86", "runs machines with a kernel of their own", Group.REQUIRED, "microvm", "qemu-system-x86_64"
    ),
    Package(
        "qemu-system-common", "shares directories with machines while they run (virtiofsd)", Group.REQUIRED, "microvm"
    ),
    Package("e2fsprogs", "makes the disks of machines (mkfs.ext4)", Group.REQUIRED, "microvm", "mkfs.ext4"),
    Package("lz4", "takes a machine's kernel out of its package", Group.REQUIRED, "microvm", "lz4"),
    Package("grub-common", "packs the boot loader of a whole PC (grub-mkimage)", Group.REQUIRED, "vm", "grub-mkimage"),
    Package("grub-pc-bin", "the boot loader's parts for a BIOS", Group.REQUIRED, "vm"),
    Package("kmod", "lists the modules of a whole PC's kernel (depmod)", Group.REQUIRED, "vm", "depmod"),
    Package("skopeo", "speaks with registries", Group.REQUIRED, command="skopeo"),
    Package("buildah", "builds images from Containerfiles", Group.REQUIRED, command="buildah"),
    Package("qemu-user-static", "runs programs of other architectures (--arch)", Group.OPTIONAL),
    Package("gcc", "compiles the C core and looks for defects in it", Group.DEVELOP, command="gcc"),
    Package("libc6-dev", "headers for the C core's checks", Group.DEVELOP),
    Package("make", "runs the build", Group.DEVELOP, command="make"),
    Package("musl-tools", "links the C core statically, in a few hundred KiB", Group.DEVELOP, command="musl-gcc"),
    Package("linux-libc-dev", "the kernel's headers for the C core", Group.DEVELOP),
    Package("python3-venv", "the environment that tests and tools live in", Group.DEVELOP),
    Package("busybox-static", "the root file system that tests build on", Group.DEVELOP, command="busybox"),
    Package("docker-registry", "a registry, to send images to and fetch them from", Group.DEVELOP),
    Package("umoci", "unpacks images, for comparison with what is made of them here", Group.DEVELOP, command="umoci"),
    Package("procps", "finds processes in tests", Group.DEVELOP, command="pgrep"),
    Package(
        "runc",
        "another OCI runtime (--oci-runtime runc), to hold ours to the standard",
        Group.DEVELOP,
        "container",
        "runc",
    ),
    Package("podman", "what pulling an image is compared with", Group.BENCH, "container", "podman"),
    Package(
        "docker.io",
        "reads our images, writes some, and is what containers are compared with",
        Group.DEVELOP,
        "container",
        "dockerd",
    ),
)


def of_groups(groups: Collection[Group]) -> tuple[Package, ...]:
    return tuple(package for package in PACKAGES if package.group in groups)


def package_of_command(command: str) -> Package | None:
    """The package that brings a command, for remedies."""
    return next((package for package in PACKAGES if package.command == command), None)


def parse_installed(text: str) -> dict[str, str]:
    """Name to version of what is installed, from lines of dpkg-query: package, status, version."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        status, _, version = rest.partition(" ")
        if status == "installed":
            found[name] = version
    return found


def installed(names: Iterable[str]) -> dict[str, str]:
    """Name to version, of those that are installed. Nothing where there is no dpkg."""
    try:
        answer = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status} ${Version}\n", *names],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_installed(answer.stdout)


def missing(groups: Collection[Group]) -> tuple[Package, ...]:
    """What of these groups is neither installed as a package nor there as a command."""
    wanted = of_groups(groups)
    have = installed(package.name for package in wanted)
    return tuple(package for package in wanted if package.name not in have and not _has_command(package))


def _has_command(package: Package) -> bool:
    where = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return bool(package.command) and shutil.which(package.command, path=where) is not None


def install_argv(packages: Iterable[Package]) -> list[str]:
    return [
        *("apt-get", "install", "--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"),
        *(package.name for package in packages),
    ]


def setup(
    yes: bool,
    ask: Callable[[str], bool],
    tell: Callable[[str], None],
    groups: Collection[Group] = (Group.REQUIRED,),
) -> int:
    """Install what is missing, after asking (``yes``: without). The exit code: 0, apt-get's own, or 125.

    What it would install is told first, each package with its purpose.
    """
    wanted = missing(groups)
    if not wanted:
        tell("Everything that Isolat needs is installed.")
        return 0
    for package in wanted:
        tell(f"  {package.name:24} {package.purpose}")
    if shutil.which("apt-get") is None:
        tell("There is no apt-get here: install the packages above by the means of this system.")
        return 125
    if not yes and not ask(f"Install {len(wanted)} packages with apt-get?"):
        tell("Nothing was installed.")
        return 125
    return _apt(wanted)


def _apt(packages: Sequence[Package]) -> int:
    """apt-get on the caller's terminal; its lists first, because a name may be newer than they are."""
    environment = {
        "DEBIAN_FRONTEND": "noninteractive",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        **_proxies(),
    }
    for argv in (["apt-get", "update"], install_argv(packages)):
        code = subprocess.run(argv, check=False, env=environment).returncode
        if code:
            return code
    return 0


def _proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}


def main(argv: Sequence[str]) -> int:
    groups = [Group(name) for name in argv] or list(Group)
    for package in missing(groups):
        sys.stdout.write(f"{package.name}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
