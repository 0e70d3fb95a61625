"""Versions with known holes of the programs that do the isolating, and whether the one here has them.

Not a vulnerability scanner: a short table of the holes through which somebody *inside* could reach the host, in the
parts that Isolat really uses. It can only be as new as this file.

Two questions are kept apart. Upstream's: is the program's own version older than the one with the fix, in its branch?
Debian's: distributions repair old versions without changing their number, so for an installed Debian package the hole
counts as closed when the package's version is at least the repaired one, or its changelog names the CVE.

Sources (all read in 2026): crun's release notes 1.4.4 and 1.30; runc's advisories GHSA-xr7r-f8xq-vfvv (CVE-2024-21626)
and GHSA-9493-h29p-rfm2 with its two companions (CVE-2025-31133, CVE-2025-52565, CVE-2025-52881); the changelogs of
Debian's runc 1.1.5+ds1-1+deb12u1 and qemu 1:7.2+dfsg-7+deb12u18, which name CVE and release of the 7.2 branch; for
QEMU the other number is the next main release, so a repaired stable release in between is warned of too. Versions are
compared as in deb-version(7). gVisor repairs nothing but its newest release (its release policy), so for runsc
age itself is the finding.
"""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_DOC = Path("/usr/share/doc")
_CHANGELOG_BYTES_MAX = 4 << 20
_RUNSC_OLDEST = 20260101


@dataclass(frozen=True)
class Hole:
    """One known hole. ``fixed_in``: the first good version of each branch, ascending; the last holds for all later."""

    program: str
    cve: str
    what: str
    fixed_in: tuple[str, ...]
    package: str
    debian_fixed: str = ""  # the first good version of bookworm's package, where there is one
    mitigation: str = ""


HOLES = (
    Hole(
        "crun",
        "CVE-2022-27650",
        "containers start with inheritable capabilities",
        ("1.4.4",),
        "crun",
        debian_fixed="1.4.4-1",
    ),
    Hole(
        "crun",
        "CVE-2026-88264",
        "an image with /dev/console as a link makes root create a file on the host",
        ("1.30",),
        "crun",
        mitigation="images made by Isolat have an empty /dev, so none of them can use it",
    ),
    Hole(
        "crun",
        "CVE-2026-88265",
        "an image with /dev/null as a link gets a writable descriptor of a host file",
        ("1.30",),
        "crun",
        mitigation="images made by Isolat have an empty /dev, so none of them can use it",
    ),
    Hole(
        "runc",
        "CVE-2024-21626",
        "a leaked descriptor leads out of the container",
        ("1.1.12",),
        "runc",
        debian_fixed="1.1.5+ds1-1+deb12u1",
    ),
    Hole("runc", "CVE-2025-31133", "masked paths can be redirected while they are mounted", ("1.2.8", "1.3.3"), "runc"),
    Hole("runc", "CVE-2025-52565", "/dev/console can be redirected while it is mounted", ("1.2.8", "1.3.3"), "runc"),
    Hole("runc", "CVE-2025-52881", "writes to /proc can be redirected", ("1.2.8", "1.3.3"), "runc"),
    Hole(
        "qemu",
        "CVE-2023-2861",
        "9p lets a guest open special files of the host",
        ("7.2.4", "8.1"),
        "qemu-system-x86",
        debian_fixed="1:7.2+dfsg-7+deb12u1",
    ),
    Hole(
        "qemu",
        "CVE-2023-3180",
        "virtio-crypto writes beyond a buffer",
        ("7.2.5", "8.1"),
        "qemu-system-x86",
        debian_fixed="1:7.2+dfsg-7+deb12u2",
    ),
    Hole(
        "qemu",
        "CVE-2024-3446",
        "virtio devices free memory twice",
        ("7.2.11", "9.0"),
        "qemu-system-x86",
        debian_fixed="1:7.2+dfsg-7+deb12u6",
    ),
    Hole(
        "qemu",
        "CVE-2024-4467",
        "a disk image makes qemu-img open other files",
        ("7.2.13", "9.1"),
        "qemu-system-x86",
        debian_fixed="1:7.2+dfsg-7+deb12u7",
    ),
)


def version_key(version: str) -> tuple[int, ...]:
    """The numbers of an upstream version, as far as they go: ``7.2.22 (Debian …)`` is (7, 2, 22)."""
    match = re.match(r"\D*(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in match.group(1).split(".")) if match else ()


def is_fixed_upstream(version: str, fixed_in: tuple[str, ...]) -> bool:
    """Whether a version is good: at least the fix of its own branch, or at least the last one."""
    have = version_key(version)
    fixes = [version_key(text) for text in fixed_in]
    if not have or have >= fixes[-1]:
        return bool(have)
    return any(have[: len(fix) - 1] == fix[:-1] and have >= fix for fix in fixes)


def _order(letter: str) -> int:
    """deb-version(7): a tilde sorts before everything, even the end; letters before all else."""
    if letter == "~":
        return -1
    return ord(letter) if letter.isalpha() else ord(letter) + 256


def _parts_key(text: str) -> list[tuple[list[int], int]]:
    """Alternating runs of other characters and digits. 0 ends a run: below every letter, above a tilde."""
    found = []
    for letters, digits in re.findall(r"(\D*)(\d*)", text):
        if letters or digits:
            found.append(([*(_order(letter) for letter in letters), 0], int(digits or 0)))
    return [*found, ([0], 0)]


def compare_debian(left: str, right: str) -> int:
    """-1, 0 or 1, as ``dpkg --compare-versions`` orders two versions."""
    for a, b in zip(_split(left), _split(right), strict=True):
        one, two = _parts_key(a), _parts_key(b)
        if one != two:
            return -1 if one < two else 1
    return 0


def _split(version: str) -> tuple[str, str, str]:
    """Epoch, upstream version, Debian revision."""
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, dash, revision = rest.rpartition("-")
    return (epoch, upstream, revision) if dash else (epoch, rest, "0")


def is_open(hole: Hole, version: str, package_version: str = "", changelog: str = "") -> bool:
    """Whether the hole is there: upstream's answer, unless Debian's package says that it was repaired."""
    if is_fixed_upstream(version, hole.fixed_in):
        return False
    if not package_version:
        return True
    if hole.debian_fixed and compare_debian(package_version, hole.debian_fixed) >= 0:
        return False
    return hole.cve not in changelog


def warnings(versions: Mapping[str, str]) -> tuple[str, ...]:
    """One sentence for each open hole of the programs (name to version) that are here."""
    found = []
    for program, version in versions.items():
        holes = [hole for hole in HOLES if hole.program == program]
        if holes:
            package = package_version(holes[0].package)
            changelog = read_changelog(holes[0].package) if package else ""
            found += [_sentence(hole, version) for hole in holes if is_open(hole, version, package, changelog)]
        if program == "runsc":
            found += _age_warning(version)
    return tuple(found)


def _sentence(hole: Hole, version: str) -> str:
    more = f"; {hole.mitigation}" if hole.mitigation else ""
    return f"{hole.program} {version} has {hole.cve} ({hole.what}), fixed in {' and '.join(hole.fixed_in)}{more}"


def _age_warning(version: str) -> list[str]:
    match = re.search(r"20\d{6}", version)
    if match is None or int(match.group(0)) >= _RUNSC_OLDEST:
        return []
    return [f"runsc {version} is old, and gVisor repairs only its newest release: install a newer one"]


def package_version(package: str) -> str:
    """The installed version of a Debian package; empty when there is none, or no dpkg."""
    try:
        answer = subprocess.run(
            ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    status, _, version = answer.stdout.partition(" ")
    return version if status == "installed" else ""


def read_changelog(package: str, directory: Path = _DOC) -> str:
    """The package's Debian changelog; empty where documentation is not installed."""
    try:
        with gzip.open(directory / package / "changelog.Debian.gz", "rb") as stream:
            return stream.read(_CHANGELOG_BYTES_MAX).decode(errors="replace")
    except OSError:
        return ""
