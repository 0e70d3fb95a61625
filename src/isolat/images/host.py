"""The image ``host``: this machine's own programs, ready at once, without a download.

A skeleton of a few hundred small files is packed; ``/usr`` in it is an empty directory over which this machine's /usr
is bound, read-only (``ImageConfig.binds``). What is seen inside is /usr and nothing else of the machine: /etc is made
here from what is public on every Debian (a minimal passwd and group, the linker's cache, /etc/alternatives as far as
it leads into /usr, the distribution's certificates), without users, host name, network or keys.

Programs are those of the moment: an upgrade of the machine is seen inside at once. So it is an image for trying and for
tools, not for keeping. Files below /usr that only root may read stay closed to environments with their own uid range.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from isolat.deadline import NEVER, Deadline
from isolat.errors import Unsupported
from isolat.images import tidy
from isolat.images.image import Image, ImageConfig
from isolat.images.progress import Progress, no_progress
from isolat.images.store import ImageStore

NAME = "host:latest"
_TOPS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_DIRS = ("dev", "etc", "home", "mnt", "opt", "proc", "run", "srv", "sys", "usr", "var")
_VAR_DIRS = ("var/cache", "var/lib", "var/log", "var/spool")
_STICKY_DIRS = ("tmp", "var/tmp")

_PASSWD = """\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
bin:x:2:2:bin:/bin:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUP = """\
root:x:0:
daemon:x:1:
bin:x:2:
adm:x:4:
tty:x:5:
www-data:x:33:
utmp:x:43:
users:x:100:
nogroup:x:65534:
"""
_HOSTS = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
"""
_NSSWITCH = """\
passwd: files
group: files
shadow: files
hosts: files dns
networks: files
protocols: files
services: files
"""
_FILES = {
    "etc/group": _GROUP,
    "etc/hostname": "",
    "etc/hosts": _HOSTS,
    "etc/machine-id": "",
    "etc/nsswitch.conf": _NSSWITCH,
    "etc/passwd": _PASSWD,
    "etc/resolv.conf": "",
}
_COPIED = ("etc/ld.so.cache", "etc/ld.so.conf", "etc/debian_version", "etc/protocols", "etc/services")
_CERTIFICATES = Path("usr/share/ca-certificates/mozilla")


def bootstrap(
    store: ImageStore, d: Deadline = NEVER, progress: Progress = no_progress, machine: Path = Path("/")
) -> Image:
    """Make the image ``host`` from ``machine`` (elsewhere than / only in tests)."""
    if not (machine / "usr/bin").is_dir():
        raise Unsupported(f"{machine}usr/bin is not there: the image `host` needs this machine's /usr")
    with store.build() as build:
        tree = build.path / "tree"
        progress("making the skeleton", 0, 2)
        binds = make_skeleton(tree, machine)
        tidy.clamp_times(tree, 0)
        progress("packing the file system", 1, 2)
        config = ImageConfig(kind="host", command=("bash",), binds=binds, source="this machine's /usr")
        image = build.finish(tree, config, [NAME], d)
    progress(f"made image {image.digest[:12]}", 2, 2)
    return image


def make_skeleton(tree: Path, machine: Path) -> tuple[tuple[str, str], ...]:
    """Fill ``tree``; say what is to be bound over it: /usr, and /bin and so on where they are not links into it."""
    tree.mkdir(mode=0o755)
    tree.chmod(0o755)
    for name in (*_DIRS, *_VAR_DIRS):
        _directory(tree / name, 0o755)
    for name in _STICKY_DIRS:
        _directory(tree / name, 0o1777)
    _directory(tree / "root", 0o700)
    (tree / "var/run").symlink_to("/run")
    (tree / "var/lock").symlink_to("/run/lock")
    (tree / "etc/mtab").symlink_to("/proc/mounts")
    for name, text in _FILES.items():
        _file(tree / name, text.encode())
    _copy_public(tree, machine)
    return (("/usr", "/usr"), *_tops(tree, machine))


def _directory(path: Path, mode: int) -> None:
    path.mkdir(exist_ok=True)
    path.chmod(mode)


def _file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o644)


def _tops(tree: Path, machine: Path) -> list[tuple[str, str]]:
    binds = []
    for name in _TOPS:
        source = machine / name
        if source.is_symlink():
            (tree / name).symlink_to(source.readlink())
        elif source.is_dir():
            _directory(tree / name, 0o755)
            binds.append((f"/{name}", f"/{name}"))
    return binds


def _copy_public(tree: Path, machine: Path) -> None:
    for name in _COPIED:
        if (machine / name).is_file():
            _file(tree / name, (machine / name).read_bytes())
    _directory(tree / "etc/ld.so.conf.d", 0o755)
    for source in sorted(machine.glob("etc/ld.so.conf.d/*.conf")):
        _file(tree / "etc/ld.so.conf.d" / source.name, source.read_bytes())
    _directory(tree / "etc/alternatives", 0o755)
    for link in sorted(machine.glob("etc/alternatives/*")):
        if link.is_symlink() and link.readlink().is_relative_to("/usr"):
            (tree / "etc/alternatives" / link.name).symlink_to(link.readlink())
    if (machine / "usr/lib/os-release").is_file():
        (tree / "etc/os-release").symlink_to("../usr/lib/os-release")
    _certificates(tree, machine)


def _certificates(tree: Path, machine: Path) -> None:
    """One bundle of the distribution's certificates; one that was added to this machine says whose it is."""
    _directory(tree / "etc/ssl", 0o755)
    _directory(tree / "etc/ssl/certs", 0o755)
    found = sorted((machine / _CERTIFICATES).glob("*.crt"))
    if found:
        with (tree / "etc/ssl/certs/ca-certificates.crt").open("wb") as bundle:
            for certificate in found:
                with certificate.open("rb") as source:
                    shutil.copyfileobj(source, bundle)
        (tree / "etc/ssl/certs/ca-certificates.crt").chmod(0o644)
