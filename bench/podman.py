"""Debian's Podman for the length of a bench: storage, run directory and control groups of its own; nothing is left.

It has no daemon: every command is a process of its own. As crun 1.8 refuses hybrid control groups, it runs in a mount
namespace without ``/sys/fs/cgroup/unified`` (see ``bare``); its limits are given, because a machine without
CAP_SYS_RESOURCE can't have Podman's own, which are higher.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import lib

from isolat.linux import mounts

PROGRAM = "/usr/bin/podman"
_UNIFIED = Path("/sys/fs/cgroup/unified")
_LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")


class Podman:
    """A private storage, in which nothing is yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def argv(self, *words: str) -> list[str]:
        hybrid = (
            ["unshare", "--mount", "sh", "-c", f'umount {_UNIFIED} && exec "$@"', "sh"] if _UNIFIED.is_dir() else []
        )
        return [
            *hybrid,
            *(PROGRAM, "--root", f"{self.root}/storage", "--runroot", f"{self.root}/run"),
            *("--tmpdir", f"{self.root}/tmp", "--cgroup-manager", "cgroupfs", "--events-backend", "none"),
            *words,
        ]

    def run(self, image: str, *command: str) -> list[str]:
        return self.argv("run", "--rm", "--network", "none", *_LIMITS, image, *command)

    def call(self, *words: str) -> str:
        done = subprocess.run(self.argv(*words), capture_output=True, text=True, check=False)
        if done.returncode:
            raise lib.BenchError(f"podman {' '.join(words)}: {done.stderr.strip()[-800:]}")
        return done.stdout.strip()


def missing() -> str:
    """Why Podman can't be measured here; empty when it can."""
    if not os.access(PROGRAM, os.X_OK):
        return f"{PROGRAM} not found: apt-get install podman"
    return "" if os.geteuid() == 0 else "it needs root"


@contextlib.contextmanager
def ready() -> Iterator[Podman]:
    root = Path(tempfile.mkdtemp(prefix="isolat-bench-podman-"))
    try:
        yield Podman(root)
    finally:
        mounts.umount_below(str(root))
        shutil.rmtree(root, ignore_errors=True)


def version(podman: Podman) -> str:
    return podman.call("info", "--format", "{{.Version.Version}}, storage {{.Store.GraphDriverName}}")
