"""From an image to the disk of a whole PC: partition table, GRUB, ext4 with the distribution's kernel, and our agent.

The root is the image's files and, over them, a small tree of ours: kernel, initrd, modules, agent, and the settings of
a machine that has no network and no hardware. Overlayfs lays one over the other, so nothing is copied, and a symbolic
link of the image is never followed outside it (as copying into a tree would); ``mkfs.ext4 -d`` writes both into the
partition, with the owners, modes and extended attributes that they have. It reads what others wrote, so it is confined
(linux/confine.py); the overlay is mounted in a mount namespace of the same child and goes with it, however it ends.
No loop device, no chroot, nothing of the image is run.

The same input gives the same bytes: fixed UUIDs and hash seed, the present time set by E2FSPROGS_FAKE_TIME (e2fsprogs
1.47.0 does not know SOURCE_DATE_EPOCH yet), GRUB without a time in it. All but one thing: mkfs.ext4 copies each file's
time of change, which nobody can set, so those of our own small tree differ.

The disk is a sparse file, so its size costs nothing; what the guest writes must go somewhere else: it is a base.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from isolat.deadline import NEVER, Deadline
from isolat.errors import StoreError, Unsupported
from isolat.guest import initramfs, modules
from isolat.guest.kernel import Kernel, read_compressed, release_of
from isolat.images import grub, units
from isolat.images.progress import Progress, no_progress
from isolat.linux import child, confine

VERSION = 1  # of what this module makes of the same input
DEVICE = "/dev/vda1"
AGENT = "usr/libexec/isolat/isolat-agent"
INITS = ("lib/systemd/systemd", "usr/lib/systemd/systemd")
IN_INITRD = ("virtio_pci", "virtio_blk", "ext4", "virtio_console")  # the last: an agent also where there is no udev
KERNEL_ARGUMENTS = (
    *("console=tty0", "console=ttyS0", "quiet", "panic=-1", "mitigations=off", "no_timer_check", "nowatchdog"),
    *("random.trust_cpu=on", "audit=0", "lsm=landlock,yama", "cryptomgr.notests", "systemd.show_status=auto"),
)
_UUID = "00000000-0000-4000-8000-000000000003"
_NOBODY = 65534
_SIGNATURE = 0x49534F4C
_TIME_S = 1700000000
_FEATURES = (
    *("has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "flex_bg", "64bit"),
    *("sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize"),
)
_MAKE_S = 900.0
_STAGE = "making a disk"


@dataclass(frozen=True)
class PcKernel:
    """A kernel as a PC's boot loader wants it, with all of its modules."""

    release: str
    vmlinuz: Path
    modules: Path  # the directory /lib/modules/RELEASE


def key(digest: str, release: str, agent: Path, size_bytes: int) -> str:
    """What a disk of this image, kernel, agent and size is called; another when anything that goes into it differs."""
    parts = {
        "version": VERSION,
        "image": digest,
        "kernel": release,
        "agent": _sha256(agent),
        "bytes": size_bytes,
        "arguments": KERNEL_ARGUMENTS,
        "files": units.files(DEVICE),
        "links": units.links(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def find_kernel(tree: Path) -> PcKernel:
    """The kernel in an unpacked package, or in what guest/kernel.py leaves. Raises StoreError where there is none."""
    images = [*tree.glob("vmlinuz"), *sorted(tree.glob("boot/vmlinu[xz]-*"))]
    for vmlinuz in images:
        release = release_of(vmlinuz.read_bytes())
        for directory in (tree / "modules", tree / "lib/modules" / release, tree / "usr/lib/modules" / release):
            if release and directory.is_dir():
                return PcKernel(release, vmlinuz, directory)
    raise StoreError(f"there is no kernel with its modules in {tree}", stage=_STAGE)


def init_of(root: Path) -> str:
    """The path of the image's systemd. Raises Unsupported where it has none."""
    for name in INITS:
        if (root / name).is_file():
            return f"/{name}"
    raise Unsupported(
        "this image has no systemd (/lib/systemd/systemd), so a whole PC can't boot from it",
        hint="use the image debian-systemd, which `isolat image bootstrap debian-systemd` makes; further packages: "
        "`--include NAME,…`",
    )


def check(root: Path) -> None:
    """Raises Unsupported, with the remedy, for an image that can't boot, and where a program is missing here."""
    init_of(root)
    check_tools()


def check_tools() -> None:
    """Raises Unsupported, with the package, where a program that makes disks is missing here."""
    grub.check()
    for program, package in (("mkfs.ext4", "e2fsprogs"), ("depmod", "kmod")):
        if shutil.which(program, path=child.SAFE_PATH) is None:
            raise Unsupported(
                f"could not find {program}, which is required to make a bootable disk",
                hint=f"apt-get install {package}",
            )


def build_disk(
    image_mount: Path,
    kernel_tree: Path,
    agent: Path,
    out: Path,
    size_bytes: int,
    progress: Progress = no_progress,
    d: Deadline = NEVER,
) -> None:
    """Write ``out``, a sparse raw disk, replacing it atomically.

    ``image_mount``: where the image is mounted. ``kernel_tree``: see find_kernel. Beside ``out`` a directory is made
    meanwhile. Raises Unsupported for an image that can't boot, StoreError with mkfs.ext4's last lines when it fails,
    for instance because ``size_bytes`` does not hold the image.
    """
    check(image_mount)
    kernel = find_kernel(kernel_tree)
    d = d.sooner(_MAKE_S)
    size_bytes -= size_bytes % (1 << 20)
    work = Path(tempfile.mkdtemp(prefix=".disk-", dir=out.parent))
    try:
        progress("adding kernel and agent", 0, 3)
        added = work / "added"
        make_added(added, image_mount, kernel, agent, d)
        progress("making the boot loader", 1, 3)
        disk = work / "out" / "disk"
        _make_empty(disk, grub.boot_area(work, size_bytes, _SIGNATURE, d), size_bytes)
        progress("making the file system", 2, 3)
        _make_file_system(disk, image_mount, added, work / "root", size_bytes, d)
        _finish(disk, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    progress("made the disk", 3, 3)


def _make_empty(disk: Path, first: bytes, size_bytes: int) -> None:
    """The file and its directory belong to nobody for as long as mkfs.ext4 writes there."""
    disk.parent.mkdir(mode=0o700)
    with disk.open("xb") as stream:
        stream.write(first)
        stream.truncate(size_bytes)
    for path in (disk.parent, disk):
        os.chown(path, _NOBODY, _NOBODY)


def _finish(disk: Path, out: Path) -> None:
    descriptor = os.open(disk, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchown(descriptor, os.geteuid(), os.getegid())
        os.fchmod(descriptor, 0o400)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    disk.rename(out)


def _make_file_system(disk: Path, lower: Path, added: Path, root: Path, size_bytes: int, d: Deadline) -> None:
    root.mkdir(mode=0o755)
    try:
        child.run(
            overlaid_argv(lower, added, root, disk.parent, mkfs_argv(disk, root, size_bytes)),
            "making the file system",
            d,
            environment={"E2FSPROGS_FAKE_TIME": str(_TIME_S), "MKE2FS_CONFIG": "/dev/null"},
        )
    except StoreError as error:
        error.hint = error.hint or f"if {size_bytes >> 20} MiB don't hold the image, ask for more: --disk"
        raise


def overlaid_argv(lower: Path, added: Path, root: Path, writable: Path, program: list[str]) -> list[str]:
    """``program``, confined, where ``added`` lies over ``lower`` at ``root``: seen by it alone, and gone with it."""
    script = 'mount -t overlay -o "$1" overlay "$2" && shift 2 && exec "$@"'
    options = f"ro,nodev,lowerdir={_escaped(added)}:{_escaped(lower)}"
    return [
        *("setpriv", "--pdeathsig", "KILL", "--", "unshare", "--mount", "--propagation", "private", "--"),
        *("sh", "-c", script, "sh", options, str(root)),
        *(sys.executable, "-I", "-S", str(Path(confine.__file__).resolve())),
        *("--read", str(root), "--write", str(writable), "--user", "--"),
        *program,
    ]


def _escaped(path: Path) -> str:
    """A backslash before what overlayfs and mount(8) would take for a separator (filesystems/overlayfs.rst)."""
    text = str(path)
    if "," in text or '"' in text:
        raise StoreError(f"a path with a comma can't be a layer of an overlay: {text}", stage=_STAGE)
    return text.replace("\\", "\\\\").replace(":", "\\:")


def mkfs_argv(disk: Path, root: Path, size_bytes: int) -> list[str]:
    """The partition's ext4. What a sparse file reads as zeros is not written, and not by the guest's kernel either."""
    offset = grub.GAP_SECTORS * grub.SECTOR_BYTES
    extended = (
        f"offset={offset},hash_seed={_UUID},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,"
        "assume_storage_prezeroed=1,nodiscard"
    )
    return [
        *("mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-U", _UUID),
        *("-L", "root", "-J", "size=32", "-O", f"none,{','.join(_FEATURES)}", "-E", extended),
        *("-d", str(root), str(disk), f"{(size_bytes - offset) >> 10}k"),
    ]


# what is added to the image


def make_added(added: Path, image: Path, kernel: PcKernel, agent: Path, d: Deadline) -> None:
    """The tree that is laid over the image, all of it root's and of one time."""
    added.mkdir(mode=0o755)
    added.chmod(0o755)
    for name, text in units.files(DEVICE).items():
        _put(added / name, text.encode())
    _put(added / "boot/grub/grub.cfg", grub.configuration(" ".join((f"root={DEVICE} rw", *KERNEL_ARGUMENTS))).encode())
    _put(added / "boot/vmlinuz", kernel.vmlinuz.read_bytes())
    _put(added / "boot/initrd.img", initrd(kernel, agent, init_of(image)))
    _put(added / AGENT, agent.read_bytes(), 0o755)
    for name, target in units.links().items():
        _parents(added / name)
        (added / name).symlink_to(target)
    _put_modules(added, image, kernel, d)
    _set_times(added)


def initrd(kernel: PcKernel, agent: Path, init: str) -> bytes:
    """The agent as /init, which mounts the disk's root and becomes its init (native/switchroot.c)."""
    found = modules.closure(Kernel(kernel.release, kernel.vmlinuz, kernel.modules), required=IN_INITRD, wanted=())
    entry, file, directory = initramfs.Entry, 0o100000, 0o040755
    order = "".join(f"{modules.file_name(path)}\n" for path in found)
    return initramfs.archive(
        [
            *(entry(name, directory) for name in ("dev", "modules", "root")),
            entry("init", file | 0o755, agent.read_bytes()),
            entry("switch-root", file | 0o600, f"{DEVICE} ext4 - {init}\n".encode()),
            entry("modules/order", file | 0o600, order.encode()),
            *(entry(f"modules/{modules.file_name(path)}", file | 0o600, read_compressed(path)) for path in found),
        ]
    )


def _put_modules(added: Path, image: Path, kernel: PcKernel, d: Deadline) -> None:
    """/lib/modules/RELEASE with the tables that udev and modprobe look into; no installer has run to make them."""
    into = added / ("usr/lib" if (image / "lib").is_symlink() else "lib") / "modules" / kernel.release
    _parents(into)
    shutil.copytree(kernel.modules, into, symlinks=True, ignore=shutil.ignore_patterns("build", "source"))
    base = added / "usr" if into.is_relative_to(added / "usr") else added
    child.run(["depmod", "--basedir", str(base), kernel.release], "listing the kernel's modules", d)


def _put(path: Path, data: bytes, mode: int = 0o644) -> None:
    _parents(path)
    path.write_bytes(data)
    path.chmod(mode)


def _parents(path: Path) -> None:
    """Make the directories above; their modes win over the image's, and these are what every distribution has."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)


def _set_times(tree: Path) -> None:
    for path in (*tree.rglob("*"), tree):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (_TIME_S, _TIME_S), follow_symlinks=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
