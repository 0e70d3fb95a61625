"""Which versions have known holes: upstream's numbers, Debian's repairs, and the order of Debian's versions."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

from isolat.evidence import versions
from isolat.evidence.versions import Hole

ORDERED = (
    "0.0~20221219.0-2+b3",
    "1.0~rc1-1",
    "1.0",
    "1.0-1",
    "1.0a-1",
    "1.0+ds-1",
    "1.1.5+ds1-1",
    "1.1.5+ds1-1+deb12u1",
    "1.8.1-1",
    "1.8.1-1+deb12u1",
    "1.10-1",
    "1:7.2+dfsg-7+deb12u6",
    "1:7.2+dfsg-7+deb12u18+b3",
    "2:0.1",
)
HOLE = Hole("runc", "CVE-1", "w", ("1.2.8", "1.3.3"), "runc", debian_fixed="1.1.5+ds1-1+deb12u2")


@pytest.mark.parametrize("index", range(len(ORDERED) - 1))
def test_debian_versions_are_in_order(index: int) -> None:
    assert versions.compare_debian(ORDERED[index], ORDERED[index + 1]) == -1
    assert versions.compare_debian(ORDERED[index + 1], ORDERED[index]) == 1
    assert versions.compare_debian(ORDERED[index], ORDERED[index]) == 0


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="compares with dpkg")
def test_dpkg_agrees() -> None:
    names = {-1: "lt", 0: "eq", 1: "gt"}
    for left in ORDERED:
        for right in ORDERED[::3]:
            argv = ["dpkg", "--compare-versions", left, names[versions.compare_debian(left, right)], right]
            assert subprocess.run(argv, check=False).returncode == 0, argv


@pytest.mark.parametrize(
    ("version", "fixed"),
    [
        ("1.1.5", False),
        ("1.2.7", False),
        ("1.2.8", True),
        ("1.2.10", True),
        ("1.3.0", False),
        ("1.3.3", True),
        ("1.4.0", True),
        ("2.0", True),
        ("", False),
        ("unknown", False),
    ],
)
def test_each_branch_has_its_own_fix(version: str, fixed: bool) -> None:
    assert versions.is_fixed_upstream(version, ("1.2.8", "1.3.3")) is fixed


def test_words_around_a_version_do_not_matter() -> None:
    assert versions.version_key("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)") == (7, 2, 22)
    assert versions.version_key("version 1.8.1") == (1, 8, 1)


def test_a_repaired_debian_package_is_closed_although_its_number_is_old() -> None:
    assert versions.is_open(HOLE, "1.1.5", "1.1.5+ds1-1+deb12u1")
    assert not versions.is_open(HOLE, "1.1.5", "1.1.5+ds1-1+deb12u2")
    assert not versions.is_open(HOLE, "1.1.5", "1.1.5+ds1-1+deb12u1", "  * CVE-1: backported")


def test_without_a_package_only_upstreams_number_counts() -> None:
    assert versions.is_open(HOLE, "1.1.5")
    assert not versions.is_open(HOLE, "1.3.3")


def test_every_warning_names_program_version_and_cve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "package_version", lambda package: "")
    found = versions.warnings({"crun": "1.8.1", "runc": "1.4.0", "other": "0.1"})
    assert len(found) == 2
    assert all("crun 1.8.1 has CVE-2026-8826" in text and "fixed in 1.30" in text for text in found)


@pytest.mark.parametrize(("version", "count"), [("release-20221219.0", 1), ("release-20991231.0", 0), ("VERSION", 0)])
def test_an_old_gvisor_is_told(version: str, count: int) -> None:
    assert len(versions.warnings({"runsc": version})) == count


def test_the_changelog_is_read_from_its_archive(tmp_path: Path) -> None:
    (tmp_path / "runc").mkdir()
    with gzip.open(tmp_path / "runc/changelog.Debian.gz", "wb") as stream:
        stream.write(b"CVE-1\n")
    assert versions.read_changelog("runc", tmp_path) == "CVE-1\n"
    assert versions.read_changelog("absent", tmp_path) == ""


def test_the_table_is_well_formed() -> None:
    for hole in versions.HOLES:
        keys = [versions.version_key(text) for text in hole.fixed_in]
        assert keys and keys == sorted(keys) and all(keys)
        assert hole.cve.startswith("CVE-") and hole.what and hole.package
