"""Run one program that reads what others wrote, with as little as possible: a script, not a module to import.

``python -I -S confine.py [--read PATH]... [--write PATH]... [--user | --nobody] [--network] [--file-bytes N]
-- PROGRAM ARG...``

What it guarantees, in order: the program dies with whoever started it (PR_SET_PDEATHSIG, prctl(2)); it has no network,
no System V IPC and a host name of its own (unshare(2)); where the kernel has Landlock (landlock(7), Linux 5.13) it can
read only below the ``--read`` paths and the system's libraries, and write only below the ``--write`` paths; with
``--user`` it runs as nobody, without new privileges, with CAP_DAC_READ_SEARCH as its only capability, so that it reads
a tree of any owner and changes none; with ``--nobody`` it is the same without that capability. ``--network`` leaves it
the machine's network, ``--file-bytes`` bounds the size of any file that it writes (RLIMIT_FSIZE).

What it does not do: there is no system call filter, and without Landlock the program can read every file of the
machine (it still cannot send it anywhere).

A process of its own rather than a ``preexec_fn``, because running Python between fork and exec in a daemon with
threads can deadlock (subprocess's own warning). A child that is Python itself can go further than this script, which
must leave a program able to start: linux/lockdown.py.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

_PR_SET_PDEATHSIG = 1
_SIGKILL = 9  # importing signal takes longer than all the rest
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWNET = 0x04000000, 0x08000000, 0x40000000
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture since 5.13
_PATH_BENEATH = 1
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, read a directory
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8  # write, remove (dir, file), make (dir, file)
_EVERY = (1 << 13) - 1  # all rights of Landlock's first version
_REFER = 1 << 13  # rename and link from one directory to another; before Landlock's second version never allowed
_GET_VERSION = 1
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/etc/ld.so.cache", "/proc/sys/kernel")
_DEVICES = ("/dev/null", "/dev/urandom")
_NOBODY = "65534"
_KEYCTL, _JOIN_SESSION_KEYRING = {"x86_64": 250, "aarch64": 219}, 1

_libc = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """Be killed when the process ``parent``, which started this one, ends. Raises SystemExit when it has already."""
    _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("confine: whoever started this is gone")


def leave_network() -> bool:
    """Namespaces of its own, with nothing in them. False where that is not allowed."""
    return bool(_libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS) == 0)


def leave_keys() -> None:
    """Have a session keyring of this thread's own, with nothing in it, instead of that of whoever started us.

    It is inherited, and what is in it is readable to everybody who has it, whatever user that is (session-keyring(7)).
    Where it is not allowed (a container's filter), its keys are not to be reached either.
    """
    number = _KEYCTL.get(os.uname().machine)
    if number is not None:
        _libc.syscall(number, _JOIN_SESSION_KEYRING, None)


def no_new_privileges() -> None:
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def landlock(read: list[str], write: list[str], system: tuple[str, ...] = _SYSTEM) -> bool:
    """Confine this process for good. False where the kernel has no Landlock."""
    second = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION) >= 2
    refer = _REFER if second else 0
    attributes = struct.pack("<Q", _EVERY | refer)
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    for paths, rights in ((read, _READ), (write, _READ | _WRITE | refer), (list(system), _READ)):
        for path in paths:
            _allow(ruleset, path, rights)
    for path in _DEVICES if system else ():
        _allow(ruleset, path, 1 << 1 | 1 << 2)
    confined: int = _libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return confined == 0


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Add one path; a right that means nothing for a plain file would be refused with EINVAL."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):  # noqa: PTH112 - pathlib would double this script's start
        rights &= 1 << 0 | 1 << 1 | 1 << 2
    rule = struct.pack("<Qi", rights, descriptor)
    _libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    os.close(descriptor)


def _as_nobody(program: list[str], keep: str) -> list[str]:
    """setpriv(1) sets the death signal last: the kernel clears it when a process changes its user."""
    return [
        *("setpriv", "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups"),
        *("--inh-caps", keep, "--ambient-caps", keep, "--bounding-set", keep),
        *("--no-new-privs", "--pdeathsig", "KILL", "--"),
        *program,
    ]


def _find(name: str) -> str:
    for directory in os.get_exec_path():
        path = f"{directory}/{name}"
        if os.access(path, os.X_OK):
            return path
    raise SystemExit(f"confine: could not find {name}")


class Wanted:
    """What the command line asks for. Python's own argparse would take longer than all the rest."""

    __slots__ = ("capabilities", "file_bytes", "network", "program", "read", "write")

    def __init__(self, argv: list[str]) -> None:
        self.read: list[str] = []
        self.write: list[str] = []
        self.capabilities = ""  # of nobody, for setpriv; empty: who it was
        self.network = False
        self.file_bytes = -1
        self.program: list[str] = []
        rest = list(argv)
        while rest and self._take(rest.pop(0), rest):
            pass
        if not self.program:
            raise SystemExit("confine: no program given")

    def _take(self, word: str, rest: list[str]) -> bool:
        """Whether there may be more."""
        if word == "--":
            self.program = rest
            return False
        if word == "--user":
            self.capabilities = "-all,+dac_read_search"
        elif word == "--nobody":
            self.capabilities = "-all"
        elif word == "--network":
            self.network = True
        elif word == "--file-bytes" and rest:
            self.file_bytes = int(rest.pop(0))
        elif word in ("--read", "--write") and rest:
            (self.read if word == "--read" else self.write).append(rest.pop(0))
        else:
            raise SystemExit(f"confine: cannot understand {word!r}")
        return True


def main() -> None:
    wanted = Wanted(sys.argv[1:])
    die_with(os.getppid())
    if not wanted.network and not leave_network():
        sys.stderr.write("confine: no namespaces of its own: it runs with the machine's network\n")
    program = _as_nobody(wanted.program, wanted.capabilities) if wanted.capabilities else wanted.program
    path, environment = _find(program[0]), dict(os.environ)  # now: Python's own modules are out of reach below
    if wanted.file_bytes >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (wanted.file_bytes, wanted.file_bytes))
    if wanted.read or wanted.write:
        landlock(wanted.read, wanted.write)
    if not wanted.capabilities:
        no_new_privileges()
    os.execve(path, program, environment)


if __name__ == "__main__":
    main()
