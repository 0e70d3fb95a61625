"""A machine's memory seen from outside: which pages are its own, and how they get out of one machine into another.

A clone maps its template's memfd privately: what it only reads is the template's page, what it writes becomes a page
of its own. So the whole difference between a running machine and its template is in the private pages of one mapping,
and they can be found and copied without QEMU's help:

- which they are: ``/proc/PID/pagemap`` (admin-guide/mm/pagemap.rst): present or swapped, and neither a file's nor
  shared memory's. Linux 6.7 and later answer with ranges (ioctl PAGEMAP_SCAN), earlier ones with a word per page;
- their contents: process_vm_readv(2) and process_vm_writev(2), which copy once, where /proc/PID/mem copies twice.
  A page written from outside becomes private just as if QEMU had written it, and is charged to QEMU's control group.

A **delta** is a file (a memfd, mostly) of the size of the machine's memory, with these pages at their own offsets and
holes elsewhere, followed by the table of its runs. The table is why no SEEK_DATA is needed, which would lie: a file
system with large blocks, or shared memory with huge pages, says that there is data (zeros) around what was written.

What QEMU says of itself is not trusted, because its guest may have taken it over: sizes are checked, and what can't be
copied is an error. A machine can so spoil its own children and nothing else. All functions raise Lost when the
process is gone, StartFailed (stage ``memory``) for everything else that the kernel refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

from isolat.deadline import Deadline
from isolat.errors import IsolatError, Lost, StartFailed

PAGE = mmap.PAGESIZE
RUNS_MAX = 1 << 20  # of a table; a guest of 8 GiB with every second page its own

_STAGE = "memory"
_IOV_MAX = 1024  # sysconf(_SC_IOV_MAX) on Linux
_CHUNK_BYTES = 4 << 20  # between two looks at the deadline, and the least that is worth a second thread
_THREADS_MAX = 2  # more only wait for the process's own lock
_ENTRY = 8  # bytes of a pagemap word
_READ_BYTES = 1 << 20
_TABLE = struct.Struct("<8sQ")  # magic, number of runs; then offset and length of each
_MAGIC = b"isoldlt1"

# linux/fs.h, struct pm_scan_arg and its flags (Linux 6.7)
_SCAN = struct.Struct("<12Q")
_PAGEMAP_SCAN = 3 << 30 | _SCAN.size << 16 | ord("f") << 8 | 16
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_REGION_WORDS = 3  # start, end, categories
_REGIONS = 4096

# The highest byte of a pagemap word: 0x80 present, 0x40 swapped, 0x20 a file's or shared.
_PRIVATE = bytes(int(bool(byte & 0xC0) and not byte & 0x20) for byte in range(256))

Run = tuple[int, int]
"""Offset in the machine's memory and length, in bytes, both whole pages."""

Fill = Callable[[Sequence[Run], Deadline], None]


@dataclass(frozen=True)
class Inode:
    """Which file a mapping is of, as /proc/PID/maps tells it."""

    major: int
    minor: int
    number: int

    @classmethod
    def of(cls, fd: int) -> Inode:
        found = os.fstat(fd)
        return cls(os.major(found.st_dev), os.minor(found.st_dev), found.st_ino)


@dataclass(frozen=True)
class Mapping:
    """Where a process has the machine's memory. Addresses and sizes in bytes."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


# finding


def guest_ram(pid: int, inode: Inode) -> Mapping:
    """Where QEMU has mapped the memory behind ``inode``: all of it, privately and in one piece."""
    with _told(pid, "finding the machine's memory"), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as f:
        return parse_maps(f, inode)


def parse_maps(lines: Iterable[str], inode: Inode) -> Mapping:
    """The same from the lines of /proc/PID/maps (proc(5)): ``start-end mode offset major:minor number path``.

    madvise(2) on a part splits a mapping, so pieces that follow one another count as one.
    """
    start = end = 0
    for words in (line.split(maxsplit=5) for line in lines):
        if len(words) < 5 or words[4] != str(inode.number) or words[3] != f"{inode.major:02x}:{inode.minor:02x}":
            continue
        low, high = (int(word, 16) for word in words[0].split("-"))
        if words[1][3] != "p":
            raise _failed("the machine shares its memory with its template, so it has none of its own")
        start = start or low
        if (end and low != end) or int(words[2], 16) != low - start:
            raise _failed("the machine's memory is mapped more than once, or in pieces")
        end = high
    if not end:
        raise _failed("the process has not mapped the machine's memory")
    return Mapping(start, end - start)


def private_pages(pid: int, mapping: Mapping) -> list[Run]:
    """The runs of pages that are the process's own, in order."""
    with _told(pid, "looking for the machine's own pages"), open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        found = scan(pagemap.fileno(), mapping)
        return read_pagemap(pagemap.fileno(), mapping) if found is None else found


def scan(pagemap: int, mapping: Mapping) -> list[Run] | None:
    """By PAGEMAP_SCAN: half a millisecond for a gigabyte. None where the kernel does not know it."""
    regions = array("Q", bytes(_REGIONS * _REGION_WORDS * _ENTRY))
    address, _ = regions.buffer_info()
    runs: list[Run] = []
    at = mapping.start
    while at < mapping.end:
        # size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, all of, any of, return
        question = (_SCAN.size, 0, at, mapping.end, 0, address, _REGIONS, 0)
        argument = bytearray(_SCAN.pack(*question, _IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, _IS_PRESENT))
        try:
            count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return None
            raise
        starts, ends = regions[: count * 3 : 3], regions[1 : count * 3 : 3]
        runs += [(start - mapping.start, end - start) for start, end in zip(starts, ends, strict=True)]
        reached = _SCAN.unpack(argument)[4]
        if reached <= at:
            raise _failed("the kernel's scan of the machine's memory does not go on")
        at = reached
    return joined(runs)


def read_pagemap(pagemap: int, mapping: Mapping) -> list[Run]:
    """By a word per page: 8 bytes are read for each 4096 of the machine's."""
    flags = bytearray()
    at, end = mapping.start // PAGE * _ENTRY, mapping.end // PAGE * _ENTRY
    while at < end:
        words = os.pread(pagemap, min(_READ_BYTES, end - at), at)
        if not words:
            raise ProcessLookupError(errno.ESRCH, "the process ended")
        flags += words[_ENTRY - 1 :: _ENTRY].translate(_PRIVATE)
        at += len(words)
    return [(found.start() * PAGE, len(found.group()) * PAGE) for found in re.finditer(rb"\x01+", flags)]


def joined(*lists: Sequence[Run]) -> list[Run]:
    """All pages that are in any of them, in order, neighbours as one run."""
    out: list[Run] = []
    for offset, length in sorted(chain(*lists)):
        if out and offset <= out[-1][0] + out[-1][1]:
            first = out[-1][0]
            out[-1] = (first, max(out[-1][1], offset + length - first))
        else:
            out.append((offset, length))
    return out


def total(runs: Iterable[Run]) -> int:
    """Bytes."""
    return sum(length for _, length in runs)


# copying


@contextlib.contextmanager
def filling(pid: int, mapping: Mapping, out: int) -> Iterator[Fill]:
    """For copying the machine's pages to the same offsets of the file ``out``, which is made large enough.

    The first copy of a page allocates it and takes four times as long as each further one within the same block. So
    what has to be quick is done twice: once while the machine runs, and once when it is stopped.
    """
    if os.fstat(out).st_size < mapping.size:
        os.ftruncate(out, mapping.size)
    with _mapped(out, mapping.size, mmap.MAP_SHARED) as address:
        yield lambda runs, d: _transfer(_libc.process_vm_readv, pid, mapping, runs, address, d)


def copy_out(pid: int, mapping: Mapping, runs: Sequence[Run], out: int, d: Deadline) -> None:
    """The same once, for a machine that is stopped already; with the table, so that ``out`` is a delta."""
    with filling(pid, mapping, out) as fill:
        fill(runs, d)
    write_table(out, mapping.size, runs)


def copy_in(pid: int, mapping: Mapping, source: int, d: Deadline) -> int:
    """Write a delta into a machine that has not run yet. How many bytes."""
    runs = read_table(source, mapping.size)
    with _mapped(source, mapping.size, mmap.MAP_PRIVATE) as address:
        _transfer(_libc.process_vm_writev, pid, mapping, runs, address, d)
    return total(runs)


def write_table(out: int, size: int, runs: Sequence[Run]) -> None:
    """Put the runs behind the memory of ``size`` bytes in ``out``: what makes it a delta."""
    table = _TABLE.pack(_MAGIC, len(runs)) + array("Q", chain.from_iterable(runs)).tobytes()
    os.ftruncate(out, size + len(table))
    written = 0
    while written < len(table):
        written += os.pwrite(out, table[written:], size + written)


def read_table(delta: int, size: int) -> list[Run]:
    """The runs of a delta of ``size`` bytes of memory."""
    magic, count = _TABLE.unpack(os.pread(delta, _TABLE.size, size).ljust(_TABLE.size, b"\0"))
    length = count * 2 * _ENTRY
    if magic != _MAGIC or count > RUNS_MAX or os.fstat(delta).st_size != size + _TABLE.size + length:
        raise _failed(f"this is no difference to a memory of {size} bytes")
    words = array("Q", os.pread(delta, length, size + _TABLE.size))
    runs = list(zip(words[::2], words[1::2], strict=True))
    end = 0
    for offset, bytes_ in runs:
        if offset < end or offset % PAGE or bytes_ % PAGE or not bytes_ or offset + bytes_ > size:
            raise _failed("the table of the machine's own pages is damaged")
        end = offset + bytes_
    return runs


@contextlib.contextmanager
def _mapped(fd: int, size: int, flags: int) -> Iterator[int]:
    """The address of a mapping of ``fd``. Writable for ctypes's sake; a private one changes no file."""
    with mmap.mmap(fd, size, flags) as memory:
        first = ctypes.c_char.from_buffer(memory)
        try:
            yield ctypes.addressof(first)
        finally:
            del first


_Move = Callable[..., int]


def _transfer(move: _Move, pid: int, mapping: Mapping, runs: Sequence[Run], local: int, d: Deadline) -> None:
    """Move all runs, by several threads where there is much: the kernel's part runs side by side.

    Most of the time goes into new pages, and a page that is new to a virtual machine that we run in costs its
    hypervisor a fault, too (measured: 0.5 ms for each MiB of pages used before, 2.8 of new ones).
    """
    parts = _split(runs)
    if not parts:
        return
    threads = min(_THREADS_MAX, os.cpu_count() or 1, len(parts))

    def one(part: Sequence[Run]) -> None:
        d.check("copying the machine's memory")
        _move_all(move, pid, mapping, part, local)

    if threads == 1:
        for part in parts:
            one(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, parts):
            pass


def _split(runs: Sequence[Run]) -> list[list[Run]]:
    """Parts of at most so many bytes and runs as one call is to move."""
    parts: list[list[Run]] = []
    room = 0
    for start, length in runs:
        at, end = start, start + length
        while at < end:
            if room == 0 or len(parts[-1]) == _IOV_MAX:
                parts.append([])
                room = _CHUNK_BYTES
            taken = min(room, end - at)
            parts[-1].append((at, taken))
            room -= taken
            at += taken
    return parts


def _move_all(move: _Move, pid: int, mapping: Mapping, part: Sequence[Run], local: int) -> None:
    here = array("Q", chain.from_iterable((local + offset, length) for offset, length in part))
    there = array("Q", chain.from_iterable((mapping.start + offset, length) for offset, length in part))
    moved = move(pid, here.buffer_info()[0], len(part), there.buffer_info()[0], len(part), 0)
    if moved < 0:
        number = ctypes.get_errno()
        with _told(pid, "copying the machine's memory"):
            raise OSError(number, os.strerror(number))
    if moved != total(part):
        raise _failed("a part of the machine's memory could not be copied: it is not there, or memory ran out")


def _libc_calls() -> ctypes.CDLL:
    """process_vm_readv(pid, local_iov, count, remote_iov, count, flags) and its twin; they leave Python's lock."""
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (libc.process_vm_readv, libc.process_vm_writev):
        call.restype = ctypes.c_ssize_t
        vector = (ctypes.c_void_p, ctypes.c_ulong)
        call.argtypes = (ctypes.c_int, *vector, *vector, ctypes.c_ulong)
    return libc


_libc = _libc_calls()


# errors


@contextlib.contextmanager
def _told(pid: int, what: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ProcessLookupError) as error:
        raise Lost(f"{what}: process {pid} is gone", stage=_STAGE, errno=errno.ESRCH) from error
    except OSError as error:
        raise StartFailed(f"{what}: {error.strerror}", stage=_STAGE, errno=error.errno or 0) from error


def _failed(why: str) -> IsolatError:
    return StartFailed(why, stage=_STAGE)
