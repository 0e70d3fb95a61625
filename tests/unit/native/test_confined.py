"""What the words of guests reach before anybody else starts behind a filter, a limit, and without anybody's keys."""

from __future__ import annotations

import ctypes
import errno
import os
import socket

import pytest
from tests.unit.native.wireside import Controller

from isolat.wire import codec
from isolat.wire import kinds as k

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.getuid() != 0, reason="what is refused, root could do")]

PYTHON = "/usr/bin/python3"
MIB = 1 << 20
GET_KEYRING, SESSION_KEYRING, KEYCTL = 0, -3, {"x86_64": 250, "aarch64": 219}[os.uname().machine]
NEWUSER, NEWPID = 0x10000000, 0x20000000
# Numbers of x86_64; what is not refused by the filter fails for its arguments, or does nothing.
REFUSED = {
    "ptrace": 101, "personality": 135, "modify_ldt": 154, "pivot_root": 155, "adjtimex": 159, "chroot": 161,
    "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
    "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
    "quotactl": 179, "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
    "migrate_pages": 256, "unshare": 272, "vmsplice": 278, "move_pages": 279, "perf_event_open": 298,
    "fanotify_init": 300, "fanotify_mark": 301, "name_to_handle_at": 303, "open_by_handle_at": 304,
    "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
    "finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430,
    "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442,
    "quotactl_fd": 443, "statmount": 457, "listmount": 458, "open_tree_attr": 467,
}  # fmt: skip
# Each call with arguments that no kernel takes, as root with every privilege: only a filter answers EPERM to all.
CALLS = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {REFUSED}.items():
    ctypes.set_errno(0)
    bad = ctypes.c_long(-1)
    result = libc.syscall(ctypes.c_long(number), bad, bad, bad, bad, bad, bad)
    print(name, ctypes.get_errno() if result == -1 else 0)
"""
FAMILIES = """
import socket
for family in range(46):
    try:
        socket.socket(family, socket.SOCK_DGRAM).close()
        print(family, 0)
    except OSError as error:
        print(family, error.errno)
print(-1, 0 if socket.socketpair() else 1)
"""
CLONES = f"""
import ctypes, os, threading
libc = ctypes.CDLL(None, use_errno=True)
for flags in (17, 17 | {NEWUSER}, 17 | {NEWPID}):
    pid = libc.syscall({{"x86_64": 56, "aarch64": 220}}[os.uname().machine], flags, 0, 0, 0, 0)
    if not pid:
        os._exit(0)
    print(flags, ctypes.get_errno() if pid < 0 else 0, flush=True)
ctypes.set_errno(0)
libc.syscall(435, 0, 0)
print(435, ctypes.get_errno())
thread = threading.Thread(target=lambda: print(0, 0))
thread.start()
thread.join()
"""


def told(c: Controller, script: str, flags: int) -> dict[str, int]:
    """Lines of a name and a number that a program prints which is started so."""
    result = c.run("p", [PYTHON, "-c", script], flags=flags)
    assert result.code == 0, result
    c.ask(k.FORGET, [(k.T_KEY, "p")])
    return {name: int(number) for name, number in map(str.split, filter(None, result.stdout.decode().splitlines()))}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86_64's")
def test_what_it_never_asks_for_is_refused(c: Controller) -> None:
    assert told(c, CALLS, k.F_CONFINED) == dict.fromkeys(REFUSED, errno.EPERM)


def test_it_has_unix_sockets_and_no_others(c: Controller) -> None:
    confined, free = told(c, FAMILIES, k.F_CONFINED), told(c, FAMILIES, 0)
    assert {name for name, error in confined.items() if not error} == {str(int(socket.AF_UNIX)), "-1"}
    assert set(confined.values()) == {0, errno.EAFNOSUPPORT}
    assert not free[str(int(socket.AF_INET))]


def test_it_makes_threads_and_no_namespaces(c: Controller) -> None:
    expected = {"17": 0, str(17 | NEWUSER): errno.EPERM, str(17 | NEWPID): errno.EPERM, "435": errno.ENOSYS, "0": 0}
    assert told(c, CLONES, k.F_CONFINED) == expected


def test_it_has_one_filter_and_gains_no_privileges(c: Controller) -> None:
    script = """
for line in open('/proc/self/status'):
    if line.startswith(('NoNew', 'Seccomp')):
        print(*line.split(':'))
"""
    before, after = told(c, script, 0), told(c, script, k.F_CONFINED)
    assert after["NoNewPrivs"] == 1
    assert after["Seccomp"] == 2
    assert after["Seccomp_filters"] == before["Seccomp_filters"] + 1


def test_no_file_becomes_larger_than_it_may(c: Controller) -> None:
    more: codec.Fields = [(k.T_SIZE, 3 * MIB)]
    said = c.run("p", ["grep", "Max file size", "/proc/self/limits"], more=more).stdout.split()
    assert said[3:5] == [b"%d" % (3 * MIB)] * 2
    assert b"unlimited" in c.run("q", ["grep", "Max file size", "/proc/self/limits"]).stdout


def test_nobody_has_the_session_keyring_of_who_started_us(c: Controller) -> None:
    script = f"import ctypes; print(ctypes.CDLL(None).syscall({KEYCTL}, {GET_KEYRING}, {SESSION_KEYRING}, 0))"
    ours = ctypes.CDLL(None).syscall(KEYCTL, GET_KEYRING, SESSION_KEYRING, 0)
    theirs = [int(c.run(key, [PYTHON, "-c", script]).stdout) for key in ("p", "q")]
    assert min(theirs) > 0
    assert len({ours, *theirs}) == 3
