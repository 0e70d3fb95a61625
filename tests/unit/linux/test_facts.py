"""Recording a machine from the text of its kernel's own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from isolat.linux import facts
from isolat.places.base import CgroupMode

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
HYBRID_OWN = "4:name=systemd:/\n3:memory:/one/two\n2:cpu,cpuacct:/\n0::/\n"
V2 = "26 25 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V2_OWN = "0::/user.slice/user-0.slice\n"


def test_a_hybrid_machine_has_every_controller_and_the_unified_mount() -> None:
    found = facts.parse_cgroups(HYBRID, HYBRID_OWN)
    assert found.mode is CgroupMode.HYBRID
    assert dict(found.mounts) == {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
        "memory": "/sys/fs/cgroup/memory",
        "name=systemd": "/sys/fs/cgroup/systemd",
        "unified": "/sys/fs/cgroup/unified",
    }


def test_ours_go_to_the_root_wherever_we_are_ourselves() -> None:
    assert facts.parse_cgroups(HYBRID, HYBRID_OWN).base == "/"


def test_without_the_unified_mount_it_is_v1() -> None:
    assert facts.parse_cgroups("\n".join(HYBRID.splitlines()[:-1]), HYBRID_OWN).mode is CgroupMode.V1


def test_one_cgroup2_mount_alone_is_v2() -> None:
    found = facts.parse_cgroups(V2, V2_OWN)
    assert (found.mode, found.mounts) == (CgroupMode.V2, (("unified", "/sys/fs/cgroup"),))


def test_no_mount_is_none() -> None:
    assert facts.parse_cgroups("", "").mode is CgroupMode.NONE


@pytest.mark.parametrize(("given", "base"), [("", "/"), ("a/b/", "/a/b"), ("/a/../b", "/a/b"), ("//", "/")])
def test_the_base_is_clean(given: str, base: str) -> None:
    assert facts.parse_cgroups(V2, V2_OWN, given).base == base


def test_the_unified_path_is_the_line_without_a_controller() -> None:
    assert facts.unified_path(V2_OWN) == "/user.slice/user-0.slice"
    assert facts.unified_path("1:memory:/x\n") == "/"


@pytest.mark.parametrize(
    ("release", "version"), [("6.1.0-18-amd64", (6, 1)), ("6.18.44", (6, 18)), ("5.10", (5, 10)), ("odd", (0, 0))]
)
def test_kernel_versions(release: str, version: tuple[int, int]) -> None:
    assert facts.kernel_version(release) == version


def test_tools_are_found_in_order_and_directories_are_no_tools(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for directory in (first, second):
        directory.mkdir()
    (first / "crun").mkdir()
    for name in ("crun", "runc"):
        (second / name).touch(mode=0o755)
    (first / "runc").touch(mode=0o644)
    assert facts.find_tools(("runc", "crun", "none"), f"{first}:relative:{second}") == (
        ("crun", f"{second}/crun"),
        ("runc", f"{second}/runc"),
    )


def test_recording_this_machine_never_fails() -> None:
    found = facts.record_facts()
    assert found.cpus >= 1 and found.memory_bytes > 0 and found.kernel and found.features
