"""A copy is refused before it is made where it would take what this machine does not have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.engine import admission, copying, snapshots
from isolat.engine.paths import StateRoot
from isolat.errors import Refused
from isolat.layers.base import Copy
from tests.unit.engine.test_snapshots import HANDLE

MIB = 1 << 20
FREE = 100 * MIB


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much is free beside the reserve."""
    monkeypatch.setattr(admission, "memory_available_bytes", lambda: FREE + admission.MEMORY_RESERVE_BYTES)
    monkeypatch.setattr(admission, "disk_available_bytes", lambda _: FREE + admission.DISK_RESERVE_BYTES)


@pytest.fixture
def ram() -> Iterator[int]:
    """A machine's memory of which its template has written a tenth of what is free."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 200 * MIB)
    os.pwrite(fd, b"x" * (10 * MIB), 0)
    yield fd
    os.close(fd)


def test_children_and_the_copy_itself_have_to_fit() -> None:
    room = copying._for_children(3, -1)
    room(25 * MIB, 25 * MIB, 0)
    with pytest.raises(Refused, match="104 MiB of memory, and 100 MiB are free"):
        room(26 * MIB, 26 * MIB, 0)
    room(0, 33 * MIB, 0)  # what of it has been copied is no longer free


def test_disks_of_children_have_to_fit() -> None:
    room = copying._for_children(4, -1)
    room(MIB, MIB, 25 * MIB)
    with pytest.raises(Refused, match="104 MiB of disk, and 100 MiB are free"):
        room(MIB, MIB, 26 * MIB)


def test_a_snapshot_has_to_fit_into_memory_and_then_on_the_disk(ram: int, monkeypatch: pytest.MonkeyPatch) -> None:
    room = copying._for_snapshot(Copy(-1, -1, -1, ram))
    room(60 * MIB, 60 * MIB, 30 * MIB)
    with pytest.raises(Refused, match="101 MiB of disk, and 100 MiB are free"):
        room(60 * MIB, 60 * MIB, 31 * MIB)
    monkeypatch.setattr(admission, "disk_available_bytes", lambda _: 1000 * MIB)
    with pytest.raises(Refused, match="101 MiB of memory, and 100 MiB are free"):
        room(101 * MIB, 101 * MIB, 0)


def test_a_snapshots_memory_is_loaded_only_where_it_fits(tmp_path: Path) -> None:
    kept = snapshots.Snapshots(StateRoot(tmp_path))
    with kept.making("large", HANDLE) as files:
        os.posix_fallocate(files.memory, 0, FREE + MIB)
    with pytest.raises(Refused, match="the memory of large"):
        snapshots.load_memory(kept.find("large"), Deadline(5))
