"""Plans as they are kept in tests/golden/plans: a change of any effect shows up there as a difference to be read.

``ISOLAT_UPDATE_GOLDEN=1 pytest tests/unit/layers/test_golden.py`` writes them anew.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from isolat.layers.base import Job, Plan
from isolat.layers.registry import LAYERS
from isolat.oci.seccomp import oci_seccomp
from isolat.places.steps import PutFile, step_from_json
from isolat.spec.model import Tmpfs, Volume
from tests.unit.layers.jobs import KIT, PROBE, job

GOLDEN = Path(__file__).parents[2] / "golden/plans"
UPDATE = bool(os.environ.get("ISOLAT_UPDATE_GOLDEN"))
SECCOMP = "seccomp-x86_64"

FULL: dict[str, Any] = {
    "network_mode": "host",
    "hostname": "box",
    "user": "1000:1000",
    "tty": True,
    "read_only": True,
    "working_dir": "/work",
    "environment": (("A", "b"),),
    "memory_swap_bytes": 1 << 30,
    "oci_runtime": "runc",
    "volumes": (Volume("/home/me/src", "/src"), Volume("/etc/ssl", "/etc/ssl", read_only=True)),
    "tmpfs": (Tmpfs("/scratch", 1 << 20),),
    "options": (("container", {"compat32": True, "shm_bytes": 1 << 20}),),
}

VOLUMES = (Volume("data", "/data"), Volume("shared.1", "/shared", read_only=True))
DATA: dict[str, Any] = {"volumes": "/state/pool/volumes"}

CASES: dict[str, tuple[str, Job]] = {
    **{f"{layer}-{mode}": (layer, job(mode)) for layer in LAYERS for mode in ("v1", "hybrid", "v2")},
    "container-full": ("container", job("v2", spec=FULL, caller_uid=1000, caller_gid=1000)),
    "container-volumes": ("container", job("v2", spec={"volumes": VOLUMES}, caller_uid=1000, caller_gid=100, **DATA)),
    "host-volumes": ("host", job("v2", spec={"volumes": VOLUMES, "read_only": True}, **DATA)),
    "microvm-volumes": ("microvm", job("v2", spec={"volumes": (*VOLUMES, Volume("/src", "/src"))}, **DATA)),
    "container-without-btrfs": ("container", job("v2", upper="")),
    "container-outer": ("container", job("v2", command=())),
    "host-read-only": ("host", job("v2", spec={"read_only": True})),
    "microvm-full": (
        "microvm",
        job(
            "v2",
            spec={
                "hostname": "box",
                "user": "1000:1000",
                "read_only": True,
                "cpus": 2.0,
                "memory_bytes": 256 << 20,
                "tmpfs": (Tmpfs("/scratch", 1 << 20),),
                "options": (("microvm", {"park_s": 0}),),
            },
        ),
    ),
    "microvm-booted": ("microvm", job("v2", spec={"options": (("microvm", {"template": False}),)})),
    "microvm-live": (
        "microvm",
        job(
            "v2",
            spec={
                "layers": ("microvm",),
                "volumes": (*VOLUMES, Volume("/home/me/src", "/src")),
                "options": (("microvm", {"volumes": "live"}),),
            },
            caller_uid=1000,
            caller_gid=1000,
            **DATA,
        ),
    ),
    "vm-full": (
        "vm",
        job(
            "v2",
            spec={
                "hostname": "box",
                "user": "1000:1000",
                "tty": True,
                "cpus": 2.0,
                "memory_bytes": 256 << 20,
                "disk_bytes": 2 << 30,
            },
        ),
    ),
    "vm-kvm": ("vm", job("v2", machine=replace(KIT, accel="kvm", tsc_khz=0))),
    "microvm-outer": ("microvm", job("v2", command=())),
    "fake-failing": ("fake", job("v2", spec={"options": (("fake", {"steps": 5, "fail_step": 3}),)})),
    "fake-slow": ("fake", job("v2", spec={"options": (("fake", {"slow_start_s": 1.5}),)})),
}


def _plan(name: str) -> Plan:
    layer, asked = CASES[name]
    return LAYERS[layer].plan(asked, PROBE)


def _readable(plan: Plan) -> dict[str, Any]:
    """The plan as JSON, with the bundle's text opened up and the long list of system calls left to its own file."""
    steps = []
    for step in plan.steps:
        data = step.to_json()
        if isinstance(step, PutFile) and step.path.endswith("/config.json"):
            config = json.loads(step.text)
            if config["linux"]["seccomp"] == oci_seccomp("x86_64"):
                config["linux"]["seccomp"] = SECCOMP
            else:
                config["linux"]["seccomp"] = {"architectures": config["linux"]["seccomp"]["architectures"]}
            data["text"] = config
        steps.append(data)
    return {
        "steps": steps,
        "guest": asdict(plan.guest) if plan.guest else None,
        "main": asdict(plan.main) if plan.main else None,
        "main_in_guest": plan.main_in_guest,
        "needs": asdict(plan.needs),
        **_of_machine(plan),
    }


def _of_machine(plan: Plan) -> dict[str, Any]:
    """What only machines have."""
    if not plan.descriptors:
        return {}
    beside = {"beside": {key: asdict(command) for key, command in plan.beside}} if plan.beside else {}
    return {
        **beside,
        "descriptors": [asdict(descriptor) for descriptor in plan.descriptors],
        "inside": [step.to_json() for step in plan.inside],
        "template": asdict(plan.template) if plan.template else None,
        "options": dict(plan.options),
    }


def _compare(name: str, found: object) -> None:
    path = GOLDEN / f"{name}.json"
    text = json.dumps(found, indent=1) + "\n"
    if UPDATE:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; ISOLAT_UPDATE_GOLDEN=1 writes it anew"


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_golden_one(name: str) -> None:
    _compare(name, _readable(_plan(name)))


def test_the_system_call_list_is_the_golden_one() -> None:
    _compare(SECCOMP, oci_seccomp("x86_64"))


def test_every_golden_file_has_a_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == {*CASES, SECCOMP}


@pytest.mark.parametrize("name", CASES)
def test_two_plans_are_equal(name: str) -> None:
    assert _plan(name) == _plan(name)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_survives_its_handle(name: str) -> None:
    plan = _plan(name)
    stored = json.loads(json.dumps([step.to_json() for step in plan.steps]))
    assert tuple(step_from_json(data) for data in stored) == plan.steps


_effects: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook can't be removed, so it listens only while a test wants it to."""
    if _effects is None:
        return
    written = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
    if written or event.startswith(("subprocess.", "socket.", "os.fork", "os.exec", "os.mkdir", "os.r", "os.ch")):
        _effects.append(f"{event} {arguments}")


sys.addaudithook(_audit)


@pytest.mark.parametrize("name", CASES)
def test_planning_has_no_effect(name: str) -> None:
    global _effects
    found: list[str] = []
    _effects = found
    try:
        _plan(name)
    finally:
        _effects = None
    assert found == []


@pytest.mark.parametrize("name", CASES)
def test_every_effect_is_named_after_the_environment(name: str) -> None:
    """Whatever is left over after a crash is found by the id, and reverting removes nothing of anybody else's."""
    id = CASES[name][1].id
    for step in _plan(name).steps:
        for field in ("path", "target"):
            assert id in str(getattr(step, field, id)), step
        assert all(id in path for path in getattr(step, "paths", ()))
