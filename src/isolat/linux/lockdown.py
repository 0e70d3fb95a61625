"""A Python process gives up everything but its open descriptors, because it is about to read what a stranger wrote.

confine.py prepares a *program*, which must still be found, linked and started. A child that is Python itself imports
all it needs, then calls ``lock``, and from then on:

- it is nobody, without groups and capabilities, and can gain none (where it was root; else it stays who it was);
- it opens nothing, finds nothing out about any path, makes no process and no thread, sends no signal, has no socket:
  the system call filter (seccomp(2)) lets it read, write, allocate and end, and answers all else with EPERM;
- where the kernel has Landlock, no path is readable anyway; it has an empty network namespace;
- memory, processor time and the size of what it writes are bounded, and it leaves no core file;
- it dies with whoever started it.

The filter is what all this hangs on: without it ``lock`` raises OSError instead of going on half locked.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct

from isolat.linux import confine

_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_SECCOMP_MODE_FILTER = 2
_LAST_CAPABILITY = 63
_NOBODY = 65534

# linux/filter.h, linux/seccomp.h
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_X32 = 0x40000000  # x86_64's second system call table: the same numbers with this bit

# Audit's number of the architecture, then the system calls (asm/unistd_64.h; asm-generic/unistd.h).
_TABLES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
            "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18,
            "writev": 20, "mremap": 25, "madvise": 28, "getpid": 39, "exit": 60, "ftruncate": 77, "sigaltstack": 131,
            "gettid": 186, "futex": 202, "clock_gettime": 228, "exit_group": 231, "fallocate": 285, "getrandom": 318,
            "copy_file_range": 326,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "ftruncate": 46, "fallocate": 47, "close": 57, "lseek": 62, "read": 63, "write": 64, "writev": 66,
            "pread64": 67, "pwrite64": 68, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "clock_gettime": 113,
            "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "getpid": 172,
            "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233,
            "getrandom": 278, "copy_file_range": 285,
        },
    ),
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def filter_program(machine: str) -> bytes:
    """The filter as instructions of classic BPF. Raises OSError for a machine without a table."""
    if machine not in _TABLES:
        raise OSError(f"there is no system call filter for a {machine} machine")
    architecture, calls = _TABLES[machine]
    numbers = sorted(calls.values())
    start = [
        _instruction(_LOAD, 0, 0, _ARCHITECTURE_AT),
        _instruction(_EQUAL, 1, 0, architecture),
        _instruction(_RETURN, 0, 0, _KILL),
        _instruction(_LOAD, 0, 0, _NUMBER_AT),
        _instruction(_AT_LEAST, len(numbers), 0, _X32),
    ]
    tests = [_instruction(_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    return b"".join([*start, *tests, _instruction(_RETURN, 0, 0, _EPERM), _instruction(_RETURN, 0, 0, _ALLOW)])


def _instruction(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def lock(parent: int, *, memory_bytes: int, file_bytes: int, cpu_s: int) -> None:
    """Do all of the above, for good. ``parent`` is who started this. Raises OSError, SystemExit."""
    confine.leave_network()
    _bound(memory_bytes, file_bytes, cpu_s)
    if os.geteuid() == 0:
        _become_nobody()
    confine.die_with(parent)  # after the user has changed, which clears it (prctl(2))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    confine.no_new_privileges()
    confine.landlock([], [], ())
    _filter()


def _bound(memory_bytes: int, file_bytes: int, cpu_s: int) -> None:
    wanted = (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_CORE, 0),
    )
    for which, value in wanted:
        hard = resource.getrlimit(which)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # Where both are the same the kernel kills without saying why; with a second more it says SIGXCPU first
        more = which == resource.RLIMIT_CPU and least != hard
        resource.setrlimit(which, (least, least + more))


def _become_nobody() -> None:
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(_LAST_CAPABILITY + 1):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _filter() -> None:
    code = filter_program(os.uname().machine)
    program = _Program(len(code) // 8, code)
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the system call filter could not be installed")
