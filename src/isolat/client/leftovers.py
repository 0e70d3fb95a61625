"""Whether anything is left of a state root: what ``system reset`` proves before it says that nothing is.

It looks at the machine itself and believes nobody: processes, mounts, loop devices, control groups. Only names that
Isolat makes are removed from the root, so that a wrong ``--root`` costs nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from isolat.engine.paths import StateRoot
from isolat.errors import DaemonUnavailable
from isolat.linux import mounts

_WAIT_S = 15.0
_STEP_S = 0.05
_OURS = re.compile(
    r"(lock|start\.lock|daemon\.(sock|log)(\..*)?|index\.sqlite.*|envs|pool.*|"
    r"runtime|images|builder|mounts|templates|snapshots|volumes|guest|disks|doctor.*)"
)


@contextlib.contextmanager
def alone(root: str) -> Iterator[None]:
    """Hold the root's locks, so that no daemon starts. Raises DaemonUnavailable when one does not end."""
    held = [os.open(f"{root}/{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in ("start.lock", "lock")]
    try:
        end_s = time.monotonic() + _WAIT_S
        for fd in held:
            while not _lock(fd):
                if time.monotonic() > end_s:
                    raise DaemonUnavailable(f"the daemon of {root} does not end", hint=f"see {root}/daemon.log")
                time.sleep(_STEP_S)
        yield
    finally:
        for fd in held:
            os.close(fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_none(root: str, seconds: float = 5.0) -> list[str]:
    """What is left, after a moment for what is just ending."""
    end_s = time.monotonic() + seconds
    while (found := find(root)) and time.monotonic() < end_s:
        time.sleep(_STEP_S)
    return found


def find(root: str) -> list[str]:
    """Everything of this root that is left on the machine, one line each."""
    real = os.path.realpath(root)
    return [*_processes(real), *_mounts(real), *_loops(real), *_cgroups(root)]


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")


def _processes(root: str) -> Iterator[str]:
    """Whose working directory is below the root, or whose command line names a path there (keepers, guests)."""
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) in {os.getpid(), os.getppid()}:
            continue
        try:
            words = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
            directory = str((process / "cwd").readlink())
        except OSError:
            continue
        if _below(directory, root) or any(_below(word, f"{root}/envs") for word in words):
            yield f"process {process.name}: {' '.join(words)[:80]}"


def _mounts(root: str) -> Iterator[str]:
    own = _own_mount(root)
    for entry in mounts.mounts():
        if _below(entry.target, root) and (entry.target != root or own):
            yield f"mount {entry.target}"


def _own_mount(root: str) -> bool:
    """Whether the root is bound onto itself, as the daemon does it; a disk that is mounted there is none of ours."""
    entries = mounts.mounts()
    found = [entry for entry in entries if entry.target == root]
    above = [entry for entry in entries if entry.target != root and _below(root, entry.target.rstrip("/"))]
    if not found or not above:
        return False
    outer = max(above, key=lambda entry: len(entry.target))
    inside = outer.root.rstrip("/") + root.removeprefix(outer.target.rstrip("/"))
    return found[-1].source == outer.source and found[-1].root == inside


def release(root: str) -> None:
    """Undo what the daemon did to the root itself: it is bound onto itself, so that its mounts can be shared."""
    real = os.path.realpath(root)
    while _own_mount(real):
        mounts.umount(real, mounts.MNT_DETACH)


def _loops(root: str) -> Iterator[str]:
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            backing = file.read_text().strip()
            if _below(backing.removesuffix(" (deleted)"), root):
                yield f"loop device {file.parts[3]}: {backing}"


def _cgroups(root: str) -> Iterator[str]:
    tag = StateRoot(Path(root)).cgroup.lstrip("/")
    top = Path("/sys/fs/cgroup")
    for base in (top, *(path for path in top.glob("*") if path.is_dir())):
        for found in (base / tag, *base.glob(f"*/{tag}")):
            if found.is_dir():
                yield f"control group {found}"


def remove_root(root: str) -> list[str]:
    """Remove what Isolat made in the root, and the root when it is empty then. What is kept is returned."""
    kept = []
    for path in sorted(Path(root).iterdir()):
        if not _OURS.fullmatch(path.name):
            kept.append(str(path))
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if mounts.is_mountpoint(root):
        kept.append(root)
    elif not kept:
        Path(root).rmdir()
    return kept
