"""The command line of any OCI runtime, as data, and whether it works on this machine.

crun and runc take the same verbs and options (the OCI runtime command line interface is a draft, and runc's is what
everybody follows); where one differs, that is a line here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from isolat.deadline import Deadline
from isolat.errors import Unsupported
from isolat.linux.cgroup import Limits, runtime_path
from isolat.oci.config import Bind, Bundle, config_text
from isolat.places.base import CgroupMode, Facts

# In the order in which one is taken when the spec names none: crun makes a container in a third of runc's time.
KNOWN = ("crun", "runc", "youki")
CONTROL_DESCRIPTORS = 1  # descriptor 3: the init's controller
CLEAN_UP_S = 3.0  # for deleting a trial that failed, also when its own time is up
TRIAL_PREFIX = "isolat-probe-"
TRIAL_UID_BASE = 0x3FFF_0000  # just below the first environment's


@dataclass(frozen=True)
class Runtime:
    """One runtime's program and its state directory."""

    path: str
    root: str
    own_groups: bool = False  # it is started in its control groups and must not make any

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def can_inherit_groups(self) -> bool:
        """Whether it can be told to leave control groups alone."""
        return self.name == "crun"

    def state(self, id: str) -> str:
        """The directory in which crun remembers a container, and all that it leaves of one that has ended."""
        return f"{self.root}/{id}"

    def _global(self) -> tuple[str, ...]:
        """crun would ask systemd for a group where one runs; runc and youki use the file system by themselves."""
        kind = "disabled" if self.own_groups else "cgroupfs"
        manager = (f"--cgroup-manager={kind}",) if self.name == "crun" else ()
        return (self.path, "--root", self.root, *manager)

    def run(self, id: str, bundle: str, pidfile: str) -> tuple[str, ...]:
        """Make the container, start it, leave its pid in ``pidfile`` and exit."""
        return (
            *self._global(),
            "run",
            "--detach",
            "--bundle", bundle,
            "--pid-file", pidfile,
            "--preserve-fds", str(CONTROL_DESCRIPTORS),
            id,
        )  # fmt: skip

    def run_attached(self, id: str, bundle: str) -> tuple[str, ...]:
        """Make the container, wait for its process, delete it and exit as the process did."""
        return (*self._global(), "run", "--bundle", bundle, id)

    def delete(self, id: str) -> tuple[str, ...]:
        """Kill and forget; an unknown id is fine for whoever reverts."""
        return (*self._global(), "delete", "--force", id)


def installed(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Name and path of the runtimes that a place has, best first."""
    return tuple((name, path) for name in KNOWN if (path := facts.tool(name)) is not None)


def choose(wanted: str, found: tuple[tuple[str, str], ...]) -> str:
    """The path of the runtime that a spec names, or of the best one. Raises Unsupported with what there is."""
    there = dict(found)
    if wanted.startswith("/"):
        return wanted
    if not wanted and found:
        return found[0][1]
    if wanted in there:
        return there[wanted]
    have = ", ".join(there) or "none"
    raise Unsupported(
        f"the OCI runtime {wanted or 'crun'} was not found here; found: {have}",
        hint=f"install it, or name one of these with oci_runtime: {have}" if there else "apt-get install crun",
    )


def version(path: str, d: Deadline) -> str:
    """What a runtime of this machine says about itself; empty where it can't be run."""
    done = _run((path, "--version"), d)
    words = done.stdout.split() if done else []
    return words[words.index("version") + 1] if "version" in words[:-1] else ""


def try_out(path: str, facts: Facts, d: Deadline) -> str:
    """Run /bin/true of this machine in a container, as ours are made; empty where it worked, else why not.

    Everything that a plan relies on is in it: user namespace, control groups, devices, masked paths, seccomp.
    """
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f"{TRIAL_PREFIX}{os.getpid()}-") as name:
        base = Path(name)
        _trial_bundle(base, facts)
        runtime = Runtime(path, str(base / "state"))
        id = base.name
        done = _run(_hidden_unified(facts, id, runtime.run_attached(id, str(base))), d)
        if done is None or done.returncode:
            _run(_hidden_unified(facts, id, runtime.delete(id)), Deadline(CLEAN_UP_S))
    if done is None:
        return "it did not end in time, or could not be started"
    return "" if done.returncode == 0 else done.stderr.strip()[-500:] or f"exit code {done.returncode}"


def _run(argv: tuple[str, ...], d: Deadline) -> subprocess.CompletedProcess[str] | None:
    """The program's end with what it said; None where it could not be started, or was killed when time was up."""
    try:
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as program:
            try:
                out, err = program.communicate(timeout=d.left_s())
            except subprocess.TimeoutExpired:
                os.killpg(program.pid, signal.SIGKILL)  # with what it has started, which holds the pipes
                return None
    except OSError:
        return None
    return subprocess.CompletedProcess(argv, program.returncode, out, err)


def _sweep() -> None:
    """Remove what trials left whose daemon was killed: their directories name a process that is no more."""
    for left in Path(tempfile.gettempdir()).glob(f"{TRIAL_PREFIX}*"):
        pid = left.name.removeprefix(TRIAL_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)


def _hidden_unified(facts: Facts, id: str, argv: tuple[str, ...]) -> tuple[str, ...]:
    """In hybrid mode as the keeper runs it: crun refuses while the unified hierarchy is to be seen.

    It then takes the bare mount point for a hierarchy, and leaves a directory there.
    """
    unified = facts.cgroups.mount("unified")
    if facts.cgroups.mode is not CgroupMode.HYBRID or unified is None:
        return argv
    script = 'left=$1; shift; umount -l "$0" && "$@"; code=$?; rm -rf "$0/$left"; exit $code'
    return ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, unified, id, *argv)


def _trial_bundle(base: Path, facts: Facts) -> None:
    """A bundle whose root is made of the host's programs and libraries, read-only."""
    base.chmod(0o711)
    rootfs = base / "rootfs"
    rootfs.mkdir()
    os.chown(rootfs, TRIAL_UID_BASE, TRIAL_UID_BASE)
    binds = []
    for name in ("usr", "bin", "lib", "lib64"):
        source = Path("/", name)
        if source.is_symlink():
            (rootfs / name).symlink_to(source.readlink())
        elif source.is_dir():
            binds.append(Bind(str(source), str(source), read_only=True))
    bundle = Bundle(
        rootfs=str(rootfs),
        args=("/bin/true",),
        hostname="probe",
        machine=facts.machine,
        uid_base=TRIAL_UID_BASE,
        uid_count=1000,
        limits=Limits(memory_bytes=64 << 20, memory_swap_bytes=64 << 20, cpus=1, cpu_shares=1024, pids=16),
        cgroups_path=runtime_path(facts.cgroups, base.name),
        binds=tuple(binds),
    )
    (base / "config.json").write_text(config_text(bundle))
