"""The OCI runtime alone: what of Isolat's time is crun's, and can't be taken away.

The bundle is Isolat's own (from its plan), so namespaces, uid mapping, seccomp filter, capabilities, mounts and limits
are equal; only the program is started by the runtime itself instead of Isolat's init. The root is the same overlay on
the same EROFS. All of it is made once and is not timed: the figure is ``crun run`` and nothing else.

Everything happens in a worker process with a mount namespace of its own, where on hybrid machines
``/sys/fs/cgroup/unified`` is unmounted, because crun 1.8 refuses such machines as they are. The mounts end with it.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench import lib
from bench.docker import remove_cgroups

from isolat.linux import mounts

RUNTIME = "/usr/bin/crun"
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_REC_PRIVATE = 0x4000 | 0x40000
MS_NODEV = 0x4
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442  # the same on every architecture since Linux 5.0
AT_EMPTY_PATH = 0x1000
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOUNT_ATTR_IDMAP = 0x00100000
UPPER = "size=1g,mode=755"

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def missing() -> str:
    """Why crun can't be measured here; empty when it can."""
    if not os.access(RUNTIME, os.X_OK):
        return f"{RUNTIME} not found: apt-get install crun"
    return "" if os.geteuid() == 0 else "it needs root"


def config_of(frames: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ``config.json`` that an Isolat plan writes."""
    for frame in frames:
        for step in frame["steps"]:
            if step["step"] == "file" and str(step["path"]).endswith("/bundle/config.json"):
                return dict(json.loads(step["text"]))
    raise lib.BenchError("the plan has no OCI bundle: is the layer container?")


def equal(config: dict[str, Any], at: Path, cgroup: str, command: Sequence[str]) -> dict[str, Any]:
    """The same configuration in another place: our root, our files in /etc, our control group, no init of Isolat's."""
    made = copy.deepcopy(config)
    made["process"]["args"] = list(command)
    made["root"]["path"] = f"{at}/rootfs"
    if "cgroupsPath" in made["linux"]:
        made["linux"]["cgroupsPath"] = cgroup
    made["mounts"] = [_moved(one, at) for one in made["mounts"] if not _is_init(one)]
    return made


def _is_init(one: dict[str, Any]) -> bool:
    return "/.isolat/" in str(one["destination"])


def _moved(one: dict[str, Any], at: Path) -> dict[str, Any]:
    """Binds of /etc/hostname and its like: from ``at`` instead of the environment's directory."""
    if one["type"] != "bind" or not str(one["destination"]).startswith("/etc/"):
        return one
    return one | {"source": f"{at}/etc/{Path(one['destination']).name}"}


class Bare:
    """Asks the worker, which has the bundle."""

    def __init__(self, ours: Connection, root: Path) -> None:
        self._ours = ours
        self._root = root
        self._count = 0
        self.cgroup = f"/isolat-bench-{root.name}"

    def spend(self, argv: Sequence[str]) -> float:
        """Run a command where the bundle is; milliseconds."""
        self._ours.send(list(argv))
        return answer(self._ours)

    def runtime(self, *words: str) -> list[str]:
        return [RUNTIME, "--root", f"{self._root}/state", "--cgroup-manager=cgroupfs", *words]

    def run(self) -> float:
        """One `crun run` of the bundle, in the foreground, from before its start to after its end."""
        self._count += 1
        return self.spend(self.runtime("run", "--bundle", f"{self._root}/bundle", f"run{self._count}"))

    @contextlib.contextmanager
    def container(self, name: str) -> Iterator[str]:
        """A container of the bundle that goes on, for exec."""
        bundle = f"{self._root}/bundle"
        self.spend(self.runtime("run", "--detach", "--bundle", bundle, name))
        try:
            yield name
        finally:
            self.spend(self.runtime("delete", "--force", name))


def answer(ours: Connection) -> float:
    said = ours.recv()
    if isinstance(said, str):
        raise lib.BenchError(said)
    return float(said)


@contextlib.contextmanager
def ready(erofs: Path, config: dict[str, Any], command: Sequence[str]) -> Iterator[Bare]:
    """A worker with the bundle; afterwards no mount, process, file or control group of it."""
    root = Path(tempfile.mkdtemp(prefix="isolat-bench-crun-"))
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    bare = Bare(ours, root)
    made = equal(config, root, f"{bare.cgroup}/c", command)
    worker = context.Process(target=_work, args=(theirs, ours, root, erofs, made), daemon=True)
    worker.start()
    theirs.close()
    try:
        answer(ours)
        yield bare
    finally:
        ours.close()
        worker.join()
        shutil.rmtree(root, ignore_errors=True)
        remove_cgroups(bare.cgroup.strip("/"))


def _work(theirs: Connection, ours: Connection, root: Path, erofs: Path, config: dict[str, Any]) -> None:
    """The worker: make the bundle, then time what is asked for until the asker is gone."""
    ours.close()
    try:
        _make(root, erofs, config)
        theirs.send(0.0)
    except Exception as error:
        theirs.send(f"crun's bundle could not be made: {error}")
        return
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            theirs.send(_try(theirs.recv(), root / "stderr"))


def _try(argv: list[str], errors: Path) -> float | str:
    """Standard error goes to a file: a detached container keeps it open, and would keep a pipe open."""
    try:
        return lib.spend_to(argv, errors)
    except lib.BenchError as error:
        return str(error)


def _make(root: Path, erofs: Path, config: dict[str, Any]) -> None:
    mapping = config["linux"]["uidMappings"][0]
    first, count = int(mapping["hostID"]), int(mapping["size"])
    private_mounts()
    root.chmod(0o711)
    for name in ("erofs", "image", "upper", "rootfs", "bundle", "etc", "state"):
        (root / name).mkdir(mode=0o755)
    mounts.mount_erofs(str(erofs), f"{root}/erofs")
    idmap(f"{root}/erofs", f"{root}/image", first, count)
    mounts.mount("tmpfs", f"{root}/upper", "tmpfs", options=UPPER)
    for name, owner in (("u", first), ("w", 0)):
        (root / "upper" / name).mkdir(mode=0o755)
        os.chown(root / "upper" / name, owner, owner)
    layers = f"lowerdir={root}/image,upperdir={root}/upper/u,workdir={root}/upper/w,volatile"
    mounts.mount("overlay", f"{root}/rootfs", "overlay", MS_NODEV, layers)
    for name in ("hostname", "hosts", "resolv.conf"):
        (root / "etc" / name).touch()
    (root / "bundle" / "config.json").write_text(json.dumps(config))


def private_mounts() -> None:
    """A mount namespace of our own, without the hybrid hierarchy that crun 1.8 stumbles over."""
    if _libc.unshare(CLONE_NEWNS):
        raise lib.BenchError(f"unshare: {os.strerror(ctypes.get_errno())}")
    mounts.mount("none", "/", "", MS_REC_PRIVATE)
    if Path("/sys/fs/cgroup/unified").is_dir():
        mounts.umount("/sys/fs/cgroup/unified", mounts.MNT_DETACH)


def idmap(source: str, target: str, first: int, count: int) -> None:
    """The mount at ``source``, its owners shifted by ``first``, at ``target`` (mount_setattr(2))."""
    namespace = _user_namespace(first, count)
    try:
        clone = os.O_CLOEXEC | 1  # OPEN_TREE_CLOEXEC | OPEN_TREE_CLONE
        tree = _syscall(OPEN_TREE, -100, source.encode(), clone)
        attributes = _MountAttr(attr_set=MOUNT_ATTR_IDMAP, userns_fd=namespace)
        size = ctypes.sizeof(attributes)
        _syscall(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, ctypes.byref(attributes), size)
        _syscall(MOVE_MOUNT, tree, b"", -100, target.encode(), MOVE_MOUNT_F_EMPTY_PATH)
        os.close(tree)
    finally:
        os.close(namespace)


def _syscall(number: int, *arguments: Any) -> int:
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


def _user_namespace(first: int, count: int) -> int:
    """A descriptor of a user namespace with that mapping; the process that made it may then end."""
    with subprocess.Popen(
        ["unshare", "--user", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdout.readline()
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{name}").write_text(f"0 {first} {count}\n")
        found = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        holder.stdin.close()
    return found
