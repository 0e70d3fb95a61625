"""The whole PC: what it refuses before anything is done, and how it is stopped."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, Lost, Unsupported
from isolat.layers.base import GUEST, Frame
from isolat.layers.vm import OFF, VmLayer
from isolat.places.base import Command, Exit, Facts
from tests.unit.layers.jobs import KIT, PROBE, facts, job

LAYER = VmLayer()


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"memory_bytes": 64 << 20}, "--memory 128m"),
        ({"disk_bytes": 64 << 20}, "--disk 512m"),
        ({"disk_bytes": 100 << 40}, "15 TiB"),
        ({"kernel": "/boot/vmlinuz"}, "--kernel"),
        ({"pids_limit": 5}, "container"),
        ({"network_mode": "host"}, "none"),
        ({"options": (("vm", {"firmware": "x"}),)}, "nothing yet"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_remedy(spec: dict[str, Any], word: str) -> None:
    with pytest.raises(Unsupported) as told:
        LAYER.plan(job("v2", spec=spec), PROBE)
    assert word in told.value.hint


def test_nothing_can_be_put_into_it() -> None:
    with pytest.raises(Unsupported, match="nothing can be put into") as told:
        LAYER.plan(job("v2", command=()), PROBE)
    assert "microvm/container" in told.value.hint


def test_a_qemu_without_pcs_is_told() -> None:
    with pytest.raises(Unsupported, match="q35"):
        LAYER.plan(job("v2", machine=replace(KIT, pc="")), PROBE)


class _Machine:
    """A place with an application and a machine that end when they are asked, or don't."""

    facts: Facts = facts("v2")

    def __init__(self, *, obeys: bool = True, goes_off: bool = True) -> None:
        self.obeys, self.goes_off = obeys, goes_off
        self.heard: list[str] = []

    def signal(self, key: str, n: int, d: Deadline, *, everything: bool = False) -> None:
        self.heard.append(f"{signal.Signals(n).name} {key}")
        self.obeys = self.obeys or n == signal.SIGKILL

    def inside(self, key: str, facts: Facts) -> _Machine:
        return self

    def spawn(self, key: str, command: Command, io: object, d: Deadline) -> None:
        self.heard.append(" ".join(command.argv))

    def wait(self, key: str, d: Deadline) -> Exit:
        if not (self.goes_off if key == GUEST else self.obeys):
            raise DeadlineExceeded(key)
        return Exit(7)


def _stop(machine: _Machine) -> Exit:
    plan = LAYER.plan(job("v2"), PROBE)
    frame = Frame("vm", plan.steps, True, "guest/main", plan.main, plan.guest)
    return LAYER.stop(frame, machine, 1, Deadline(10))  # type: ignore[arg-type]


def test_stop_asks_the_application_then_the_system() -> None:
    machine = _Machine()
    assert _stop(machine) == Exit(7)
    assert machine.heard == ["SIGTERM guest/main", " ".join(OFF)]


def test_an_application_that_does_not_end_is_killed_with_its_machine() -> None:
    machine = _Machine(obeys=False)
    assert _stop(machine) == Exit(7, forced=True)
    assert machine.heard == ["SIGTERM guest/main", "SIGKILL guest"]


def test_a_machine_that_does_not_go_off_is_killed_and_that_is_told() -> None:
    machine = _Machine(goes_off=False)
    assert _stop(machine) == Exit(7, forced=True)
    assert machine.heard == ["SIGTERM guest/main", " ".join(OFF), "SIGKILL guest"]


def test_a_machine_whose_keeper_died_meanwhile_is_lost() -> None:
    class Gone(_Machine):
        def wait(self, key: str, d: Deadline) -> Exit:
            raise Lost("gone")

    with pytest.raises(Lost):
        _stop(Gone())
