"""What works on this machine, what does not, why, and the exact command that changes it.

Every layer of the registry is asked by its own probe, which tries it; what is not in the registry is not mentioned, so
nothing is ever called ready that isn't there. The rest of the machine (images, disk limits) is looked at beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isolat.deadline import Deadline
from isolat.engine.paths import native_dir
from isolat.errors import IsolatError
from isolat.evidence import versions
from isolat.guest import files
from isolat.images.pool import Pool
from isolat.layers.base import Layer, Probe
from isolat.places.base import Place
from isolat.qemu import accel, features
from isolat.setup.packages import Group, install_argv, missing

PROBE_S = 15.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ready: bool
    reason: str = ""
    remedy: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    machine: tuple[tuple[str, str], ...]
    layers: tuple[Finding, ...]
    parts: tuple[Finding, ...]

    @property
    def ready(self) -> bool:
        """Whether an environment can be made here at all."""
        return any(finding.ready for finding in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": dict(self.machine),
            "ready": self.ready,
            "layers": [_finding_json(finding) for finding in self.layers],
            "parts": [_finding_json(finding) for finding in self.parts],
        }


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "versions": dict(finding.versions), "warnings": list(finding.warnings)}


def examine(place: Place, root: Path, d: Deadline, layers: Mapping[str, Layer] | None = None) -> Report:
    """Probe every layer in ``place`` and look at the parts that they share. Never raises for what is missing."""
    if layers is None:
        from isolat.layers.registry import LAYERS

        layers = LAYERS
    facts = place.facts
    machine = (
        ("kernel", facts.kernel),
        ("architecture", facts.machine),
        ("cpus", str(facts.cpus)),
        ("memory", f"{facts.memory_bytes >> 20} MiB"),
        ("control groups", facts.cgroups.mode.value),
        ("features", " ".join(facts.features)),
    )
    found = tuple(_layer(layer, place, d) for layer in layers.values())
    return Report(machine, found, (_packages(), _pool(root), _machines(root, d)))


def _layer(layer: Layer, place: Place, d: Deadline) -> Finding:
    try:
        probe = layer.probe(place, d.sooner(PROBE_S))
    except IsolatError as error:  # a probe must not raise; if it does, that is the layer's answer
        probe = Probe(False, error.message, error.hint)
    known = versions.warnings(_programs(probe.versions)) if probe.versions else ()
    return Finding(layer.name, probe.ready, probe.reason, probe.remedy, probe.versions, (*probe.warnings, *known))


def _programs(found: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Program to version; every QEMU binary is the one program qemu."""
    return {("qemu" if name.startswith("qemu") else name): version for name, version in found}


def _packages() -> Finding:
    wanted = missing((Group.REQUIRED,))
    if not wanted:
        return Finding("packages", True)
    names = ", ".join(package.name for package in wanted)
    return Finding("packages", False, f"missing: {names}", " ".join(install_argv(wanted)))


def _pool(root: Path) -> Finding:
    pool = Pool(root)
    if pool.available:
        return Finding("disk limits", True)
    return Finding("disk limits", False, pool.reason, "without them an environment can fill the disk")


def _machines(root: Path, d: Deadline) -> Finding:
    """How machines run here: under KVM or emulated, and why. Nothing is fetched for that."""
    try:
        qemu = features.find(d.sooner(PROBE_S))
        program = (("qemu", qemu.version),)
        known = versions.warnings(dict(program))
        there = files.found(root / "guest", native_dir())
        if there is None:
            reason = "the kernel of machines was not fetched yet: the first one takes some seconds more"
            return Finding("machines", True, reason, "isolat template create", program, known)
        chosen = accel.choose(qemu, there, root / "guest" / "accel.json", d.sooner(2 * PROBE_S))
    except IsolatError as error:
        return Finding("machines", False, error.message, error.hint)
    how = {"tcg": "emulated", "kvm": "under KVM"}[chosen.kind]
    programs = (*program, ("Linux", there.release))
    return Finding("machines", True, f"they run {how}: {chosen.reason}", "", programs, known)


def render(report: Report) -> str:
    """The report for people: one line for each finding, reasons and remedies below."""
    lines = [f"{name:15} {value}" for name, value in report.machine]
    for title, findings in (("Layers", report.layers), ("Shared parts", report.parts)):
        lines += ["", title]
        for finding in findings:
            lines += _lines(finding)
    return "\n".join(lines) + "\n"


def _lines(finding: Finding) -> list[str]:
    known = ", ".join(f"{name} {version}" for name, version in finding.versions)
    lines = [f"  {finding.name:14} {'ready' if finding.ready else 'not ready':10} {known}".rstrip()]
    if finding.reason:
        lines.append(f"    because  {finding.reason}")
    if finding.remedy:
        lines.append(f"    remedy   {finding.remedy}")
    return lines + [f"    warning  {warning}" for warning in finding.warnings]
