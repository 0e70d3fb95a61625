"""Volumes that a machine shares while it runs: what is refused, and what only such a machine has."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isolat.errors import Unsupported, UsageError
from isolat.layers import live, volumes
from isolat.layers.base import Job, Plan, Source
from isolat.layers.microvm import MicrovmLayer
from isolat.spec.model import Volume
from tests.unit.layers.jobs import KIT, PROBE, job

LAYER = MicrovmLayer()


def _job(*sources: str, options: dict[str, Any] | None = None, read_only: bool = False, **changes: Any) -> Job:
    shown = tuple(Volume(source, f"/v{n}", read_only) for n, source in enumerate(sources))
    own = {"volumes": "live"} if options is None else options
    layers = ("microvm",) if changes.get("command") != () else ("microvm", "container")
    return job("v2", spec={"volumes": shown, "layers": layers, "options": (("microvm", own),)}, **changes)


def _plan(*sources: str, **more: Any) -> Plan:
    return LAYER.plan(_job(*sources, **more), PROBE)


def test_it_is_booted_for_itself_and_nobody_makes_it_in_advance() -> None:
    asked = _job("/src")
    plan = LAYER.plan(asked, PROBE)
    assert plan.template is None and not dict(plan.options)["cloned"]
    assert LAYER.warm_key(asked) == ""
    assert "copy_key" not in dict(plan.options)
    assert plan.guest is not None and any("share=on" in word for word in plan.guest.argv)


def test_without_the_word_nothing_is_shared() -> None:
    for options in ({}, {"volumes": "copied"}, {"template": False}):
        plan = _plan("/src", options=options)
        assert not plan.beside
        assert plan.guest is not None and not any("vhost" in word or "isolat.live" in word for word in plan.guest.argv)
        assert Source.VOLUMES in {descriptor.source for descriptor in plan.descriptors}


def test_nothing_is_copied_in_or_carried_back() -> None:
    plan = _plan("/src", "data")
    assert not {"volumes", "carried"} & set(dict(plan.options))
    assert Source.VOLUMES not in {descriptor.source for descriptor in plan.descriptors}
    assert plan.main is not None and "--pack" not in plan.main.after


def test_each_volume_has_a_server_without_privileges_outside() -> None:
    plan = _plan("/src", "data")
    assert [key for key, _ in plan.beside] == ["live-0", "live-1"]
    for key, command in plan.beside:
        assert command.user == str(0x4007_0000) and not command.root
        assert command.spaces & 0x10000000, "no user namespace"
        assert command.held == (key,)
        assert command.cgroup_files == ("/sys/fs/cgroup/isolat/tag/0123456789abcdef0123456789abcdef/cgroup.procs",)
        assert "sandbox=namespace" in command.argv
    assert plan.guest is not None and plan.guest.held == ("ram", "qmp-peer", "live-0-peer", "live-1-peer")


def test_read_only_holds_outside_and_inside() -> None:
    for read_only in (True, False):
        plan = _plan("/src", read_only=read_only)
        (shown,) = (step for step in plan.steps if step.kind == "idmap")
        assert bool(getattr(shown, "attributes") & 1) == read_only  # noqa: B009 - a step of one kind
        (inside,) = (step for step in plan.inside if step.to_json().get("fstype") == "virtiofs")
        assert bool(inside.to_json()["flags"] & 1) == read_only


def test_a_template_that_was_asked_for_is_refused_by_its_name() -> None:
    with pytest.raises(Unsupported, match="x-microvm: template is true and volumes is live"):
        _plan("/src", options={"volumes": "live", "template": True})


@pytest.mark.parametrize("value", [True, "shared", 1, None, ["live"]])
def test_another_word_is_refused_with_those_that_may_stand_there(value: object) -> None:
    with pytest.raises(Unsupported, match="x-microvm: volumes is") as found:
        _plan("/src", options={"volumes": value})
    assert found.value.hint == "it may be copied or live"


def test_a_stack_is_refused_with_its_reason() -> None:
    with pytest.raises(Unsupported, match="to a layer in the machine: its container needs mounts with ids of its own"):
        _plan("/src", command=())


def test_more_than_there_is_room_for_is_refused() -> None:
    _plan(*(f"/src{n}" for n in range(live.MOST)))
    with pytest.raises(Unsupported, match="at most 8 live volumes, not 9"):
        _plan(*(f"/src{n}" for n in range(live.MOST + 1)))


def test_what_is_missing_here_is_said_with_the_remedy() -> None:
    kit = replace(KIT, live_lacks="could not find virtiofsd", live_remedy="apt-get install it")
    with pytest.raises(Unsupported, match="live volumes are not possible here: could not find virtiofsd") as found:
        _plan("/src", machine=kit)
    assert found.value.hint == "apt-get install it"
    assert _plan("/src", options={}, machine=kit).beside == ()


def test_a_caller_whose_numbers_differ_is_refused_as_by_a_container() -> None:
    with pytest.raises(Unsupported, match="user 1000 and group 100"):
        _plan("/src", caller_uid=1000, caller_gid=100)
    assert _plan("data", caller_uid=1000, caller_gid=100).beside


def test_a_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shown = (Volume("data", "/d"), Volume(str(tmp_path), "/a"), Volume(f"{tmp_path}/file", "/b"))
    opened = [os.open(path, os.O_PATH) for path in (tmp_path, tmp_path / "file")]
    try:
        live.check_sources(shown[:2], opened[:1])
        with pytest.raises(UsageError, match="file is no directory") as found:
            live.check_sources(shown, opened)
    finally:
        for fd in opened:
            os.close(fd)
    assert "copied" in found.value.hint


def test_live_named_volumes_are_no_copies_of_anybody() -> None:
    can = LAYER.capabilities
    assert volumes.are_copied(can, {})
    assert volumes.are_copied(can, {"x-microvm": {"template": False}})
    assert not volumes.are_copied(can, {"x-microvm": {"volumes": "live"}})


def test_a_way_that_nobody_may_go_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "closed" / "envs"
    inner.mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    with pytest.raises(Unsupported, match="closed, which they are below, lets nobody through") as found:
        live.check_way(inner)
    assert str(tmp_path / "closed") in found.value.hint


def test_what_ends_an_option_is_part_of_the_path() -> None:
    plan = LAYER.plan(replace(_job("/src"), dir="/a,b\\c"), PROBE)
    assert r"source=/a\,b\\c/volumes/0" in plan.beside[0][1].argv
