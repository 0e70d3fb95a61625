"""A running machine as a snapshot, and machines made from it: they go on where the first one was, processes and all.

A snapshot is three things, each behind a descriptor that we give:

- the **state** of the processors and devices, a few kilobytes that QEMU writes (``xen-save-devices-state``, which
  despite its name is every device and no memory; docs/xen-save-devices-state.txt);
- the **delta** of the memory to the template's (``isolat.qemu.memory``): copied by us from QEMU's process;
- copies of the writable **disks**, made in the same moment. What the guest had not written yet is in its memory.

So it belongs to one template, whose memory its machines map too: the template's key is part of the snapshot (the
engine keeps it) and another QEMU, kernel or size refuses it.

What is copied is copied twice: while the machine runs, which allocates and writes out everything, and once more when it
stands still between ``stop`` and ``cont``, which takes a quarter of the time (a disk without FICLONE: a half).

What is in flight at that moment is of both machines. Bytes that the guest put into its port and QEMU did not pass on
would be said twice, by parent and child, and a half-sent frame would come to the child's host without its beginning. So
the agent and its keeper are silent while ``capture`` runs (the engine sees to it), or the child is lost to its host.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from isolat.deadline import Deadline
from isolat.errors import IllegalState, IsolatError, StartFailed
from isolat.qemu import dialogue, memory
from isolat.qemu.qmp import Qmp

_CONT_S = 10.0  # to let the parent go on when the deadline has passed
_STATE_BYTES_MAX = 64 << 20
_FICLONE = 0x40049409  # ioctl_ficlone(2)
_COPY_BYTES = 32 << 20
_BLOCK_BYTES = 512  # of stat(2), whatever the file system's are
_PUNCH_HOLE = 0x1 | 0x2  # fallocate(2): FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_F_ADD_SEALS = 1033
SEALED = 0x2 | 0x4 | 0x8  # fcntl(2): F_SEAL_SHRINK, _GROW, _WRITE
_STAGE = "fork"
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class DiskCopy:
    """A writable disk of the machine: its file, open for reading, and an empty one for the copy."""

    source: int
    target: int


@dataclass(frozen=True)
class Captured:
    stopped_ms: float  # how long the machine stood still
    ahead_ms: float  # of copying before, while it ran
    own_bytes: int  # of memory: what each machine made from this will have of its own at least
    runs: int
    state_bytes: int


@dataclass(frozen=True)
class Restored:
    own_bytes: int
    memory_ms: float
    state_ms: float


def capture(
    qmp: Qmp,
    pid: int,
    ram: memory.Inode,
    state: int,
    delta: int,
    d: Deadline,
    *,
    disks: Sequence[DiskCopy] = (),
    room: Callable[[int, int, int], None] | None = None,
) -> Captured:
    """Take a snapshot of a machine that runs or is paused; it goes on as it was, also when this fails.

    ``pid`` is QEMU's, ``ram`` the template's memory; ``state`` and ``delta`` are empty files, which QEMU gets no
    descriptor of (memfds: sealed in the end if they allow it). Raises IllegalState for a machine that has not begun or
    has crashed, Lost when it ends meanwhile, StartFailed, DeadlineExceeded.

    ``room`` is asked before anything is copied, and again where the guest has written more meanwhile: how many bytes of
    memory are to be copied next, how many those are altogether, and what the copies of disks will take. What it raises
    ends the attempt.
    """
    runs_on = _runs(dialogue.status(qmp, d))
    mapping = memory.guest_ram(pid, ram)
    begun = time.monotonic()

    def own(copied: list[memory.Run], disk_bytes: int = 0) -> list[memory.Run]:
        """All that is the machine's own now or was when it was copied."""
        runs = memory.joined(copied, memory.private_pages(pid, mapping))
        if room is not None:
            room(memory.total(runs) - memory.total(copied), memory.total(runs), disk_bytes)
        return runs

    own([], sum(_lacking(disk) for disk in disks))
    for disk in disks:
        copy_disk(disk.source, disk.target, d)  # of no use but to the second time
    with memory.filling(pid, mapping, delta) as fill:
        before = own([])
        fill(before, d)
        ahead = time.monotonic() - begun
        with _state_file(qmp, d) as (path, written), _standing_still(qmp, runs_on, d) as clock:
            # Not ``live``: else it would give up its disks, as for a machine that moves away.
            qmp.execute("xen-save-devices-state", {"filename": path, "live": False}, d)
            _keep_state(written, state)
            runs = own(before)
            fill(runs, d)
            for disk in disks:
                copy_disk(disk.source, disk.target, d)
    memory.write_table(delta, mapping.size, runs)
    for fd in (state, delta):
        _seal(fd)
    return Captured(clock.ms, 1000 * ahead, memory.total(runs), len(runs), os.fstat(state).st_size)


def restore(qmp: Qmp, pid: int, ram: memory.Inode, number: int, delta: int, d: Deadline) -> Restored:
    """Make the machine that a QEMU waits to become (``-incoming defer``) out of a snapshot. It is paused then.

    ``number`` is QEMU's own descriptor of the state, opened anew for it (see ``dialogue.load``). Swap the disks next
    and let it run: its first instruction follows the last one of its parent. Where this fails the machine is useless.
    """
    begun = time.monotonic()
    copied = memory.copy_in(pid, memory.guest_ram(pid, ram), delta, d)
    middle = time.monotonic()
    # The state says "running", whatever the machine was, and QEMU would obey at once, before it has its disks.
    # ``stop`` to a machine that waits for its state is the same as -S (monitor/qmp-cmds.c).
    dialogue.stop(qmp, d)
    dialogue.load(qmp, number, d)
    return Restored(copied, 1000 * (middle - begun), 1000 * (time.monotonic() - middle))


def copy_disk(source: int, target: int, d: Deadline) -> None:
    """Make ``target`` what ``source`` is, holes too: shared blocks where the file system has them.

    FICLONE takes no space and as long as it takes to write out what ``source`` has in memory (btrfs, XFS). Else the
    data is copied, extent by extent; over an earlier copy that takes half of the time.
    """
    d.check("copying a disk")
    with _disk_errors():
        if not _clone(source, target):
            _copy_data(source, target, d)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StartFailed(f"copying a disk: {error.strerror}", stage=_STAGE, errno=error.errno or 0) from error


def _lacking(disk: DiskCopy) -> int:
    """How many bytes its copy will take of the file system: none where it shares its blocks."""
    with _disk_errors():
        if _clone(disk.source, disk.target):
            return 0
        return max(0, os.fstat(disk.source).st_blocks - os.fstat(disk.target).st_blocks) * _BLOCK_BYTES


def _clone(source: int, target: int) -> bool:
    os.ftruncate(target, os.fstat(source).st_size)  # FICLONE makes a file longer and never shorter
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL):
            return False
        raise
    return True


# saving


class _Clock:
    ms = 0.0


@contextlib.contextmanager
def _standing_still(qmp: Qmp, runs_on: bool, d: Deadline) -> Iterator[_Clock]:
    """The machine is stopped for the block and goes on afterwards, unless it was paused before."""
    clock, begun = _Clock(), time.monotonic()
    try:
        dialogue.stop(qmp, d)
        yield clock
    except BaseException:
        if runs_on:
            with contextlib.suppress(IsolatError):  # it may be what died
                dialogue.cont(qmp, Deadline(_CONT_S))
        raise
    if runs_on:
        dialogue.cont(qmp, Deadline(_CONT_S))
    clock.ms = 1000 * (time.monotonic() - begun)


def _runs(status: str) -> bool:
    if status not in ("running", "paused"):
        raise IllegalState(f"a machine that is {status!r} can't be taken a snapshot of", stage=_STAGE)
    return status == "running"


@contextlib.contextmanager
def _state_file(qmp: Qmp, d: Deadline) -> Iterator[tuple[str, int]]:
    """A file for QEMU's state: the name that QEMU opens it by, and our descriptor. QEMU could make none itself.

    It wants a descriptor that is open for writing only, and takes a duplicate of it (util/osdep.c,
    monitor_fdset_dup_fd_add). A machine that was taken over keeps whatever it was given, so this is memory that is
    nothing's state and gone afterwards. Around the block in which the machine stands still: what is taken away from
    QEMU meanwhile stays open in it (monitor/fds.c, monitor_fdset_cleanup).
    """
    fd = os.memfd_create("state", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        target = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)  # with an offset of its own
        try:
            number = qmp.execute("add-fd", {}, d, (target,))["fdset-id"]
        finally:
            os.close(target)
        try:
            yield f"/dev/fdset/{number}", fd
        except BaseException:
            with contextlib.suppress(IsolatError):  # it may be what died
                qmp.execute("remove-fd", {"fdset-id": number}, Deadline(_CONT_S))
            raise
        qmp.execute("remove-fd", {"fdset-id": number}, d)
    finally:
        os.close(fd)


def _keep_state(written: int, state: int) -> None:
    """Sealed first, so that what is looked at is what is copied."""
    try:
        fcntl.fcntl(written, _F_ADD_SEALS, SEALED)
    except OSError as error:
        why = f"QEMU holds on to the state that it wrote: {error.strerror}"
        raise StartFailed(why, stage=_STAGE, errno=error.errno or 0) from error
    size = os.fstat(written).st_size
    if not 0 < size <= _STATE_BYTES_MAX:
        raise StartFailed("QEMU wrote no state, or one without an end", stage=_STAGE)
    data, at = memoryview(os.pread(written, size, 0)), 0
    try:
        while at < len(data):
            at += os.pwrite(state, data[at:], at)
    except OSError as error:
        raise StartFailed(f"keeping the state: {error.strerror}", stage=_STAGE, errno=error.errno or 0) from error


def _seal(fd: int) -> None:
    """Nobody changes it any more: who is given it for reading could open it anew for writing (proc(5))."""
    with contextlib.suppress(OSError):  # a file, or a memfd that was made without MFD_ALLOW_SEALING
        fcntl.fcntl(fd, _F_ADD_SEALS, SEALED)


# disks


def _copy_data(source: int, target: int, d: Deadline) -> None:
    size, again, end_before = os.fstat(source).st_size, os.fstat(target).st_blocks > 0, 0
    for start, end in (*_extents(source, size), (size, size)):
        if again and start > end_before:
            _punch(target, end_before, start)
        _copy_extent(source, target, start, end, d)
        end_before = end


def _punch(fd: int, start: int, end: int) -> None:
    """Make it a hole: what the guest has discarded since the earlier copy."""
    if _libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(end - start)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where there is data: lseek(2), SEEK_DATA and SEEK_HOLE; ENXIO says that there is no more."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        yield start, at


def _copy_extent(source: int, target: int, start: int, end: int, d: Deadline) -> None:
    """Within the kernel where it can (copy_file_range(2): not between all file systems), else through us."""
    at = start
    while at < end:
        d.check("copying a disk")
        count = min(_COPY_BYTES, end - at)
        try:
            copied = os.copy_file_range(source, target, count, at, at)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            copied = os.pwrite(target, os.pread(source, count, at), at)
        if not copied:
            return  # it has become shorter: what was cut off is a hole in the copy
        at += copied
