"""The system call list: what is in it, what is not, and that arguments can't be used to pass it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.errors import Unsupported
from isolat.oci import seccomp
from isolat.oci.capabilities import GIVEN, LEFT_OUT, oci_capabilities
from isolat.oci.seccomp import EAFNOSUPPORT, ENOSYS, EPERM, oci_seccomp

# What escapes from containers were made of.
ESCAPES = (
    "unshare", "mount", "umount2", "setns", "keyctl", "add_key", "request_key", "ptrace", "process_vm_readv",
    "process_vm_writev", "kcmp", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick",
    "mount_setattr", "pivot_root", "bpf", "userfaultfd", "perf_event_open", "io_uring_setup", "io_uring_enter",
    "io_uring_register", "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module",
    "open_by_handle_at", "name_to_handle_at", "swapon", "swapoff", "reboot", "settimeofday", "clock_settime",
    "quotactl", "acct", "lookup_dcookie", "syslog", "iopl", "ioperm", "vhangup", "nfsservctl", "pidfd_getfd",
    "fanotify_init", "process_madvise", "migrate_pages", "move_pages", "sethostname", "setdomainname",
)  # fmt: skip
EVERYDAY = (
    "read", "write", "execve", "execveat", "mmap", "wait4", "kill", "openat", "openat2", "chroot", "setuid",
    "capset", "seccomp", "landlock_restrict_self", "pidfd_open", "close_range", "futex_waitv", "rseq", "mknodat",
    "epoll_pwait2", "memfd_create", "set_robust_list", "statx", "getrandom", "prlimit64", "copy_file_range",
)  # fmt: skip
MACHINES = ("x86_64", "aarch64")
REGISTER = st.integers(0, 2**64 - 1)


def _met(argument: dict[str, Any], value: int) -> bool:
    """One comparison as the filter makes it: unsigned, on the whole register (seccomp_rule_add(3))."""
    wanted: int = argument["value"]
    answers: dict[str, bool] = {
        "SCMP_CMP_EQ": value == wanted,
        "SCMP_CMP_LT": value < wanted,
        "SCMP_CMP_GE": value >= wanted,
        "SCMP_CMP_MASKED_EQ": value & wanted == argument.get("valueTwo"),
    }
    return answers[argument["op"]]


def _answer(profile: dict[str, Any], name: str, *registers: int) -> int:
    """0 where the call is allowed, else its errno. Registers that are not given are 0."""
    found, values = set(), (*registers, 0, 0)
    for rule in profile["syscalls"]:
        if name in rule["names"] and all(_met(one, values[one["index"]]) for one in rule.get("args", [])):
            found.add(0 if rule["action"] == "SCMP_ACT_ALLOW" else rule["errnoRet"])
    assert len(found) <= 1, f"two rules disagree about {name}{registers}"
    return found.pop() if found else profile["defaultErrnoRet"]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("compat32", [False, True])
@pytest.mark.parametrize("name", ESCAPES)
def test_what_escapes_are_made_of_fails(machine: str, compat32: bool, name: str) -> None:
    assert _answer(oci_seccomp(machine, compat32=compat32), name) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", EVERYDAY)
def test_what_programs_use_every_day_is_allowed(machine: str, name: str) -> None:
    assert _answer(oci_seccomp(machine), name) == 0


def test_clone3_and_the_unknown_do_not_exist() -> None:
    for name in ("clone3", "a_call_of_next_year"):
        assert _answer(oci_seccomp("x86_64"), name) == ENOSYS


@given(REGISTER)
def test_no_flags_of_clone_make_a_namespace(flags: int) -> None:
    wants = any(flags & namespace for namespace in seccomp.CLONE_NAMESPACES)
    assert _answer(oci_seccomp("x86_64"), "clone", flags) == (EPERM if wants else 0)


@given(st.one_of(REGISTER, st.integers(0, 64), st.integers(0, 2**32).map(lambda high: high << 32 | 40)))
def test_no_register_makes_a_socket_of_a_family_that_is_out(register: int) -> None:
    """The kernel reads the lower 32 bits only: whatever it would take for VSOCK or ALG must not pass."""
    allowed = _answer(oci_seccomp("x86_64"), "socket", register) == 0
    assert allowed == (register < seccomp.FIRST_FAMILY_OUT)
    assert not (allowed and register & 0xFFFFFFFF >= seccomp.FIRST_FAMILY_OUT)


def test_a_family_that_is_out_is_said_not_to_exist() -> None:
    for family in (29, 38, 40, 44):
        assert _answer(oci_seccomp("x86_64"), "socket", family) == EAFNOSUPPORT


@given(REGISTER)
def test_only_harmless_personalities(value: int) -> None:
    assert (_answer(oci_seccomp("x86_64"), "personality", value) == 0) == (value in seccomp.PERSONALITIES)


@given(st.one_of(REGISTER, st.integers(0, 2**56 - 1).map(lambda rest: (rest >> 8) << 16 | 0x9400 | rest & 0xFF)))
def test_no_register_is_an_operation_of_btrfs_alone(register: int) -> None:
    """The kernel reads the lower 32 bits only."""
    number = register & 0xFFFFFFFF
    allowed = _answer(oci_seccomp("x86_64"), "ioctl", 3, register) == 0
    assert allowed == (number >> 8 & 0xFF != seccomp.BTRFS or number in seccomp.OF_ALL_FILE_SYSTEMS)


@pytest.mark.parametrize("machine", MACHINES)
def test_subvolumes_are_said_not_to_exist_and_files_can_still_be_cloned(machine: str) -> None:
    profile = oci_seccomp(machine)
    for number in seccomp.MAKING_SUBVOLUMES:
        assert _answer(profile, "ioctl", 3, number) == seccomp.ENOTTY
    tcgets, tiocgwinsz, fionread, fs_ioc_getflags = 0x5401, 0x5413, 0x541B, 0x80086601
    for number in (tcgets, tiocgwinsz, fionread, fs_ioc_getflags, *seccomp.OF_ALL_FILE_SYSTEMS):
        assert _answer(profile, "ioctl", 3, number) == 0


def test_another_system_call_table_only_when_asked_for() -> None:
    assert oci_seccomp("x86_64")["architectures"] == ["SCMP_ARCH_X86_64"]
    both = oci_seccomp("x86_64", compat32=True)
    assert both["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert _answer(oci_seccomp("x86_64"), "socketcall") == ENOSYS
    for name in ("socketcall", "modify_ldt", "clock_gettime64", "_llseek", "waitpid"):
        assert _answer(both, name) == 0


def test_a_machine_without_a_list_is_refused() -> None:
    with pytest.raises(Unsupported, match="riscv64") as caught:
        oci_seccomp("riscv64")
    assert caught.value.hint


def test_the_lists_are_made_by_the_same_rules_as_they_are_used() -> None:
    distribution = {
        "syscalls": [
            {"names": ["read", "mount", "clone", "newer"], "action": "SCMP_ACT_ALLOW", "includes": {}, "excludes": {}},
            {"names": ["chroot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_CHROOT"]}},
            {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["s390_pci_mmio_read"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}},
            {"names": ["waitpid"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["swapon"], "action": "SCMP_ACT_ERRNO"},
        ]
    }
    data = seccomp.resolve(distribution, {"x86_64": {"read", "chroot", "arch_prctl", "bpf", "mount", "clone"}})
    assert set(data["x86_64"]) == {"read", "chroot", "arch_prctl", *seccomp.ADDED}
    assert "waitpid" in data["compat32"]
    assert "s390_pci_mmio_read" not in data["compat32"]
    assert set(data["denied"]) == seccomp.REMOVED


@pytest.mark.parametrize("machine", MACHINES)
def test_the_committed_data_holds_nothing_that_is_decided_elsewhere(machine: str) -> None:
    names = set(seccomp._data()[machine])
    assert not names & (seccomp.REMOVED | seccomp.BY_ARGUMENTS | seccomp.ABSENT | set(seccomp.COMPAT_ONLY))
    assert set(seccomp._data()["denied"]) == seccomp.REMOVED


def test_capabilities_are_fewer_than_dockers_and_none_is_inherited() -> None:
    docker = {
        "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
        "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID",
        "CAP_SYS_CHROOT",
    }  # fmt: skip
    given_names = {name for name, _ in GIVEN}
    assert given_names < docker
    assert given_names | {name for name, _ in LEFT_OUT} == docker
    found = oci_capabilities()
    assert found["inheritable"] == found["ambient"] == []
    assert set(found["bounding"]) == set(found["effective"]) == set(found["permitted"]) == given_names
