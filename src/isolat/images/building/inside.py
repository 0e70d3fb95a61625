"""The sandbox that one build runs in: a script, not a module to import. ``python -I -S inside.py`` with JSON on 0.

buildah, the image's layers and contexts that it reads, and every RUN step are strangers' work. This script makes them a
place of their own and stays in it as its PID 1, which starts one program after the other as the daemon asks
(images/building/sandbox.py, where the fields of the JSON are told).

What it guarantees, in the order in which it is made:

- It dies with whoever started it (PR_SET_PDEATHSIG, prctl(2)), and with it, as the first process of a PID namespace,
  everything else inside (pid_namespaces(7)).
- It is in the control group of the build before anything else happens.
- PID, IPC, UTS and cgroup namespaces, and without ``host_network`` the network's, belong to the machine's first user
  namespace: root inside has no capability over them (user_namespaces(7)).
- Its root is a tmpfs, read-only in the end, with what the JSON lists and nothing else of this machine.
- Then it enters a user namespace of its own uid range, and in it a mount namespace: what was mounted before is locked
  (mount_namespaces(7)), so nothing inside can be made writable or uncovered again.
- no_new_privs; the bounding set has what buildah and an OCI runtime need; a system call filter, by libseccomp, keeps
  out what escapes are made of and neither needs, further user namespaces above all.

Its words on the control socket, one line of JSON each: {"ready": true}; then for each {"argv", "cwd", "input", "keep"}
the answer {"code"} and, with "keep", what the program wrote on its standard output (``text``, base64). All other
output goes to this script's own standard output.
"""

# pathlib would double this script's start
# ruff: noqa: PTH102, PTH103, PTH112, PTH114, PTH115, PTH120, PTH211
from __future__ import annotations

import base64
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 1 << 18
_MNT_DETACH = 2
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # the same numbers on every architecture
_TREE_CLONE, _TREE_CLOEXEC, _EMPTY_PATH, _FROM_EMPTY_PATH = 1, 0o2000000, 0x1000, 4
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_IDMAP = 1, 2, 4, 0x100000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_KEEP_BYTES = 4 << 20
_TMP_BYTES, _RUN_BYTES, _SHM_BYTES, _ROOT_BYTES = 256 << 20, 64 << 20, 64 << 20, 8 << 20

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
_TOPS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")

# capabilities(7), their numbers in <linux/capability.h>. Not among them: NET_ADMIN and NET_RAW (the network is not
# theirs), SYS_PTRACE, SYS_RESOURCE, SYS_MODULE, BPF, …
_KEPT = {
    "CHOWN": 0, "DAC_OVERRIDE": 1, "DAC_READ_SEARCH": 2, "FOWNER": 3, "FSETID": 4, "KILL": 5, "SETGID": 6,
    "SETUID": 7, "SETPCAP": 8, "NET_BIND_SERVICE": 10, "SYS_CHROOT": 18, "SYS_ADMIN": 21, "MKNOD": 27,
    "SETFCAP": 31,
}  # fmt: skip

_DENIED = (
    "acct", "add_key", "bpf", "clock_adjtime", "clock_settime", "create_module", "delete_module", "fanotify_init",
    "finit_module", "get_kernel_syms", "init_module", "io_uring_enter", "io_uring_register", "io_uring_setup",
    "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie", "mbind", "migrate_pages",
    "move_pages", "name_to_handle_at", "nfsservctl", "open_by_handle_at", "perf_event_open", "pidfd_getfd",
    "process_madvise", "process_vm_readv", "process_vm_writev", "ptrace", "query_module", "quotactl", "quotactl_fd",
    "reboot", "request_key", "settimeofday", "swapoff", "swapon", "syslog", "userfaultfd", "vhangup", "vmsplice",
)  # fmt: skip
_SCMP_ALLOW, _SCMP_ERRNO, _SCMP_MASKED_EQ = 0x7FFF0000, 0x00050000, 7
_EPERM, _ENOSYS = 1, 38
_BTRFS = 0x94  # <linux/btrfs.h>, BTRFS_IOCTL_MAGIC

_libc = ctypes.CDLL(None, use_errno=True)
TYPE_CHECKING = False  # typing itself would double this script's start
if TYPE_CHECKING:
    from typing import Any

    JSON = dict[str, Any]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, *(ctypes.c_ulong(word) for word in (value, 0, 0, 0))), f"prctl {option}")


def _unshare(flags: int, what: str) -> None:
    _check(_libc.unshare(flags), f"a {what} of its own")


def _mount(source: str, target: str, fstype: str, flags: int, options: str = "") -> None:
    words = [word.encode() if word else None for word in (source, target, fstype)]
    result = _libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None)
    _check(result, f"mounting {fstype or 'bind'} at {target}")


# Mounts whose owners are shifted: made where the caller's mount namespace still is, attached in the new one


def _user_namespace(lines: list[list[int]]) -> int:
    """A descriptor of a new one with this map, (inside, outside, how many) each, for users and groups alike."""
    ready, waiting = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        try:
            _unshare(_NEWUSER, "user namespace")
            os.write(ready[1], b"1")
            os.close(waiting[1])
            os.read(waiting[0], 1)
        finally:
            os._exit(0)
    os.close(ready[1])
    os.read(ready[0], 1)
    text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in lines)
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(text)
    found = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    for fd in (waiting[1], waiting[0], ready[0]):
        os.close(fd)
    os.waitpid(pid, 0)
    return found


def _tree(source: str, descriptor: int, attributes: int, users: int) -> int:
    """A detached clone of the mount at ``source`` (or that the descriptor is of), without what is mounted below it."""
    at, flags = (descriptor, _EMPTY_PATH) if descriptor >= 0 else (-100, 0)
    path = b"" if descriptor >= 0 else source.encode()
    what = f"a view of {source}"
    tree = _check(_libc.syscall(_OPEN_TREE, at, path, ctypes.c_uint(_TREE_CLONE | _TREE_CLOEXEC | flags)), what)
    attributes |= _ATTR_NOSUID | _ATTR_NODEV | (_ATTR_IDMAP if users >= 0 else 0)
    packed = struct.pack("=QQQQ", attributes, 0, 0, max(users, 0))
    size = ctypes.c_size_t(len(packed))
    _check(_libc.syscall(_MOUNT_SETATTR, tree, b"", ctypes.c_uint(_EMPTY_PATH), packed, size), what)
    return tree


def _attach(tree: int, target: str) -> None:
    if not os.path.lexists(target):
        os.makedirs(target, 0o755)
    flags = ctypes.c_uint(_FROM_EMPTY_PATH)
    _check(_libc.syscall(_MOVE_MOUNT, tree, b"", -100, target.encode(), flags), f"attaching {target}")
    os.close(tree)


def _trees(config: JSON, users: int) -> list[tuple[int, str]]:
    found = []
    for bind in config["binds"]:
        lines = bind.get("lines")
        shifted = _user_namespace(lines) if lines else users if bind.get("shifted") else -1
        attributes = 0 if bind.get("write") else _ATTR_RDONLY
        found.append((_tree(bind["source"], bind.get("descriptor", -1), attributes, shifted), bind["target"]))
        if bind.get("descriptor", -1) >= 0:
            os.close(bind["descriptor"])
    return found


# The root


def _make_root(config: JSON, trees: list[tuple[int, str]]) -> None:
    root = config["root"]
    _mount("", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=755,size={_ROOT_BYTES}")
    for name in ("dev", "dev/pts", "dev/shm", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var"):
        os.mkdir(f"{root}/{name}", 0o755)
    for tree, target in trees:
        _attach(tree, root + target)
    for name in _TOPS:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
        elif os.path.isdir(f"/{name}"):
            _attach(_tree(f"/{name}", -1, _ATTR_RDONLY, -1), f"{root}/{name}")
    for name in _DEVICES:
        os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
        _mount(f"/dev/{name}", f"{root}/dev/{name}", "", _MS_BIND)
    for name, target in _LINKS.items():
        os.symlink(target, f"{root}/dev/{name}")
    for path, (text, mode) in config["files"].items():
        os.makedirs(os.path.dirname(root + path), 0o755, exist_ok=True)
        with open(root + path, "w") as file:
            file.write(text)
        os.chmod(root + path, mode)
    closed = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount("proc", f"{root}/proc", "proc", closed)
    _mount("sysfs", f"{root}/sys", "sysfs", closed | _MS_RDONLY)
    # Neither v1 nor v2: crun, told to leave control groups alone, still looks at what is there.
    _mount("tmpfs", f"{root}/sys/fs/cgroup", "tmpfs", closed | _MS_RDONLY, "size=4k")
    _mount("", root, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(root)
    _check(_libc.pivot_root(b".", b"."), "changing the root")
    _check(_libc.umount2(b".", _MNT_DETACH), "leaving the machine's root")
    os.chdir("/")


def _own_mounts() -> None:
    """What root inside may make itself, so that it owns it."""
    closed = _MS_NOSUID | _MS_NODEV
    _mount("devpts", "/dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5")
    _mount("tmpfs", "/dev/shm", "tmpfs", closed | _MS_NOEXEC, f"mode=1777,size={_SHM_BYTES}")
    _mount("tmpfs", "/run", "tmpfs", closed, f"mode=755,size={_RUN_BYTES}")
    _mount("tmpfs", "/tmp", "tmpfs", closed, f"mode=1777,size={_TMP_BYTES}")
    _mount("tmpfs", "/var", "tmpfs", closed, f"mode=755,size={_RUN_BYTES}")  # buildah's locks and caches of names
    os.mkdir("/var/tmp")
    os.chmod("/var/tmp", 0o1777)


# What is given up


def _drop_capabilities() -> None:
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    kept = set(_KEPT.values())
    for number in range(last + 1):
        if number not in kept:
            _prctl(_PR_CAPBSET_DROP, number)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


class _Argument(ctypes.Structure):
    """struct scmp_arg_cmp (seccomp_rule_add(3))."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def _filter_calls() -> None:
    """Deny what is listed to everything that is started from now on, whatever further filter it gets."""
    lib = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(_SCMP_ALLOW)))
    if not context:
        raise OSError("libseccomp gives no filter")

    def deny(name: str, errno: int, at: int = 0, mask: int = 0, value: int = 0) -> None:
        """With ``mask``: only where these bits of the argument ``at`` are ``value``."""
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            return  # another architecture's
        arguments = (_Argument * 1)(_Argument(at, _SCMP_MASKED_EQ, mask, value))
        count = ctypes.c_uint(1 if mask else 0)
        action = ctypes.c_uint32(_SCMP_ERRNO | errno)
        if lib.seccomp_rule_add_array(context, action, number, count, arguments):
            raise OSError(f"no rule could be made for {name}")

    for name in _DENIED:
        deny(name, _EPERM)
    for name in ("clone", "unshare"):
        for flag in (_NEWUSER, _NEWNET):
            deny(name, _EPERM, 0, flag, flag)
    deny("ioctl", _EPERM, 1, 0xFF00, _BTRFS << 8)  # subvolumes have quotas of their own; file copies do without
    deny("clone3", _ENOSYS)  # its flags are in memory; C libraries fall back to clone
    if lib.seccomp_load(context):
        raise OSError("the system call filter could not be loaded")
    lib.seccomp_release(context)


# PID 1


def _serve(control: socket.socket, environment: dict[str, str], inputs: list[int]) -> None:
    """Start what is asked for, one program at a time, until the other end is gone."""
    stream = control.makefile("rw", encoding="utf-8", newline="\n")
    _say(stream, {"ready": True})
    for line in stream:
        request = json.loads(line)
        try:
            _say(stream, _carry_out(request, environment, inputs))
        except OSError as error:
            _say(stream, {"code": 127, "error": f"{request['argv'][0]}: {error.strerror or error}"})


def _say(stream: object, message: JSON) -> None:
    stream.write(json.dumps(message) + "\n")  # type: ignore[attr-defined]
    stream.flush()  # type: ignore[attr-defined]


def _carry_out(request: JSON, environment: dict[str, str], inputs: list[int]) -> JSON:
    keep = os.memfd_create("kept", os.MFD_CLOEXEC) if request.get("keep") else -1
    source = inputs[0] if request.get("input") and inputs else os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    actions = [(os.POSIX_SPAWN_DUP2, source, 0), (os.POSIX_SPAWN_DUP2, keep if keep >= 0 else 1, 1)]
    os.chdir(request.get("cwd") or "/")
    argv = request["argv"]
    try:
        pid = os.posix_spawnp(
            argv[0], argv, environment, file_actions=actions, setsigdef=[signal.SIGPIPE], setsigmask=[]
        )
    finally:
        if source not in inputs:
            os.close(source)
    answer: JSON = {"code": _wait(pid)}
    if keep >= 0:
        answer["text"] = base64.b64encode(os.pread(keep, _KEEP_BYTES, 0)).decode()
        os.close(keep)
    return answer


def _wait(wanted: int) -> int:
    """Its exit code, or minus its signal; reaps whoever else has ended, because nobody else does."""
    while True:
        pid, status = os.wait()
        if pid == wanted:
            return os.waitstatus_to_exitcode(status)


# The whole


def _loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("=16sH14x", b"lo", _IFF_UP))
    for name, value in (("ip_unprivileged_port_start", "0"), ("ping_group_range", "0 65535")):
        try:
            with open(f"/proc/sys/net/ipv4/{name}", "w") as file:
                file.write(value)
        except OSError:
            pass  # a kernel without it


def _ended(alive: int) -> bool:
    """Whether the other end of a pipe into which nobody writes is closed."""
    os.set_blocking(alive, False)
    try:
        return os.read(alive, 1) == b""
    except BlockingIOError:
        return False
    finally:
        os.close(alive)


def _first_process(config: JSON, trees: list[tuple[int, str]], users: int, alive: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _unshare(_NEWNS, "mount namespace")
    if not config["host_network"]:
        _loopback()
    _make_root(config, trees)
    _check(_libc.setns(users, _NEWUSER), "entering the user namespace")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    _unshare(_NEWNS, "mount namespace inside")
    _own_mounts()
    _drop_capabilities()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user has cleared it
    if _ended(alive):  # before that
        os._exit(1)
    _filter_calls()
    os.umask(0o022)
    control = socket.socket(fileno=config["control"])
    os.close(users)
    _serve(control, config["environment"], config["inputs"])


def main() -> None:
    config = json.load(sys.stdin)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != config["parent"]:
        raise SystemExit("the sandbox: whoever started this is gone")
    for path in config["join"]:
        with open(path, "w") as file:
            file.write("0")
    for fd in (config["control"], *config["inputs"]):
        os.set_inheritable(fd, False)  # the script's, not those of what it starts
    users = _user_namespace([[0, config["uid_base"], config["uid_count"]]])
    trees = _trees(config, users)
    network = 0 if config["host_network"] else _NEWNET
    _unshare(_NEWPID | _NEWIPC | _NEWUTS | _NEWCGROUP | network, "set of namespaces")
    _check(_libc.sethostname(b"build", 5), "a host name of its own")
    alive, telling = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(telling)
        try:
            _first_process(config, trees, users, alive)
        except OSError as error:
            sys.stdout.write(f"the sandbox: {error.strerror or error}\n")
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)


if __name__ == "__main__":
    main()
