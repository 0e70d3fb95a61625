"""What a state root leaves on the machine: processes, mounts, control groups, loop devices, files.

``of`` answers with one line for each, so that a failed assertion says what was left and where.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from isolat.engine.paths import StateRoot

CGROUPS = Path("/sys/fs/cgroup")


def _pids() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _link(pid: int, name: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/{name}").readlink())
    except OSError:
        return ""


def _is_zombie(pid: int) -> bool:
    return "State:\tZ" in _read(pid, "status")


def processes(needle: str, group: str = "", also: tuple[str, ...] = ()) -> dict[int, str]:
    """Processes that have ``needle`` in their arguments, root or working directory, or are in the control group."""
    found = {}
    for pid in _pids():
        if pid == os.getpid():
            continue
        words = _read(pid, "cmdline").replace("\0", " ").strip()
        places = f"{words}\0{_link(pid, 'root')}\0{_link(pid, 'cwd')}"
        member = bool(group) and group in _read(pid, "cgroup")
        if (needle in places or member or any(word in words for word in also)) and not _is_zombie(pid):
            found[pid] = words or _read(pid, "comm").strip()
    return found


def mounts(needle: str) -> list[str]:
    """Mounts that name ``needle``, in every mount namespace that a living process has."""
    seen, found = set(), []
    for pid in _pids():
        namespace = _link(pid, "ns/mnt")
        if not namespace or namespace in seen:
            continue
        seen.add(namespace)
        found += [f"pid {pid}: {line}" for line in _read(pid, "mountinfo").splitlines() if needle in line]
    return found


def cgroups(group: str) -> list[str]:
    """Directories of this control group, wherever a hierarchy is mounted."""
    found = []
    for hierarchy in (CGROUPS, *CGROUPS.iterdir()):
        with contextlib.suppress(OSError):
            if hierarchy.is_dir():
                found += [str(path) for path in hierarchy.glob(f"**{group}") if path.is_dir()]
                at = hierarchy / group.strip("/")
                found += [str(at)] if at.is_dir() else []
    return sorted(set(found))


def group_members(group: str) -> list[str]:
    """Control groups below this one."""
    return [str(child) for at in cgroups(group) for child in Path(at).iterdir() if child.is_dir()]


def loops(needle: str) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            text = backing.read_text().strip()
            if needle in text:
                found.append(f"{backing.parts[3]}: {text}")
    return found


def sockets(needle: str) -> list[str]:
    return [line for line in Path("/proc/net/unix").read_text().splitlines() if needle in line]


def of_root(root: Path, *, keep_files: bool = False) -> list[str]:
    """Everything that this root has on the machine; after ``system reset`` there must be nothing."""
    paths = StateRoot(root)
    found = [f"process {pid}: {words}" for pid, words in processes(str(root), paths.cgroup).items()]
    found += [f"mount {line}" for line in mounts(f"{root}")]
    found += [f"cgroup {path}" for path in cgroups(paths.cgroup)]
    found += [f"loop {line}" for line in loops(str(root))]
    if root.exists() and not keep_files:
        found += [f"file {path}" for path in sorted(root.rglob("*"))]
    return found


def of_environment(root: Path, id: str) -> list[str]:
    """Everything that bears this id."""
    paths = StateRoot(root)
    found = [f"process {pid}: {words}" for pid, words in processes(id, f"{paths.cgroup}/{id}").items()]
    found += [f"mount {line}" for line in mounts(id)]
    found += [f"cgroup {path}" for path in cgroups(f"{paths.cgroup}/{id}")]
    found += [f"loop {line}" for line in loops(id)]
    found += [f"socket {line}" for line in sockets(id)]
    for parent in (root, paths.envs, paths.pool, paths.runtime):
        if parent.is_dir():
            found += [f"file {entry}" for entry in parent.iterdir() if id in entry.name]
    return found


def of_environments(root: Path) -> list[str]:
    """Everything of any environment of this root; the daemon, the images and the pool may stay."""
    paths = StateRoot(root)
    daemons = ("isolatd", "isolat.daemon")
    found = [
        f"process {pid}: {words}"
        for pid, words in processes(f"{paths.envs}/", f"{paths.cgroup}/").items()
        if not any(word in words for word in daemons)
    ]
    found += [f"mount {line}" for line in mounts(f"{paths.envs}/")]
    found += [f"cgroup {path}" for path in group_members(paths.cgroup)]
    for parent in (paths.envs, paths.runtime):
        if parent.is_dir():
            found += [f"file {entry}" for entry in parent.iterdir() if not entry.name.startswith(".")]
    if paths.pool.is_dir():
        found += [f"upper {entry}" for entry in paths.pool.iterdir() if _is_id(entry.name)]
    return found


def _is_id(name: str) -> bool:
    return len(name) == 16 and all(c in "0123456789abcdef" for c in name)


def none_of_environments(root: Path, seconds: float = 10) -> list[str]:
    """What is still there after at most so long; what goes by itself shortly (a process being reaped) is waited for."""
    return settled(lambda: of_environments(root), seconds)


def none_of_environment(root: Path, id: str, seconds: float = 10) -> list[str]:
    return settled(lambda: of_environment(root, id), seconds)


def settled(look: Callable[[], list[str]], seconds: float) -> list[str]:
    """What ``look`` finds, at once when that is nothing, else after at most so long."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.05)
