"""Loop devices that clean up after themselves.

LOOP_CONFIGURE (Linux 5.8, loop(4)) binds file, offset and flags in one step; with LO_FLAGS_AUTOCLEAR the kernel
unbinds the device when its last user, the mount, is gone. So there is never a moment at which killing us leaks one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from isolat.errors import StoreError

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
_TRIES = 16


def devices_of(file: str, sysfs: Path = Path("/sys/block")) -> list[str]:
    """The loop devices that have this file (sysfs: block/loopN/loop/backing_file)."""
    found = []
    for backing in sysfs.glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if backing.read_text().strip() == os.path.realpath(file):
                found.append(f"/dev/{backing.parts[-3]}")
    return found


def _config(file: int, name: str, flags: int) -> bytes:
    """struct loop_config of <linux/loop.h>: descriptor, block size, struct loop_info64, 64 reserved bytes."""
    info = struct.pack("<5Q4I64s64s32s2Q", 0, 0, 0, 0, 0, 0, 0, 0, flags, os.fsencode(name)[:63], b"", b"", 0, 0)
    return struct.pack("<II", file, 0) + info + bytes(64)


@contextlib.contextmanager
def attached(path: str, *, read_only: bool, direct_io: bool = False) -> Iterator[str]:
    """A loop device bound to ``path``. It lives for the ``with`` block, and on as long as what is mounted from it."""
    flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if read_only else 0)
    mode = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    file = os.open(path, mode)
    try:
        device, name = _bind(file, path, mode, flags | (_LO_FLAGS_DIRECT_IO if direct_io else 0))
    finally:
        os.close(file)
    try:
        yield name
    finally:
        os.close(device)


def _bind(file: int, path: str, mode: int, flags: int) -> tuple[int, str]:
    """Take a free device. Another process may take the same number between the two calls: then the next one."""
    for _ in range(_TRIES):
        number = _free_number()
        name = f"/dev/loop{number}"
        device = os.open(name, mode)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, _config(file, path, flags))
        except OSError as error:
            os.close(device)
            if error.errno == errno.EBUSY:
                continue
            raise StoreError(
                f"could not bind {path} to {name}: {error.strerror}", stage="loop", errno=error.errno or 0
            ) from error
        return device, name
    raise StoreError(f"no loop device stayed free for {path}", stage="loop", hint="`losetup -a` shows who has them")


def _free_number() -> int:
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(
            f"this machine gives no loop devices: /dev/loop-control: {error.strerror}",
            stage="loop",
            errno=error.errno or 0,
            hint="load the kernel's `loop` module",
        ) from error
    try:
        return fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
    finally:
        os.close(control)


def backing_file(device: str) -> str:
    """What ``/dev/loopN`` is bound to; empty when it is bound to nothing."""
    try:
        return (Path("/sys/block") / Path(device).name / "loop/backing_file").read_text().rstrip("\n")
    except OSError:
        return ""
