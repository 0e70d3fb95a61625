"""Control groups as data: limits to the directories and values of each mode, and back to what was used.

Nothing here touches the machine, except ``read_usage`` through the reader that it is given. The three modes differ
in names, units and files; everything that knows the difference is in this module, so that a plan is the same
sentence on a v1, a hybrid and a v2 machine.

Kernel documentation: admin-guide/cgroup-v1/{memory,cpusets,pids}, scheduler/sched-bwc and admin-guide/cgroup-v2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from isolat.places.base import CgroupFacts, CgroupMode
from isolat.spec.model import Spec

PERIOD_US = 100_000
QUOTA_MIN_US = 1_000  # sched-bwc: the kernel refuses a quota below 1 ms
SHARES_MIN, SHARES_MAX = 2, 262_144
WEIGHT_MIN, WEIGHT_MAX = 1, 10_000
UNIFIED = "unified"
PROCS = "cgroup.procs"

# v1 hierarchies that a plain process can join without preparing them. cpuset is not among them: a new cpuset is
# empty and refuses members until cpus and mems are copied from its parent, which a pure plan can't read.
PLAIN_V1 = ("memory", "pids", "cpu", "cpuacct", "freezer")
UNPREPARED_V1 = "cpuset"


@dataclass(frozen=True)
class Limits:
    """What a control group allows. ``memory_swap_bytes`` counts memory and swap together; 0 means no limit."""

    memory_bytes: int = 0
    memory_swap_bytes: int = 0
    cpus: float = 0.0
    cpu_shares: int = 0
    pids: int = 0

    @property
    def quota_us(self) -> int:
        """CPU time in each period of ``PERIOD_US``; 0 means no limit."""
        return max(QUOTA_MIN_US, round(self.cpus * PERIOD_US)) if self.cpus > 0 else 0

    @property
    def swap_bytes(self) -> int:
        """Swap alone, as v2 counts it."""
        return max(0, self.memory_swap_bytes - self.memory_bytes)

    @property
    def shares(self) -> int:
        return min(max(self.cpu_shares, SHARES_MIN), SHARES_MAX) if self.cpu_shares else 0

    @property
    def weight(self) -> int:
        """``cpu_shares`` on v2's scale: 2 becomes 1 and 262144 becomes 10000, in a straight line."""
        if not self.shares:
            return 0
        span = (self.shares - SHARES_MIN) * (WEIGHT_MAX - WEIGHT_MIN)
        return WEIGHT_MIN + span // (SHARES_MAX - SHARES_MIN)


def limits_of(spec: Spec) -> Limits:
    """The limits a spec asks for. Without a word about swap there is none beyond memory."""
    swap = spec.memory_bytes if spec.memory_swap_bytes is None else spec.memory_swap_bytes
    return Limits(
        memory_bytes=spec.memory_bytes,
        memory_swap_bytes=max(swap, spec.memory_bytes) if spec.memory_bytes else 0,
        cpus=spec.cpus,
        cpu_shares=spec.cpu_shares,
        pids=spec.pids_limit,
    )


def _below(mount: str, base: str, path: str) -> str:
    parts = [part for part in (*base.split("/"), *path.split("/")) if part]
    return "/".join((mount.rstrip("/"), *parts))


def runtime_path(facts: CgroupFacts, path: str) -> str:
    """``linux.cgroupsPath`` of an OCI bundle: absolute, so relative to each hierarchy's mount point."""
    return _below("", facts.base, path)


def hierarchies(facts: CgroupFacts, only: Iterable[str] = ()) -> tuple[tuple[str, str], ...]:
    """Controller and mount point of the hierarchies in use, or of those in ``only``.

    In hybrid mode the unified one is left out: it carries no controller we need, and the keeper unmounts it.
    """
    if facts.mode is CgroupMode.NONE:
        return ()
    if facts.mode is CgroupMode.V2:
        mount = facts.mount(UNIFIED)
        return ((UNIFIED, mount),) if mount else ()
    wanted = tuple(only)
    v1 = [(name, mount) for name, mount in facts.mounts if name != UNIFIED]
    return tuple((name, mount) for name, mount in v1 if not wanted or name in wanted)


def directories(facts: CgroupFacts, path: str, only: Iterable[str] = ()) -> tuple[str, ...]:
    """The directory of ``path`` in every hierarchy, once where controllers share one (``cpu,cpuacct``)."""
    return tuple(dict.fromkeys(_below(mount, facts.base, path) for _, mount in hierarchies(facts, only)))


def hidden_directories(facts: CgroupFacts, path: str) -> tuple[str, ...]:
    """The directory below the unified hierarchy's mount point in hybrid mode, where the keeper unmounts it."""
    mount = facts.mount(UNIFIED)
    return (_below(mount, facts.base, path),) if facts.mode is CgroupMode.HYBRID and mount else ()


def procs_files(facts: CgroupFacts, path: str, only: Iterable[str] = ()) -> tuple[str, ...]:
    """The files that "0" is written to in order to join."""
    return tuple(f"{directory}/{PROCS}" for directory in directories(facts, path, only))


def tasks_files(facts: CgroupFacts, path: str, only: Iterable[str] = ()) -> tuple[str, ...]:
    """The files that a single thread writes "0" to in order to join, in v1.

    Writing to ``cgroup.procs`` holds every fork on the machine and waits for an RCU grace period, 5 to 20 ms here; a
    thread that moves itself through ``tasks`` does not (``cgroup_procs_write_start`` takes no lock for it): 0.6 ms for
    nine hierarchies (bench/README.md).
    """
    return tuple(f"{directory}/tasks" for directory in directories(facts, path, only))


def join_files(facts: CgroupFacts, path: str) -> tuple[str, ...]:
    """The files by which a plain program of ours joins, in the quicker way where there is one."""
    if facts.mode is CgroupMode.V2:
        return procs_files(facts, path)
    return tasks_files(facts, path, PLAIN_V1)


def freezer(facts: CgroupFacts, directories: Iterable[str]) -> str:
    """The file by which the group of these directories is made to stand still; empty where there is none.

    cgroup-v1/freezer-subsystem.rst; cgroup-v2.rst, cgroup.freeze.
    """
    mount = facts.mount(UNIFIED) if facts.mode is CgroupMode.V2 else facts.mount("freezer")
    name = "cgroup.freeze" if facts.mode is CgroupMode.V2 else "freezer.state"
    found = (path for path in directories if mount and path.startswith(f"{mount}/"))
    return next((f"{path}/{name}" for path in found), "")


def device_writes(facts: CgroupFacts, path: str, allowed: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Deny every device, then allow these (cgroup-v1/devices): what an OCI runtime does where it makes the group."""
    mount = dict(hierarchies(facts)).get("devices")
    if mount is None or facts.mode is CgroupMode.V2:
        return ()
    where = _below(mount, facts.base, path)
    return ((f"{where}/devices.deny", "a"), *((f"{where}/devices.allow", rule) for rule in allowed))


def writes(facts: CgroupFacts, path: str, limits: Limits) -> tuple[tuple[str, str], ...]:
    """(file, value) in the order the kernel wants them: memory before memory with swap, period before quota."""
    if facts.mode is CgroupMode.V2:
        return _v2_writes(directories(facts, path), limits)
    found = dict(hierarchies(facts))
    return tuple(
        (f"{_below(found[controller], facts.base, path)}/{name}", value)
        for controller, name, value in _v1_values(limits)
        if controller in found
    )


def _v1_values(limits: Limits) -> list[tuple[str, str, str]]:
    values: list[tuple[str, str, str]] = []
    if limits.memory_bytes:
        values.append(("memory", "memory.limit_in_bytes", str(limits.memory_bytes)))
    if limits.memory_swap_bytes:
        values.append(("memory", "memory.memsw.limit_in_bytes", str(limits.memory_swap_bytes)))
    if limits.quota_us:
        values.append(("cpu", "cpu.cfs_period_us", str(PERIOD_US)))
        values.append(("cpu", "cpu.cfs_quota_us", str(limits.quota_us)))
    if limits.shares:
        values.append(("cpu", "cpu.shares", str(limits.shares)))
    if limits.pids:
        values.append(("pids", "pids.max", str(limits.pids)))
    return values


def _v2_writes(where: tuple[str, ...], limits: Limits) -> tuple[tuple[str, str], ...]:
    values: list[tuple[str, str]] = []
    if limits.memory_bytes:
        values.append(("memory.max", str(limits.memory_bytes)))
    if limits.memory_swap_bytes:
        values.append(("memory.swap.max", str(limits.swap_bytes)))
    if limits.quota_us:
        values.append(("cpu.max", f"{limits.quota_us} {PERIOD_US}"))
    if limits.weight:
        values.append(("cpu.weight", str(limits.weight)))
    if limits.pids:
        values.append(("pids.max", str(limits.pids)))
    return tuple((f"{directory}/{name}", value) for directory in where for name, value in values)


def oci_resources(limits: Limits) -> dict[str, object]:
    """``linux.resources`` of an OCI bundle (config-linux, "Control groups"), which any runtime translates itself."""
    found: dict[str, object] = {}
    if limits.memory_bytes:
        found["memory"] = {"limit": limits.memory_bytes, "swap": limits.memory_swap_bytes}
    cpu: dict[str, int] = {}
    if limits.quota_us:
        cpu |= {"quota": limits.quota_us, "period": PERIOD_US}
    if limits.shares:
        cpu["shares"] = limits.shares
    if cpu:
        found["cpu"] = cpu
    if limits.pids:
        found["pids"] = {"limit": limits.pids}
    return found


@dataclass(frozen=True)
class Usage:
    """What a control group used; None where this machine does not tell."""

    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    cpu_ns: int | None = None
    pids: int | None = None
    oom_kills: int | None = None


def read_text(path: str) -> str | None:
    """The file, or None where there is none: a limit's file may not exist on this kernel."""
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    word = (text or "").strip()
    return int(word) if word.isdecimal() else None


def _keyed(text: str | None, key: str) -> int | None:
    """The value of ``key`` in a file of ``key value`` lines."""
    for line in (text or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return _number(value)
    return None


def read_usage(facts: CgroupFacts, path: str, read: Callable[[str], str | None] = read_text) -> Usage:
    """What the group at ``path`` uses and how often it ran out of memory."""
    if facts.mode is CgroupMode.V2:
        return _v2_usage(directories(facts, path), read)
    found = dict(hierarchies(facts))

    def text(controller: str, name: str) -> str | None:
        mount = found.get(controller)
        return read(f"{_below(mount, facts.base, path)}/{name}") if mount else None

    return Usage(
        memory_bytes=_number(text("memory", "memory.usage_in_bytes")),
        memory_peak_bytes=_number(text("memory", "memory.max_usage_in_bytes")),
        cpu_ns=_number(text("cpuacct", "cpuacct.usage")),
        pids=_number(text("pids", "pids.current")),
        oom_kills=_keyed(text("memory", "memory.oom_control"), "oom_kill"),
    )


def v2_oom_kills(at: str, read: Callable[[str], str | None]) -> int:
    """How often the group at this directory of a v2 hierarchy ran out of memory."""
    return _keyed(read(f"{at}/memory.events"), "oom_kill") or 0


def _v2_usage(where: tuple[str, ...], read: Callable[[str], str | None]) -> Usage:
    if not where:
        return Usage()
    at = where[0]
    cpu_us = _keyed(read(f"{at}/cpu.stat"), "usage_usec")
    return Usage(
        memory_bytes=_number(read(f"{at}/memory.current")),
        memory_peak_bytes=_number(read(f"{at}/memory.peak")),
        cpu_ns=None if cpu_us is None else cpu_us * 1000,
        pids=_number(read(f"{at}/pids.current")),
        oom_kills=_keyed(read(f"{at}/memory.events"), "oom_kill"),
    )
