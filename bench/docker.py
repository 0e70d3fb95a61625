"""Debian's Docker for the length of a bench: its own socket, data root, exec root and containerd; nothing is left.

A peer is measured as its users have it, but must not meddle with a Docker that this machine may already run. The
daemon lives in a mount namespace of its own, so that none of its mounts can outlive it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import lib

from isolat.linux import mounts

IMAGE = "isolat-bench"
CLIENT = "/usr/bin/docker"  # Debian's, whatever else is first in PATH
DAEMON = "/usr/sbin/dockerd"
START_S = 60.0
STOP_S = 30.0
_NO_NETWORK = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-masq=false")


class Docker:
    """A running dockerd with one image imported."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = f"unix://{root}/docker.sock"
        self.cgroup = f"/isolat-bench-{root.name}"

    def argv(self, *words: str) -> list[str]:
        return [CLIENT, "--host", self.socket, *words]

    def run(self, command: Sequence[str], *options: str) -> list[str]:
        return self.argv("run", "--rm", "--network", "none", *options, IMAGE, *command)

    def run_bridged(self, command: Sequence[str], *options: str) -> list[str]:
        """As users have it who say nothing about the network; of a daemon that was started with its bridge."""
        return self.argv("run", "--rm", *options, IMAGE, *command)

    def call(self, *words: str) -> str:
        done = subprocess.run(self.argv(*words), capture_output=True, text=True, check=False)
        if done.returncode:
            raise lib.BenchError(f"docker {' '.join(words)}: {done.stderr.strip()[-800:]}")
        return done.stdout.strip()


def missing() -> str:
    """Why Docker can't be measured here; empty when it can."""
    absent = [path for path in (CLIENT, DAEMON) if not os.access(path, os.X_OK)]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install docker.io"
    return "" if os.geteuid() == 0 else "it needs root"


def version(docker: Docker) -> str:
    return docker.call("info", "--format", "{{.ServerVersion}}, storage {{.Driver}}, runtime {{.DefaultRuntime}}")


@contextlib.contextmanager
def running(erofs: Path | None, *, bridge: bool = False) -> Iterator[Docker]:
    """A private dockerd with the image's tree imported, if any; afterwards no process, mount, file or cgroup of it.

    ``bridge``: with its default network, bridge and firewall rules, in a network namespace that ends with it.
    """
    root = Path(tempfile.mkdtemp(prefix="isolat-bench-docker-"))
    docker = Docker(root)
    try:
        with _daemon(docker, bridge):
            if erofs is not None:
                _import(docker, erofs)
            yield docker
    finally:
        _remove(docker)


@contextlib.contextmanager
def _daemon(docker: Docker, bridge: bool) -> Iterator[None]:
    root = docker.root
    (root / "daemon.json").write_text("{}\n")  # not the machine's own settings
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            _daemon_argv(docker, bridge), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_ready(docker, process)
        yield
    finally:
        _stop(process)


def _daemon_argv(docker: Docker, bridge: bool = False) -> list[str]:
    root = docker.root
    own_run = 'mount -t tmpfs -o mode=755 tmpfs /run && exec "$@"'  # shim sockets and plugins have fixed paths there
    if bridge:
        own_run = f"ip link set lo up && {own_run}"
    return [
        "unshare", "--mount", "--propagation", "private", *(("--net",) if bridge else ()),
        "/bin/sh", "-c", own_run, "sh",
        DAEMON,
        "--config-file", f"{root}/daemon.json",
        "--host", docker.socket,
        "--data-root", f"{root}/data",
        "--exec-root", f"{root}/exec",
        "--pidfile", f"{root}/pid",
        "--cgroup-parent", docker.cgroup,
        *(() if bridge else _NO_NETWORK),
    ]  # fmt: skip


def _wait_ready(docker: Docker, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if subprocess.run(docker.argv("info"), capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.1)
    tail = (docker.root / "log").read_text(errors="replace")[-1500:]
    raise lib.BenchError(f"dockerd did not start:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask, wait, kill."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _import(docker: Docker, erofs: Path) -> None:
    """The very tree that Isolat's image has, as tar into docker import."""
    at = docker.root / "tree"
    at.mkdir()
    mounts.mount_erofs(str(erofs), str(at))
    try:
        with subprocess.Popen(["tar", "-C", str(at), "-c", "."], stdout=subprocess.PIPE) as tar:
            done = subprocess.run(
                docker.argv("import", "-", IMAGE), stdin=tar.stdout, capture_output=True, text=True, check=False
            )
    finally:
        mounts.umount(str(at))
        at.rmdir()
    if tar.returncode or done.returncode:
        raise lib.BenchError(f"docker import failed: {done.stderr.strip()[-800:]}")


def _remove(docker: Docker) -> None:
    """What a daemon that was killed would leave, too: its shims, their mounts, its files, its control groups."""
    _kill_all_naming(str(docker.root))
    mounts.umount_below(str(docker.root))
    shutil.rmtree(docker.root, ignore_errors=True)
    remove_cgroups(docker.cgroup.strip("/"))


def _kill_all_naming(path: str) -> None:
    """Kill every process that has this bench's own private directory in its arguments, and wait for its end."""
    end = time.monotonic() + STOP_S
    while (pids := _naming(path)) and time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _naming(path: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


def remove_cgroups(name: str) -> None:
    """Remove the empty control groups ``name`` in every hierarchy, wherever below its mount a runtime made them."""
    for hierarchy in [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()]:
        if hierarchy.is_dir():
            for top in [hierarchy / name, *hierarchy.glob(f"*/{name}"), *hierarchy.glob(f"*/*/{name}")]:
                _remove_tree(top)


def _remove_tree(top: Path) -> None:
    if top.is_dir():
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)  # noqa: PTH106
