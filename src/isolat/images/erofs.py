"""From a directory to one EROFS file, the same bytes for the same tree.

``mkfs.erofs`` reads what others wrote, so it runs confined (linux/confine.py): as nobody, without network, allowed to
read the tree and to write one directory. Uncompressed: in a machine without hardware virtualization decompression is
emulated, too.

Reproducible means: a fixed UUID, the files' own times (compiled Python files hold their source's time, so times are
kept, not flattened), and no time of making. mkfs.erofs 1.5 writes that into the superblock; it is set to zero here,
which is why the superblock's checksum is left out (Documentation/filesystems/erofs.rst: it is optional).

/dev in an image is always an empty directory: OCI runtimes have followed links that an image had placed there
(CVE-2025-52565, CVE-2026-88264, CVE-2026-88265), and every layer mounts its own over it.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from isolat.deadline import Deadline
from isolat.errors import StoreError, Unsupported
from isolat.linux import child, confine

FILE = "image.erofs"
_UUID = "00000000-0000-4000-8000-000000000001"
_NOBODY = 65534
_SUPER_OFFSET = 1024
_MAGIC = 0xE0F5E1E2
_BUILD_TIME_OFFSET = 24  # struct erofs_super_block: build_time (8 bytes), build_time_nsec (4)
_PACK_S = 600.0


def pack_argv(tree: Path, out: Path) -> list[str]:
    """The whole command line, confinement included."""
    return [
        *(sys.executable, "-I", "-S", str(Path(confine.__file__).resolve())),
        *("--read", str(tree), "--write", str(out), "--user", "--"),
        *("mkfs.erofs", "--quiet", "-x2", "-U", _UUID, "-E", "nosbcrc", "--exclude-regex=^dev/."),
        *(str(out / FILE), str(tree)),
    ]


def pack(tree: Path, out: Path, d: Deadline, pass_fds: Sequence[int] = ()) -> None:
    """Write ``out``/FILE. Raises Unsupported without mkfs.erofs, StoreError with its last lines when it fails."""
    if shutil.which("mkfs.erofs", path=child.SAFE_PATH) is None:
        raise Unsupported(
            "could not find mkfs.erofs, which is required to make an image", hint="apt-get install erofs-utils"
        )
    if (tree / "dev").is_symlink():
        raise StoreError("the image's /dev is a link: runtimes would follow it", stage="packing the file system")
    out.mkdir(mode=0o700)
    os.chown(out, _NOBODY, _NOBODY)
    child.run(pack_argv(tree, out), "packing the file system", d.sooner(_PACK_S), pass_fds=pass_fds)
    os.chown(out, 0, 0)
    _forget_build_time(out / FILE)


def _forget_build_time(file: Path) -> None:
    """Check that it is a plain file with EROFS's magic number, then blank the time at which it was made."""
    descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        (magic,) = struct.unpack("<I", os.pread(descriptor, 4, _SUPER_OFFSET))
        if magic != _MAGIC:
            raise StoreError("mkfs.erofs wrote something else than an EROFS", stage="packing the file system")
        os.pwrite(descriptor, bytes(12), _SUPER_OFFSET + _BUILD_TIME_OFFSET)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
