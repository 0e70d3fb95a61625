"""The report: only what the registry has, every reason and remedy in it, and no exception from a bad probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from isolat.deadline import NEVER, Deadline
from isolat.errors import Unsupported
from isolat.evidence import doctor, versions
from isolat.layers.base import Boundary, Capabilities, Job, Layer, Plan, Probe
from isolat.places.base import CgroupFacts, CgroupMode, Facts, Place

FACTS = Facts("6.1.0", "x86_64", CgroupFacts(CgroupMode.V2), cpus=3, memory_bytes=5 << 20, features=("overlay",))


class _Place:
    facts = FACTS


class _Layer(Layer):
    capabilities: ClassVar[Capabilities] = Capabilities(Boundary.NONE)

    def __init__(self, name: str, answer: Probe | Exception) -> None:
        self.name = name  # type: ignore[misc]
        self.answer = answer

    def probe(self, place: Place, d: Deadline) -> Probe:
        assert d.left_s() is not None, "a probe has a deadline even where the caller has none"
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def plan(self, job: Job, probe: Probe) -> Plan:
        raise NotImplementedError


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> doctor.Report:
    monkeypatch.setattr(versions, "package_version", lambda package: "")
    good = Probe(True, versions=(("crun", "1.8.1"), ("qemu-system-x86_64", "7.2.1")), warnings=("a warning",))
    bad = Probe(False, reason="no such thing", remedy="apt-get install thing")
    layers = {
        "good": _Layer("good", good),
        "bad": _Layer("bad", bad),
        "broken": _Layer("broken", Unsupported("it broke", hint="mend it")),
    }
    return doctor.examine(cast(Place, _Place()), tmp_path / "root", NEVER, layers)


def test_every_layer_is_told_with_its_reason_and_remedy(report: doctor.Report) -> None:
    assert [(found.name, found.ready) for found in report.layers] == [("good", True), ("bad", False), ("broken", False)]
    assert (report.layers[1].reason, report.layers[1].remedy) == ("no such thing", "apt-get install thing")
    assert (report.layers[2].reason, report.layers[2].remedy) == ("it broke", "mend it")


def test_known_holes_are_warned_of_beside_the_layers_own_words(report: doctor.Report) -> None:
    text = "\n".join(report.layers[0].warnings)
    assert "a warning" in text and "CVE-2026-88264" in text and "CVE-2024-3446" in text


def test_the_text_names_everything(report: doctor.Report) -> None:
    text = doctor.render(report)
    for word in ("6.1.0", "v2", "good", "ready", "not ready", "no such thing", "apt-get install thing", "crun 1.8.1"):
        assert word in text


def test_the_report_is_json(report: doctor.Report) -> None:
    data: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    assert data["ready"] is True
    assert data["layers"][0]["versions"] == {"crun": "1.8.1", "qemu-system-x86_64": "7.2.1"}
    assert {part["name"] for part in data["parts"]} == {"packages", "disk limits", "machines"}


def test_looking_changes_nothing(report: doctor.Report, tmp_path: Path) -> None:
    assert list(tmp_path.iterdir()) == []


def test_with_no_layer_ready_nothing_is() -> None:
    assert not doctor.Report((), (doctor.Finding("x", False),), ()).ready
