"""The host and the fake layer, and the place that the host's inside is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from isolat.deadline import NEVER, Deadline
from isolat.errors import Unsupported
from isolat.layers.base import Frame
from isolat.layers.fake import FakeLayer
from isolat.layers.host import HostLayer
from isolat.places.base import Command, Facts, Io, Proc
from isolat.places.rooted import RootedPlace
from isolat.places.steps import MS_RDONLY, MS_REMOUNT, Cgroup, Idmap, MakeDir, Mount, PutFile, Run, Step
from isolat.spec.model import Tmpfs, Volume
from tests.unit.layers.jobs import PROBE, facts, job

HOST, FAKE = HostLayer(), FakeLayer()


class _Recorder:
    """A place that only writes down what it is asked for."""

    def __init__(self) -> None:
        self.facts: Facts = facts()
        self.asked: list[Any] = []

    def spawn(self, key: str, cmd: Command, io: Io, d: Deadline) -> Proc:
        self.asked.append(cmd)
        return Proc(key, 1)

    def carry_out(self, steps: Sequence[Step], d: Deadline, descriptors: Sequence[int] = ()) -> None:
        self.asked.extend(steps)

    def put(self, path: str, source: int, d: Deadline, mode: int = 0o644) -> None:
        self.asked.append(path)

    def inside(self, key: str, known: Facts) -> str:
        return f"inside {key}"


def test_the_host_layer_changes_the_root_and_joins_groups_that_exist() -> None:
    plan = HOST.plan(job("v1"), PROBE)
    group = next(step for step in plan.steps if isinstance(step, Cgroup))
    assert plan.guest is None
    assert plan.main is not None
    assert plan.main.root == f"{job().dir}/rootfs"
    assert plan.main.cgroup_files == tuple(f"{path}/cgroup.procs" for path in group.paths)
    assert not any("cpuset" in path for path in group.paths)


def test_a_read_only_host_has_a_read_only_overlay() -> None:
    plan = HOST.plan(job(spec={"read_only": True}), PROBE)
    overlay = next(step for step in plan.steps if isinstance(step, Mount) and step.fstype == "overlay")
    assert overlay.flags & MS_RDONLY


@pytest.mark.parametrize("field", ["tmpfs", "hostname"])
def test_the_host_layer_refuses_what_needs_namespaces(field: str) -> None:
    values = {"tmpfs": (Tmpfs("/t"),), "hostname": "box"}
    with pytest.raises(Unsupported, match=field):
        HOST.plan(job(spec={field: values[field]}), PROBE)


def test_the_host_layer_mounts_volumes_below_the_root_and_closes_that_only_then() -> None:
    volumes = (Volume("data", "/data"), Volume("/src", "/src", read_only=True))
    steps = HOST.plan(job(spec={"read_only": True, "volumes": volumes}, volumes="/state/pool/volumes"), PROBE).steps
    assert [step.source for step in steps if isinstance(step, Idmap)] == ["/state/pool/volumes/data", "/src"]
    bound = [step.argv[-4:] for step in steps if isinstance(step, Run)]
    rootfs = f"{job().dir}/rootfs"
    assert bound == [
        (f"{job().dir}/volumes/0", rootfs, "/data", "rw"),
        (f"{job().dir}/volumes/1", rootfs, "/src", "ro"),
    ]
    overlay = next(step for step in steps if isinstance(step, Mount) and step.fstype == "overlay")
    assert not overlay.flags & MS_RDONLY
    last = steps[-1]
    assert isinstance(last, Mount)
    assert (last.target, last.flags & MS_RDONLY, last.flags & MS_REMOUNT) == (rootfs, MS_RDONLY, MS_REMOUNT)


def test_a_process_in_the_host_layers_inside_has_its_root_and_group() -> None:
    main = HOST.plan(job(), PROBE).main
    frame = Frame("host", (), has_guest=False, main_key="main", main=main)
    around = _Recorder()
    inside = HOST.inside(frame, around)  # type: ignore[arg-type]
    inside.spawn("exec", Command(("true",), cwd="/"), Io(), NEVER)
    assert main is not None
    assert around.asked == [Command(("true",), cwd="/", root=main.root, cgroup_files=main.cgroup_files)]
    assert not inside.facts.root


def test_paths_are_below_the_new_root_and_other_steps_are_refused() -> None:
    around = _Recorder()
    inside = RootedPlace(around, "/new")  # type: ignore[arg-type]
    inside.put("/etc/x", 0, NEVER)
    inside.carry_out([MakeDir("/tmp/d"), PutFile("/tmp/f", "")], NEVER)
    assert around.asked == ["/new/etc/x", MakeDir("/new/tmp/d"), PutFile("/new/tmp/f", "")]
    with pytest.raises(Unsupported, match="mount"):
        inside.carry_out([Mount("none", "/mnt", "tmpfs")], NEVER)


def test_the_fake_layers_options_are_numbers_it_knows() -> None:
    for options in ({"steps": "3"}, {"fail_step": True}, {"slow": 1}):
        with pytest.raises(Unsupported) as caught:
            FAKE.plan(job(spec={"options": (("fake", options),)}), PROBE)
        assert caught.value.hint


def test_the_fake_layer_makes_as_many_steps_as_asked_and_fails_where_asked() -> None:
    for count, failing, length in ((0, -1, 0), (5, -1, 5), (2, 4, 5)):
        options = {"steps": count, "fail_step": failing}
        steps = FAKE.plan(job(spec={"options": (("fake", options),)}), PROBE).steps
        assert len(steps) == length
        assert [n for n, step in enumerate(steps) if isinstance(step, Run)] == ([failing] if failing >= 0 else [])


def test_without_a_guest_the_fake_layers_inside_is_the_place_itself() -> None:
    around = _Recorder()
    plan = FAKE.plan(job(spec={"options": (("fake", {"no_guest": True}),)}), PROBE)
    assert plan.guest is None
    assert not plan.main_in_guest
    alone = Frame("fake", (), has_guest=False, main_key="main")
    assert FAKE.inside(alone, around) is around  # type: ignore[arg-type, comparison-overlap]
    guest = Frame("fake", (), has_guest=True, main_key="guest/main")
    assert FAKE.inside(guest, around) == "inside guest"  # type: ignore[arg-type, comparison-overlap]


def test_a_fake_guest_that_does_not_exist_needs_no_image() -> None:
    assert FAKE.plan(job(image=None), PROBE).guest == Command(("/libexec/isolat-init",), control=True)
