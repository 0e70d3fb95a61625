"""config.json: what an OCI runtime is told."""

from __future__ import annotations

import json
from dataclasses import replace

from isolat.linux.cgroup import Limits
from isolat.oci.config import MASKED, Bind, Bundle, Memory, config, config_text

BUNDLE = Bundle(
    rootfs="/dir/rootfs",
    args=("/dev/.isolat/isolat-init",),
    hostname="box",
    machine="x86_64",
    uid_base=0x40000000,
    uid_count=65536,
    limits=Limits(memory_bytes=1 << 20, memory_swap_bytes=1 << 20, cpus=0.5, cpu_shares=1024, pids=7),
    cgroups_path="/isolat/tag/id",
)


def _targets(bundle: Bundle) -> list[str]:
    return [mount["destination"] for mount in config(bundle)["mounts"]]


def test_the_text_is_the_same_every_time_and_holds_the_whole() -> None:
    assert config_text(BUNDLE) == config_text(replace(BUNDLE))
    assert json.loads(config_text(BUNDLE)) == config(BUNDLE)


def test_a_mount_never_hides_one_that_lies_below_it() -> None:
    bundle = replace(BUNDLE, binds=(Bind("/1", "/a/b/c"), Bind("/2", "/a")), memories=(Memory("/a/b", 1),))
    found = _targets(bundle)
    assert found.index("/a") < found.index("/a/b") < found.index("/a/b/c")
    assert found.index("/dev") < found.index("/dev/shm")


def test_every_mount_that_is_ours_forbids_set_user_id() -> None:
    bundle = replace(BUNDLE, binds=(Bind("/1", "/a"),), memories=(Memory("/b", 1),))
    assert all("nosuid" in mount["options"] for mount in config(bundle)["mounts"])


def test_root_inside_is_the_first_id_of_the_range() -> None:
    mapping = [{"containerID": 0, "hostID": 0x40000000, "size": 65536}]
    assert config(BUNDLE)["linux"]["uidMappings"] == config(BUNDLE)["linux"]["gidMappings"] == mapping


def test_limits_are_told_in_the_runtimes_own_words() -> None:
    resources = config(BUNDLE)["linux"]["resources"]
    assert resources["memory"] == {"limit": 1 << 20, "swap": 1 << 20}
    assert resources["cpu"] == {"quota": 50_000, "period": 100_000, "shares": 1024}
    assert resources["pids"] == {"limit": 7}


def test_devices_are_denied_first() -> None:
    first, *others = config(BUNDLE)["linux"]["resources"]["devices"]
    assert first == {"allow": False, "access": "rwm"}
    assert all(rule["allow"] and rule["access"] == "rw" and rule["type"] == "c" for rule in others)


def test_a_machine_without_control_groups_gets_no_word_about_them() -> None:
    found = config(replace(BUNDLE, cgroups_path=""))
    assert "resources" not in found["linux"]
    assert {"type": "cgroup"} not in found["linux"]["namespaces"]
    assert "/sys/fs/cgroup" not in _targets(replace(BUNDLE, cgroups_path=""))


def test_what_docker_masks_is_masked() -> None:
    docker = {
        "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
        "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
        "/sys/firmware",
    }  # fmt: skip
    assert docker < set(MASKED)
    assert set(config(BUNDLE)["linux"]["readonlyPaths"]) >= {
        "/proc/sys",
        "/proc/sysrq-trigger",
        "/proc/irq",
        "/proc/bus",
    }
