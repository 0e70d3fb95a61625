"""Which system calls a container may make: ours, made from the distribution's list and committed as data.

A plan must not depend on the machine it is made on, so the list is resolved once (``python -m isolat.oci.seccomp``
reads the distribution's ``seccomp.json`` and the kernel's headers) and kept in ``seccomp.json`` beside this file.
What differs from the distribution's:

- It allows mounts, namespaces, keyrings and ptrace to anybody, because rootless Podman lives on them. Escapes do
  too. They fail with EPERM here, as in Docker without CAP_SYS_ADMIN.
- Harmless calls that are newer than the list are added.
- Only the machine's own architecture may be used. 32-bit programs (``x-container: {compat32: true}``) bring a
  second system call table, and ``socketcall``, whose arguments are in memory where no filter sees them.

- ``ioctl`` is allowed but for btrfs's own operations: see ``BTRFS``.

A call that nobody named fails with ENOSYS rather than EPERM: a C library that is newer than the list then falls back
to the older call, where EPERM would be taken for the answer (glibc's fchmodat with fchmodat2 is the known case).
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from isolat.errors import Unsupported
from isolat.oci.capabilities import GIVEN

EPERM = 1
ENOSYS = 38
ENOTTY = 25
EAFNOSUPPORT = 97

# clone(2): NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET. CLONE_NEWTIME exists only in clone3 and unshare.
CLONE_NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)

# PER_LINUX, PER_LINUX32, each with UNAME26 or without, and the query (personality(2)). Not ADDR_NO_RANDOMIZE.
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)

# AF_PACKET is 17; families from 18 on (RDS, CAN, TIPC, Bluetooth, ALG, VSOCK, XDP, …) are the kernel's least used
# network code, one of them (VSOCK) a way past the network namespace. Compared as "less than" on the whole 64-bit
# register: "not equal" is passed by setting a bit above the 32 that socket(2) reads.
FIRST_FAMILY_OUT = 18

# btrfs's own operations have 0x94 in bits 8 to 15 of their number. Whoever may write to a directory may make a
# subvolume in it, which is not in the quota of the one around: so a volume would have no limit. The number is 32 bits.
BTRFS = 0x94
_LAST = 0xFFFFFFFF

# Of the same family, and every file system's: FICLONE, FICLONERANGE, FIDEDUPERANGE, FS_IOC_GETFSLABEL.
OF_ALL_FILE_SYSTEMS = (0x40049409, 0x4020940D, 0xC0189436, 0x81009431)

# SNAP_CREATE, SUBVOL_CREATE and their second versions, which are told not to exist here.
MAKING_SUBVOLUMES = (0x50009401, 0x5000940E, 0x50009417, 0x50009418)

ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}

# Newer than the distribution's list, and without any power of their own.
ADDED = (
    "cachestat", "fchmodat2", "file_getattr", "file_setattr", "futex_requeue", "futex_wait", "futex_waitv",
    "futex_wake", "getxattrat", "listxattrat", "map_shadow_stack", "mseal", "removexattrat",
    "set_mempolicy_home_node", "setxattrat",
)  # fmt: skip

# Decided by their arguments, below.
BY_ARGUMENTS = frozenset({"clone", "ioctl", "personality", "socket"})

# Denied with ENOSYS by being left out: clone3 keeps its flags in memory, and C libraries fall back to clone.
ABSENT = frozenset({"clone3"})

# What escapes are made of, and what a guest has no business with.
REMOVED = frozenset({
    "_sysctl", "acct", "add_key", "bdflush", "bpf", "clock_settime", "clock_settime64", "create_module",
    "delete_module", "fanotify_init", "fanotify_mark", "finit_module", "fsconfig", "fsmount", "fsopen", "fspick",
    "get_kernel_syms", "init_module", "io_pgetevents", "io_uring_enter", "io_uring_register", "io_uring_setup",
    "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "listmount", "lookup_dcookie",
    "migrate_pages", "modify_ldt", "mount", "mount_setattr", "move_mount", "move_pages", "name_to_handle_at",
    "nfsservctl", "open_by_handle_at", "open_tree", "open_tree_attr", "perf_event_open", "pidfd_getfd",
    "pivot_root", "process_madvise", "process_vm_readv", "process_vm_writev", "ptrace", "query_module", "quotactl",
    "quotactl_fd", "reboot", "request_key", "setdomainname", "sethostname", "setns", "settimeofday", "statmount",
    "stime", "swapoff", "swapon", "sysfs", "syslog", "umount", "umount2", "unshare", "uselib", "userfaultfd",
    "ustat", "vhangup", "vm86", "vm86old", "vmsplice",
})  # fmt: skip

# Only with 32-bit programs: modify_ldt for their thread storage, socketcall for their sockets.
COMPAT_ONLY = ("modify_ldt", "socketcall")


@cache
def _data() -> dict[str, list[str]]:
    found = json.loads(Path(__file__).with_name("seccomp.json").read_text(encoding="ascii"))
    return {name: list(value) for name, value in found.items()}


def _argument(index: int, op: str, value: int, second: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = {"index": index, "value": value, "op": f"SCMP_CMP_{op}"}
    return found | {"valueTwo": second} if op == "MASKED_EQ" else found


def _allow(name: str, argument: dict[str, Any]) -> dict[str, Any]:
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [argument]}


def _fail(names: list[str], errno: int, *arguments: dict[str, Any]) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno}
    return rule | {"args": list(arguments)} if arguments else rule


def _by_arguments() -> list[dict[str, Any]]:
    every = 0
    for flag in CLONE_NAMESPACES:
        every |= flag
    return [
        _allow("clone", _argument(0, "MASKED_EQ", every, 0)),
        *(_fail(["clone"], EPERM, _argument(0, "MASKED_EQ", flag, flag)) for flag in CLONE_NAMESPACES),
        *(_allow("personality", _argument(0, "EQ", value)) for value in PERSONALITIES),
        _allow("socket", _argument(0, "LT", FIRST_FAMILY_OUT)),
        _fail(["socket"], EAFNOSUPPORT, _argument(0, "GE", FIRST_FAMILY_OUT)),
        *_ioctl(),
    ]


def _ioctl() -> list[dict[str, Any]]:
    """All but btrfs's own. One rule for each bit that another family may differ in: there is no "not equal, masked"."""
    bits = [1 << bit for bit in range(8, 16)]
    return [
        *(_allow("ioctl", _argument(1, "MASKED_EQ", bit, ~(BTRFS << 8) & bit)) for bit in bits),
        *(_allow("ioctl", _argument(1, "MASKED_EQ", _LAST, number)) for number in OF_ALL_FILE_SYSTEMS),
        *(_fail(["ioctl"], ENOTTY, _argument(1, "MASKED_EQ", _LAST, number)) for number in MAKING_SUBVOLUMES),
    ]


def oci_seccomp(machine: str, *, compat32: bool = False) -> dict[str, Any]:
    """``linux.seccomp`` (OCI config-linux, "Seccomp") for a machine as ``uname -m`` names it."""
    if machine not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise Unsupported(
            f"there is no system call list for a {machine} machine; there are lists for {known}",
            hint="use the microvm layer, which needs none",
        )
    native, compat = ARCHITECTURES[machine]
    data = _data()
    allowed = sorted({*data[machine], *data["compat32"], *COMPAT_ONLY} if compat32 else set(data[machine]))
    denied = sorted(set(data["denied"]) - set(allowed))
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": ENOSYS,
        "architectures": [native, compat] if compat32 else [native],
        "syscalls": [
            {"names": allowed, "action": "SCMP_ACT_ALLOW"},
            _fail(denied, EPERM),
            *_by_arguments(),
        ],
    }


def resolve(distribution: dict[str, Any], tables: dict[str, set[str]]) -> dict[str, list[str]]:
    """The committed data, from the distribution's profile and the names in each architecture's table."""
    allowed, given = set(ADDED), {name for name, _ in GIVEN}
    for group in distribution["syscalls"]:
        includes = group.get("includes") or {}
        by_capability = bool(includes.get("caps")) and given.issuperset(includes["caps"])
        conditional = (includes and not by_capability) or group.get("excludes") or group.get("args")
        if group["action"] == "SCMP_ACT_ALLOW" and not conditional:
            allowed.update(group["names"])
    allowed -= REMOVED | BY_ARGUMENTS | ABSENT | set(COMPAT_ONLY)
    allowed |= {"arch_prctl"}  # x86 thread storage; the distribution allows it there only, and only x86 has it
    data = {machine: sorted(allowed & (table | set(ADDED))) for machine, table in tables.items()}
    everywhere = set.intersection(*(set(names) for names in data.values()))
    return data | {"compat32": sorted(allowed - everywhere), "denied": sorted(REMOVED)}


def _table(header: str) -> set[str]:
    text = Path(header).read_text(encoding="ascii")
    return set(re.findall(r"#define __NR(?:3264)?_(\w+)\s", text))


def main(argv: list[str]) -> int:
    """Write the data: PROFILE X86_64_HEADER GENERIC_HEADER, to standard output."""
    profile, x86_64, generic = argv
    distribution = json.loads(Path(profile).read_text(encoding="ascii"))
    tables = {"x86_64": _table(x86_64), "aarch64": _table(generic)}
    json.dump(resolve(distribution, tables), sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
