"""GRUB for a PC's BIOS, put onto a raw disk without a device, a mount or a chroot.

What grub-install does for a BIOS disk is small (GRUB manual, "BIOS installation"): ``boot.img``, 440 bytes of code,
goes into sector 0 beside the partition table; ``core.img``, which holds the modules that reach the configuration, into
the gap before the first partition. Both say where the rest is: boot.img that core.img begins at sector 1, core.img that
it goes on at sector 2 (``kernel_sector`` in boot.S and ``blocklist_default_start`` in diskboot.S). With core.img at
sector 1, in one piece, they are right as they come; that they say so is checked, not believed.

``grub-mkimage`` packs core.img; it reads Debian's own files only, so it is not confined. Its output has no time in it.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

from isolat.deadline import Deadline
from isolat.errors import StoreError, Unsupported
from isolat.linux import child

SECTOR_BYTES = 512
GAP_SECTORS = 2048  # before the first partition: 1 MiB, as every partitioning program leaves it
PREFIX = "(hd0,msdos1)/boot/grub"
MODULES = ("biosdisk", "part_msdos", "ext2", "linux16", "normal")
_DIRECTORY = Path("/usr/lib/grub/i386-pc")
_CODE_BYTES = 440  # up to the disk's signature and the partition table
_LINUX = 0x83
_KERNEL_SECTOR_OFFSET = 0x5C  # of 8 bytes in boot.img
_BLOCKLIST_OFFSET = SECTOR_BYTES - 12  # in core.img's first sector: start (8 bytes), length (2), segment (2)
_LBA_SECTORS = 1 << 32
_MKIMAGE_S = 60.0


def check() -> None:
    """Raises Unsupported, with the packages, where GRUB's parts are missing."""
    if shutil.which("grub-mkimage", path=child.SAFE_PATH) is None or not (_DIRECTORY / "boot.img").exists():
        raise Unsupported(
            "could not find GRUB for a BIOS, which is required to make a bootable disk",
            hint="apt-get install grub-pc-bin grub-common",
        )


def mkimage_argv(out: Path) -> list[str]:
    return [
        *("grub-mkimage", "--directory", str(_DIRECTORY), "--format", "i386-pc"),
        *("--prefix", PREFIX, "--compression", "none", "--output", str(out)),
        *MODULES,
    ]


def boot_area(work: Path, disk_bytes: int, signature: int, d: Deadline) -> bytes:
    """The disk's first MiB: boot code, partition table, core.img. ``work`` is a directory to write into."""
    check()
    core = work / "core.img"
    child.run(mkimage_argv(core), "packing the boot loader", d.sooner(_MKIMAGE_S))
    sector0 = mbr((_DIRECTORY / "boot.img").read_bytes(), disk_bytes, signature)
    return embed(sector0, core.read_bytes())


def mbr(boot: bytes, disk_bytes: int, signature: int) -> bytes:
    """Sector 0: boot.img's code, the disk's signature, and one active partition from 1 MiB to the end.

    Of the addresses in cylinders, heads and sectors only that they are out of range is said, as for any large disk.
    """
    sectors = disk_bytes // SECTOR_BYTES
    if not 2 * GAP_SECTORS <= sectors < _LBA_SECTORS:
        raise StoreError(f"a disk of {disk_bytes} bytes can't have a BIOS partition table", stage="making a disk")
    beyond = b"\xfe\xff\xff"
    entry = struct.pack("<B3sB3sII", 0x80, beyond, _LINUX, beyond, GAP_SECTORS, sectors - GAP_SECTORS)
    return boot[:_CODE_BYTES] + struct.pack("<IH", signature, 0) + entry + bytes(48) + b"\x55\xaa"


def embed(sector0: bytes, core: bytes) -> bytes:
    """Both in their places, padded to the gap's end. Raises StoreError where they don't fit or don't match."""
    (first,) = struct.unpack_from("<Q", sector0, _KERNEL_SECTOR_OFFSET)
    start, length, _ = struct.unpack_from("<QHH", core, _BLOCKLIST_OFFSET)
    if first != 1 or start != 2 or (1 + length) * SECTOR_BYTES < len(core):
        raise StoreError("this GRUB expects its parts elsewhere on the disk", stage="packing the boot loader")
    area = sector0 + core
    if len(area) > GAP_SECTORS * SECTOR_BYTES:
        raise StoreError(f"GRUB's core of {len(core)} bytes does not fit before the partition", stage="making a disk")
    return area.ljust(GAP_SECTORS * SECTOR_BYTES, b"\0")


def configuration(arguments: str, title: str = "Linux") -> str:
    """/boot/grub/grub.cfg: one entry, at once.

    ``linux16`` and not ``linux``: that one takes the kernel's whole init_size (54 MiB) for the image and moves it byte
    by byte before the start (``rep movsb`` of its relocator), 1.6 s without hardware virtualization; the kernel's own
    16-bit entry needs no move.
    """
    return "\n".join(
        (
            "set timeout=0",
            f"menuentry '{title}' {{",
            f"    linux16 /boot/vmlinuz {arguments}",
            "    initrd16 /boot/initrd.img",
            "}",
            "",
        )
    )
