"""Control groups as data: the same limits on v1, hybrid and v2."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.linux import cgroup
from isolat.linux.cgroup import Limits, Usage
from isolat.places.base import CgroupFacts, CgroupMode
from isolat.spec.model import Spec
from tests.unit.layers.jobs import CGROUPS

PATH = "/isolat/tag/id"
MODES = st.sampled_from(sorted(CGROUPS))
LIMITS = st.builds(
    Limits,
    memory_bytes=st.integers(0, 1 << 45),
    memory_swap_bytes=st.integers(0, 1 << 46),
    cpus=st.floats(0, 4096, allow_nan=False),
    cpu_shares=st.integers(0, 1 << 20),
    pids=st.integers(0, 1 << 22),
)


@given(MODES, LIMITS)
def test_everything_is_written_into_a_directory_that_is_made(mode: str, limits: Limits) -> None:
    made = cgroup.directories(CGROUPS[mode], PATH)
    for path, value in cgroup.writes(CGROUPS[mode], PATH, limits):
        assert path.rpartition("/")[0] in made
        assert path.rpartition("/")[0].endswith(PATH)
        assert value


@given(MODES, LIMITS)
def test_a_limit_that_is_not_set_is_not_written(mode: str, limits: Limits) -> None:
    names = [path.rpartition("/")[2] for path, _ in cgroup.writes(CGROUPS[mode], PATH, limits)]
    assert len(names) == len(set(names))
    assert any(name.startswith("pids.") for name in names) == bool(limits.pids)
    assert any(name in ("memory.max", "memory.limit_in_bytes") for name in names) == bool(limits.memory_bytes)
    assert any(name in ("cpu.max", "cpu.cfs_quota_us") for name in names) == (limits.cpus > 0)


@given(LIMITS)
def test_the_kernel_takes_every_quota_and_weight(limits: Limits) -> None:
    assert limits.quota_us == 0 or limits.quota_us >= cgroup.QUOTA_MIN_US
    assert limits.weight == 0 or cgroup.WEIGHT_MIN <= limits.weight <= cgroup.WEIGHT_MAX
    assert limits.shares == 0 or cgroup.SHARES_MIN <= limits.shares <= cgroup.SHARES_MAX


@given(st.integers(2, 262_144), st.integers(2, 262_144))
def test_more_shares_are_never_less_weight(a: int, b: int) -> None:
    low, high = sorted((a, b))
    assert Limits(cpu_shares=low).weight <= Limits(cpu_shares=high).weight


@given(st.floats(0.01, 4096), MODES)
def test_cpus_are_the_quota_over_the_period(cpus: float, mode: str) -> None:
    found = {path.rpartition("/")[2]: value for path, value in cgroup.writes(CGROUPS[mode], PATH, Limits(cpus=cpus))}
    if mode == "v2":
        quota, period = (int(word) for word in found["cpu.max"].split())
    else:
        quota, period = int(found["cpu.cfs_quota_us"]), int(found["cpu.cfs_period_us"])
    assert abs(quota / period - cpus) <= 0.5 / period + 1e-9


@given(LIMITS)
def test_an_oci_runtime_is_told_the_same(limits: Limits) -> None:
    told = cgroup.oci_resources(limits)
    assert ("memory" in told) == bool(limits.memory_bytes)
    assert ("pids" in told) == bool(limits.pids)
    assert ("cpu" in told) == bool(limits.quota_us or limits.shares)


def test_the_kernels_order_is_kept() -> None:
    """memory.memsw may not be less than memory, and a quota is of a period."""
    limits = Limits(memory_bytes=1, memory_swap_bytes=2, cpus=1)
    names = [path.rpartition("/")[2] for path, _ in cgroup.writes(CGROUPS["v1"], PATH, limits)]
    assert names == [
        "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "cpu.cfs_period_us", "cpu.cfs_quota_us",
    ]  # fmt: skip


def test_v2_counts_swap_alone() -> None:
    limits = Limits(memory_bytes=100, memory_swap_bytes=150)
    assert ("/sys/fs/cgroup/isolat/tag/id/memory.swap.max", "50") in cgroup.writes(CGROUPS["v2"], PATH, limits)


def test_without_a_word_about_swap_there_is_none() -> None:
    assert cgroup.limits_of(Spec("x", memory_bytes=7 << 20)).swap_bytes == 0
    assert cgroup.limits_of(Spec("x", memory_bytes=7, memory_swap_bytes=10)).swap_bytes == 3
    assert cgroup.limits_of(Spec("x", memory_bytes=0)).memory_swap_bytes == 0


def test_controllers_that_share_a_mount_share_a_directory() -> None:
    both = (("cpu", "/sys/fs/cgroup/cpu,cpuacct"), ("cpuacct", "/sys/fs/cgroup/cpu,cpuacct"))
    assert cgroup.directories(CgroupFacts(CgroupMode.V1, both), PATH) == ("/sys/fs/cgroup/cpu,cpuacct/isolat/tag/id",)


@pytest.mark.parametrize("base", ["/", "", "/docker/abc", "docker/abc/"])
def test_groups_are_made_below_our_own(base: str) -> None:
    known = CgroupFacts(CgroupMode.V2, (("unified", "/sys/fs/cgroup/"),), base)
    words = [word for word in base.split("/") if word]
    expected = "/".join(["", *words, "isolat/tag/id"])
    assert cgroup.runtime_path(known, PATH) == expected
    assert cgroup.directories(known, PATH) == (f"/sys/fs/cgroup{expected}",)
    assert cgroup.procs_files(known, PATH) == (f"/sys/fs/cgroup{expected}/cgroup.procs",)


def test_hybrid_is_v1_without_the_unified_hierarchy() -> None:
    assert cgroup.directories(CGROUPS["hybrid"], PATH) == cgroup.directories(CGROUPS["v1"], PATH)
    assert cgroup.hidden_directories(CGROUPS["hybrid"], PATH) == ("/sys/fs/cgroup/unified/isolat/tag/id",)
    assert cgroup.hidden_directories(CGROUPS["v1"], PATH) == cgroup.hidden_directories(CGROUPS["v2"], PATH) == ()


def test_a_machine_without_control_groups_gets_none() -> None:
    nothing = CgroupFacts(CgroupMode.NONE)
    assert cgroup.directories(nothing, PATH) == ()
    assert cgroup.writes(nothing, PATH, Limits(pids=3)) == ()
    assert cgroup.read_usage(nothing, PATH, lambda _: "1") == Usage()


def _usage(mode: str, files: Mapping[str, str]) -> Usage:
    return cgroup.read_usage(CGROUPS[mode], PATH, files.get)


def test_what_was_used_is_read_back_in_one_form() -> None:
    v1 = {
        f"/sys/fs/cgroup/memory{PATH}/memory.usage_in_bytes": "100\n",
        f"/sys/fs/cgroup/memory{PATH}/memory.max_usage_in_bytes": "200\n",
        f"/sys/fs/cgroup/memory{PATH}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        f"/sys/fs/cgroup/cpuacct{PATH}/cpuacct.usage": "5000\n",
        f"/sys/fs/cgroup/pids{PATH}/pids.current": "3\n",
    }
    v2 = {
        f"/sys/fs/cgroup{PATH}/memory.current": "100\n",
        f"/sys/fs/cgroup{PATH}/memory.peak": "200\n",
        f"/sys/fs/cgroup{PATH}/memory.events": "low 0\nmax 9\noom 3\noom_kill 2\n",
        f"/sys/fs/cgroup{PATH}/cpu.stat": "usage_usec 5\nuser_usec 4\n",
        f"/sys/fs/cgroup{PATH}/pids.current": "3\n",
    }
    assert _usage("v1", v1) == _usage("hybrid", v1) == _usage("v2", v2) == Usage(100, 200, 5000, 3, 2)


@given(st.text(), MODES)
def test_whatever_a_file_holds_reading_does_not_raise(text: str, mode: str) -> None:
    for value in vars(cgroup.read_usage(CGROUPS[mode], PATH, lambda _: text)).values():
        assert value is None or value >= 0


def test_what_the_machine_does_not_tell_is_none() -> None:
    assert _usage("v1", {}) == _usage("v2", {}) == Usage()
    assert cgroup.read_text("/nonexistent/memory.peak") is None
