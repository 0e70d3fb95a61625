"""The container layer's decisions, one sentence a test."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from isolat.deadline import NEVER
from isolat.errors import Unsupported
from isolat.layers import container
from isolat.layers.base import Frame, Job, Probe
from isolat.layers.registry import LAYERS
from isolat.places.base import CgroupFacts, CgroupMode, Facts
from isolat.places.steps import (
    MOUNT_ATTR_RDONLY,
    Cgroup,
    Idmap,
    Leftover,
    MakeDir,
    Mount,
    PutFile,
    Run,
    Step,
    Subvolume,
)
from isolat.spec.model import Volume
from tests.unit.layers.jobs import IMAGE, PROBE, facts, job

LAYER = LAYERS["container"]


def _steps(asked: Job) -> tuple[Step, ...]:
    return LAYER.plan(asked, PROBE).steps


def _config(asked: Job) -> dict[str, Any]:
    text = next(s.text for s in _steps(asked) if isinstance(s, PutFile) and s.path.endswith("config.json"))
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _mount(config: dict[str, Any], target: str) -> dict[str, Any]:
    found: dict[str, Any] = next(m for m in config["mounts"] if m["destination"] == target)
    return found


def test_undoing_backwards_kills_before_it_unmounts_and_deletes_the_subvolume_whole() -> None:
    backwards = list(reversed(_steps(job("v2"))))
    kinds = [type(step) for step in backwards]
    assert kinds[0] is Run
    assert kinds.index(Run) < kinds.index(Mount) < kinds.index(Cgroup) < kinds.index(Subvolume)
    written = next(n for n, step in enumerate(backwards) if getattr(step, "path", "") == f"{job().upper}/u")
    assert kinds.index(Subvolume) < written


def test_the_runtime_is_told_to_forget_but_nothing_is_run_when_it_is_carried_out() -> None:
    for asked in (job("v2"), job("v1", spec={"oci_runtime": "runc"})):
        last = _steps(asked)[-1]
        assert isinstance(last, Run)
        assert last.argv == ()
        assert last.inverse[-3:] == ("delete", "--force", job().id)


def test_crun_on_v1_is_started_in_its_limited_group_and_makes_none() -> None:
    asked = job("v1", spec={"pids_limit": 7})
    plan = LAYERS["container"].plan(asked, PROBE)
    assert plan.guest is not None
    assert "--cgroup-manager=disabled" in plan.guest.argv
    group = next(step for step in plan.steps if isinstance(step, Cgroup))
    assert set(plan.guest.cgroup_files) == {f"{path}/tasks" for path in group.paths}
    assert not any("cpuset" in path for path in group.paths)
    values = [(path.rsplit("/", 1)[-1], value) for path, value in group.writes]
    assert ("pids.max", "7") in values
    assert values.index(("devices.deny", "a")) < values.index(("devices.allow", "c 1:3 rw"))
    assert "resources" not in _config(asked)["linux"]
    assert plan.steps[-1] == Leftover(f"/state/runtime/{asked.id}")


def test_the_image_and_not_the_overlay_is_idmapped() -> None:
    idmap = next(step for step in _steps(job()) if isinstance(step, Idmap))
    overlay = next(step for step in _steps(job()) if isinstance(step, Mount))
    assert (idmap.source, idmap.lines) == (IMAGE.mount, ((0, job().uid_base, 65536),))
    assert f"lowerdir={idmap.target}," in overlay.options


def test_nobody_else_may_look_into_the_upper_directory() -> None:
    whole = next(step for step in _steps(job()) if isinstance(step, MakeDir) and step.path == job().upper)
    assert (whole.mode, whole.uid, whole.gid) == (0o700, job().uid_base, job().uid_base)


def test_without_btrfs_the_upper_is_memory_of_at_most_the_memory_limit() -> None:
    tmpfs = next(step for step in _steps(job(upper="")) if isinstance(step, Mount))
    assert tmpfs.fstype == "tmpfs"
    assert f"size={job().spec.memory_bytes}," in tmpfs.options


def test_files_that_root_inside_may_write_are_in_the_bounded_directory() -> None:
    writable = [m for m in _config(job())["mounts"] if m["type"] == "bind" and "ro" not in m["options"]]
    assert writable
    assert all(mount["source"].startswith(job().upper) for mount in writable)


def test_a_volume_of_root_keeps_its_owners_and_one_of_a_user_belongs_to_root_inside() -> None:
    spec = {"volumes": (Volume("/data", "/data", read_only=True),)}
    base = job().uid_base
    for uid, lines in ((0, ((0, base, 65536),)), (1000, ((1000, base, 1),))):
        asked = job(spec=spec, caller_uid=uid, caller_gid=uid)
        step = next(s for s in _steps(asked) if isinstance(s, Idmap) and s.descriptor == 0)
        assert step.lines == lines
        assert step.attributes & MOUNT_ATTR_RDONLY
        assert "ro" in _mount(_config(asked), "/data")["options"]


def test_a_volume_of_a_caller_whose_group_has_another_number_is_refused() -> None:
    with pytest.raises(Unsupported, match="group 100") as caught:
        _steps(job(spec={"volumes": (Volume("/data", "/data"),)}, caller_uid=1000, caller_gid=100))
    assert caught.value.hint


def test_a_named_volume_keeps_every_number_inside_whoever_the_caller_is() -> None:
    asked = job(spec={"volumes": (Volume("data", "/data"),)}, caller_uid=1000, caller_gid=100, volumes="/v")
    (volume,) = (step for step in _steps(asked) if isinstance(step, Idmap) and step.descriptor == 0)
    assert (volume.source, volume.lines) == ("/v/data", ((0, asked.uid_base, asked.uid_count),))


def test_an_images_own_binds_are_read_only_and_owned_by_root_inside() -> None:
    asked = job(image=replace(IMAGE, binds=(("/usr", "/usr"),)))
    step = next(s for s in _steps(asked) if isinstance(s, Idmap) and s.source == "/usr")
    assert step.attributes & MOUNT_ATTR_RDONLY
    assert _mount(_config(asked), "/usr")["source"] == step.target


def test_every_namespace_is_new_but_the_network_when_asked_for() -> None:
    def kinds(asked: Job) -> set[str]:
        return {entry["type"] for entry in _config(asked)["linux"]["namespaces"]}

    every = {"pid", "ipc", "uts", "mount", "user", "cgroup", "network"}
    assert kinds(job()) == every
    host = job(spec={"network_mode": "host"})
    assert kinds(host) == every - {"network"}
    assert _mount(_config(host), "/sys")["type"] == "bind"
    assert _config(host)["linux"]["sysctl"] == {}


def test_on_the_hosts_network_its_names_are_used_where_it_has_a_file() -> None:
    config = _config(job(spec={"network_mode": "host"}))
    assert _mount(config, "/etc/hosts")["source"] == "/etc/hosts"
    assert "ro" in _mount(config, "/etc/hosts")["options"]
    assert _mount(config, "/etc/resolv.conf")["source"].startswith(job().upper)


def test_a_directory_that_a_runtime_leaves_in_hybrid_mode_is_removed() -> None:
    hidden, runc = f"/sys/fs/cgroup/unified{job().cgroup}", {"oci_runtime": "runc"}
    assert MakeDir(hidden) in _steps(job("hybrid", spec=runc))
    assert MakeDir(hidden) not in _steps(job("v1", spec=runc))
    assert MakeDir(hidden) not in _steps(job("hybrid"))


def test_no_terminal_and_no_rlimits_but_no_new_privileges() -> None:
    process = _config(job())["process"]
    assert process["terminal"] is False
    assert "rlimits" not in process
    assert process["noNewPrivileges"] is True
    assert process["args"] == ["/dev/.isolat/isolat-init"]


def test_the_application_gets_defaults_then_the_images_then_the_jobs_environment() -> None:
    asked = job(spec={"tty": True}, env=(("PATH", "/opt"), ("LANG", "de_DE")))
    main = LAYER.plan(asked, PROBE).main
    assert main is not None
    assert dict(main.env) == {"PATH": "/opt", "HOSTNAME": job().id[:12], "TERM": "xterm", "LANG": "de_DE"}
    assert (main.cwd, main.user) == ("/srv", "")


def test_an_outer_layer_has_a_guest_and_no_application() -> None:
    plan = LAYER.plan(job(command=()), PROBE)
    assert plan.main is None
    assert plan.guest is not None
    assert plan.guest.control


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"init": False}, "init"),
        ({"network_mode": "bridge"}, "network"),
        ({"oci_runtime": "kata"}, "kata"),
        ({"options": (("container", {"privileged": True}),)}, "privileged"),
        ({"options": (("container", {"shm_bytes": "big"}),)}, "shm_bytes"),
        ({"options": (("container", {"compat32": 1}),)}, "compat32"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_remedy(spec: dict[str, Any], word: str) -> None:
    with pytest.raises(Unsupported, match=word) as caught:
        LAYER.plan(job(spec=spec), PROBE)
    assert caught.value.hint


class _Place:
    """Just the facts: what a probe may look at, and what an inside is made of."""

    def __init__(self, known: Facts) -> None:
        self.facts = known

    def inside(self, key: str, known: Facts) -> tuple[str, Facts]:
        return key, known


def _probe(known: Facts) -> Probe:
    return LAYER.probe(_Place(known), NEVER)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"root": False}, "root"),
        ({"features": ("overlay", "idmap")}, "userns"),
        ({"tools": ()}, "OCI runtime"),
        ({"cgroups": CgroupFacts(CgroupMode.NONE)}, "control groups"),
    ],
)
def test_a_place_that_lacks_something_is_not_ready_and_says_what(changes: dict[str, Any], word: str) -> None:
    found = _probe(facts(**changes))
    assert not found.ready
    assert word in found.reason
    assert found.remedy


def test_another_machine_is_believed_but_not_tried() -> None:
    found = _probe(facts(kernel="0.0.1-elsewhere"))
    assert found.ready
    assert ("oci:crun", "/usr/bin/crun") in found.data
    assert found.warnings


def test_a_probe_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Probe:
        raise OSError("no more descriptors")

    monkeypatch.setattr(container, "_probe", broken)
    assert "no more descriptors" in _probe(facts()).reason


def test_the_inside_can_neither_mount_nor_limit() -> None:
    frame = Frame("container", (), has_guest=True, main_key="")
    key, known = LAYER.inside(frame, _Place(facts()))  # type: ignore[attr-defined]
    assert key == "guest"
    assert not known.root
    assert known.cgroups.mode is CgroupMode.NONE
    assert not _probe(known).ready
