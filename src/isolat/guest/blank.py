"""Empty disks: an ext4 of a given size, made once and then copied for each machine.

Sparse, so it costs what is written to it. No journal: a machine's disk lives as long as its machine and is never
mounted after a crash by anybody but that machine's own kernel. No checksums of metadata, because a machine without
hardware virtualization emulates them. Inode tables are left for later (uninit_bg; mount with ``MOUNT_OPTIONS``, or a
kernel thread writes all of them).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

from isolat.deadline import NEVER, Deadline
from isolat.errors import StoreError, Unsupported, UsageError
from isolat.linux import child

MIN_BYTES = 16 << 20
MOST_BYTES = 15 << 40  # a file of ext4 ends before 16 TiB, and so does an ext4 with 32 bits for its blocks
BLOCK_BYTES = 4096
BYTES_PER_INODE = 16384
MOUNT_OPTIONS = "noatime,noinit_itable"
_FEATURES = "none,extent,filetype,dir_index,ext_attr,dir_nlink,extra_isize,flex_bg,huge_file,large_file,sparse_super"
_UUID = "00000000-0000-4000-8000-000000000003"
_FICLONE = 0x40049409  # ioctl_ficlone(2)
_COPY_BYTES = 64 << 20
_MKFS_S = 300.0
_STAGE = "making an empty disk"


def blank(directory: Path, size_bytes: int, d: Deadline = NEVER) -> Path:
    """The cached empty disk of this size below ``directory``, made where it is missing.

    The size is rounded down to whole blocks. It is to be copied, never used itself. Raises UsageError for a size that
    is too small, Unsupported without mkfs.ext4, StoreError when it fails.
    """
    if size_bytes < MIN_BYTES:
        raise UsageError(f"a machine's disk has at least {MIN_BYTES >> 20} MiB")
    size = size_bytes - size_bytes % BLOCK_BYTES
    path = directory / f"blank-{size}.ext4"
    if _is_sparse(path, size):
        return path
    if shutil.which("mkfs.ext4", path=child.SAFE_PATH) is None:
        raise Unsupported(
            "could not find mkfs.ext4, which is required to make a machine's disk", hint="apt-get install e2fsprogs"
        )
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / f".{path.name}.{os.getpid()}-{threading.get_native_id()}"  # threads make the first at once
    try:
        with beside.open("wb") as file:
            file.truncate(size)
        child.run(mkfs_argv(beside), _STAGE, d.sooner(_MKFS_S), environment={"E2FSPROGS_FAKE_TIME": "1700000000"})
        beside.chmod(0o400)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _is_sparse(path: Path, size: int) -> bool:
    """Whether it is there and has its holes, which a copied state root has lost: every copy of it would be slow."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_blocks * 512 <= max(size // 4, MIN_BYTES)
    return False


def mkfs_argv(file: Path) -> list[str]:
    return [
        *("mkfs.ext4", "-q", "-F", "-b", str(BLOCK_BYTES), "-i", str(BYTES_PER_INODE), "-I", "256", "-m", "0"),
        *("-O", f"{_FEATURES},uninit_bg", "-G", "4096", "-U", _UUID),
        *("-E", f"lazy_itable_init=1,nodiscard,root_owner=0:0,hash_seed={_UUID}"),
        str(file),
    ]


def copy_sparse(source: Path, target: Path) -> None:
    """A new file with the same bytes and the same holes: shared blocks where the file system can, else a copy.

    ``target`` must not exist; after a failure it does not.
    """
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        try:
            if not _clone(reader.fileno(), writer.fileno()):
                _copy_data(reader.fileno(), writer.fileno())
        except BaseException as error:
            target.unlink()
            if isinstance(error, OSError):
                raise StoreError(
                    f"could not copy {source.name}: {error.strerror}", stage=_STAGE, errno=error.errno or 0
                ) from error
            raise


def _clone(source: int, target: int) -> bool:
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return True
    return False


def _copy_data(source: int, target: int) -> None:
    """Data from hole to hole (lseek(2), SEEK_DATA); the size at last, for the hole at the end."""
    size = os.fstat(source).st_size
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # nothing but a hole
        end = os.lseek(source, at, os.SEEK_HOLE)
        _copy_range(source, target, at, end)
        at = end
    os.ftruncate(target, size)


def _copy_range(source: int, target: int, at: int, end: int) -> None:
    while at < end:
        count = min(end - at, _COPY_BYTES)
        try:
            done = os.copy_file_range(source, target, count, at, at)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            done = os.pwrite(target, os.pread(source, min(count, 1 << 20), at), at)
        if done == 0:
            raise OSError(errno.EIO, "the file became shorter")
        at += done
