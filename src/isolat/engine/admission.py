"""What is refused before anything is touched, because it would starve the machine.

Limits may add up to more than the machine has (most environments idle far below theirs), so the sum is no measure;
what is really free is (proc(5), MemAvailable).
"""

from __future__ import annotations

import os
from pathlib import Path

from isolat.errors import Refused
from isolat.spec.model import DEFAULT_CPUS, Spec

MEMORY_RESERVE_BYTES = 256 << 20
DISK_RESERVE_BYTES = 256 << 20
UID_FIRST = 0x40000000
UID_COUNT = 65536
UID_RANGES = (0xFFFE0000 - UID_FIRST) // UID_COUNT


def memory_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def disk_available_bytes(file: int | Path) -> int:
    """Of the file system that this file is on."""
    stat = os.statvfs(file)
    return stat.f_bavail * stat.f_frsize


def check_memory(wanted_bytes: int, who: str, hint: str) -> None:
    """Raise Refused where this is not free beside the reserve."""
    _check_free(wanted_bytes, memory_available_bytes() - MEMORY_RESERVE_BYTES, who, "memory", hint)


def check_disk(wanted_bytes: int, file: int | Path, who: str, hint: str) -> None:
    """The same for the file system that this file is on."""
    _check_free(wanted_bytes, disk_available_bytes(file) - DISK_RESERVE_BYTES, who, "disk", hint)


def _check_free(wanted_bytes: int, free_bytes: int, who: str, what: str, hint: str) -> None:
    if wanted_bytes > free_bytes:
        free = f"{max(0, free_bytes) >> 20} MiB are free"
        raise Refused(f"{who} would take {wanted_bytes >> 20} MiB of {what}, and {free}", hint=hint)


def check(spec: Spec, memory_total_bytes: int, cpus: int, store: Path) -> None:
    """Raise Refused, with the numbers, when this machine should not take this environment now."""
    if spec.memory_bytes > memory_total_bytes:
        raise Refused(
            f"a memory limit of {spec.memory_bytes >> 20} MiB is more than this machine has"
            f" ({memory_total_bytes >> 20} MiB)",
            hint="ask for less with --memory",
        )
    if spec.cpus > cpus and spec.cpus != DEFAULT_CPUS:
        raise Refused(f"{spec.cpus:g} CPUs are more than this machine has ({cpus})", hint="ask for less with --cpus")
    free = memory_available_bytes()
    if free < MEMORY_RESERVE_BYTES:
        raise Refused(
            f"only {free >> 20} MiB of memory are free; below {MEMORY_RESERVE_BYTES >> 20} MiB nothing is started",
            hint="stop an environment, or end something else",
        )
    disk = disk_available_bytes(store)
    if disk < DISK_RESERVE_BYTES:
        raise Refused(
            f"only {disk >> 20} MiB of disk are free in {store}",
            hint="remove environments with `isolat rm`, or images with `isolat rmi`",
        )


def uid_base(index: int) -> int:
    """The first uid of a range: 65,536 ids each, no two environments with the same."""
    return UID_FIRST + index * UID_COUNT


def free_uid_index(used: set[int], first: int = 0) -> int:
    """The next range from ``first`` on that no environment has. Raises Refused when all are taken.

    Every state root begins at another place, so that the environments of two roots do not meet either.
    """
    for n in range(UID_RANGES):
        index = (first + n) % UID_RANGES
        if index not in used:
            return index
    raise Refused(f"all {UID_RANGES} uid ranges are in use", hint="remove environments that ended")
