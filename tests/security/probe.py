"""Runs inside an environment and prints, as a literal, what an attacker there can see and do. Standard library only.

The image's Python is minimal and has neither ctypes nor json. System calls are tried by attempts.c, which comes along.
"""

# The image's Python has no pathlib.
# ruff: noqa: PTH115, PTH208

from __future__ import annotations

import binascii
import errno
import os
import stat
import sys
from collections.abc import Iterator

ATTEMPTS = ""  # the compiled attempts.c in base64, put here by the test
NULL = os.makedev(1, 3)


def syscalls() -> dict[str, str]:
    """What each of the attempts was answered with."""
    path = "/tmp/attempts"
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o755)) as file:
        file.write(binascii.a2b_base64(ATTEMPTS))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.execv(path, [path])
    os.close(write)
    with open(read) as answers:
        lines = answers.read().splitlines()
    os.waitpid(pid, 0)
    return dict(line.split("\t") for line in lines)


def walk(top: str) -> Iterator[str]:
    """Files of proc and sysfs, without those of processes."""
    for at, directories, files in os.walk(top):
        if at == "/proc":
            directories[:] = [
                name for name in directories if not name.isdigit() and name not in ("self", "thread-self")
            ]
        for name in files:
            yield f"{at}/{name}"


def writable() -> list[str]:
    """Files of /proc and /sys that open for writing. Opening changes nothing, and nothing is written."""
    found = []
    for top in ("/proc", "/sys"):
        for path in walk(top):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW)
            except OSError:
                continue
            if os.fstat(fd).st_rdev != NULL:  # what is masked is /dev/null
                found.append(path)
            os.close(fd)
    return found


def devices() -> list[str]:
    """Every device node that is anywhere: its path, kind and numbers."""
    found = []
    for at, directories, files in os.walk("/"):
        directories[:] = [name for name in directories if f"{at}/{name}".replace("//", "/") not in ("/proc", "/sys")]
        for name in (*files, *directories):
            with_stat = _lstat(f"{at}/{name}")
            if with_stat and (stat.S_ISBLK(with_stat.st_mode) or stat.S_ISCHR(with_stat.st_mode)):
                kind = "b" if stat.S_ISBLK(with_stat.st_mode) else "c"
                numbers = f"{os.major(with_stat.st_rdev)}:{os.minor(with_stat.st_rdev)}"
                found.append(f"{at}/{name} {kind} {numbers}".replace("//", "/"))
    return sorted(found)


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def setuid_files() -> list[str]:
    """Programs that would change the user (no_new_privs makes them powerless)."""
    found = []
    for at, _, files in os.walk("/usr"):
        for name in files:
            known = _lstat(f"{at}/{name}")
            if known and known.st_mode & (stat.S_ISUID | stat.S_ISGID) and stat.S_ISREG(known.st_mode):
                found.append(f"{at}/{name}")
    return found


def marked(markers: list[str]) -> list[str]:
    """Files anywhere below / with one of these device and inode numbers; inode 0 stands for every file there."""
    wanted = {tuple(int(part) for part in marker.split(":")) for marker in markers}
    found = []
    for at, directories, files in os.walk("/"):
        directories[:] = [name for name in directories if f"{at}/{name}".replace("//", "/") not in ("/proc", "/sys")]
        for name in (*files, *directories):
            known = _lstat(f"{at}/{name}")
            if known and wanted & {(known.st_dev, known.st_ino), (known.st_dev, 0)}:
                found.append(f"{at}/{name}".replace("//", "/"))
    return found


def status() -> dict[str, str]:
    with open("/proc/self/status") as file:
        return {name: value.strip() for name, value in (line.split(":", 1) for line in file)}


def descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the directory's own
    return found


def processes() -> dict[str, str]:
    found = {}
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            with open(f"/proc/{pid}/cmdline") as file:
                found[pid] = file.read().replace("\0", " ").strip()
    return found


def text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError as error:
        return f"({errno.errorcode.get(error.errno or 0)})"


def facts(markers: list[str]) -> dict[str, object]:
    return {
        "processes": processes(),
        "status": status(),
        "descriptors": descriptors(),
        "mounts": text("/proc/self/mountinfo").splitlines(),
        "uid_map": text("/proc/self/uid_map").split(),
        "gid_map": text("/proc/self/gid_map").split(),
        "setgroups": text("/proc/self/setgroups").strip(),
        "cgroup": text("/proc/self/cgroup").splitlines(),
        "devices": devices(),
        "writable": writable(),
        "setuid": setuid_files(),
        "marked": marked(markers),
        "networks": sorted(os.listdir("/sys/class/net")),
        "unix": text("/proc/net/unix").splitlines()[1:],
        "masked": {path: text(path)[:64] for path in MASKED},
        "environment": dict(os.environ),
        "syscalls": syscalls(),
    }


MASKED = (
    "/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/timer_list", "/proc/kallsyms", "/proc/kmsg", "/proc/cmdline",
    "/proc/config.gz", "/proc/iomem", "/proc/interrupts", "/proc/modules", "/proc/sched_debug", "/proc/sysrq-trigger",
)  # fmt: skip

if __name__ == "__main__":
    print(repr(facts(sys.argv[1:])))
