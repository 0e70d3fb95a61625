"""The table of packages, and asking before installing."""

from __future__ import annotations

import pytest

from isolat.setup import packages
from isolat.setup.packages import Group, Package


def test_every_package_is_named_once_and_says_what_for() -> None:
    names = [package.name for package in packages.PACKAGES]
    assert len(names) == len(set(names))
    assert all(package.purpose for package in packages.PACKAGES)


def test_only_what_is_installed_counts() -> None:
    text = "crun installed 1.8.1-1+deb12u1\nrunc config-files 1.1.5\nbtrfs-progs not-installed \n"
    assert packages.parse_installed(text) == {"crun": "1.8.1-1+deb12u1"}


def test_a_command_counts_whoever_installed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        Package("x", "p", Group.REQUIRED, command="sh"),
        Package("y", "p", Group.REQUIRED, command="no-such-command"),
    )
    monkeypatch.setattr(packages, "PACKAGES", table)
    monkeypatch.setattr(packages, "installed", lambda names: {})
    assert [package.name for package in packages.missing((Group.REQUIRED,))] == ["y"]


def test_the_remedy_names_the_package_of_a_command() -> None:
    package = packages.package_of_command("mkfs.erofs")
    assert package is not None and package.name == "erofs-utils"
    assert packages.install_argv([package])[-1] == "erofs-utils"


def test_nothing_missing_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "missing", lambda groups: ())
    told: list[str] = []
    assert packages.setup(False, lambda question: pytest.fail("asked"), told.append) == 0
    assert "installed" in told[0]


def test_a_no_installs_nothing_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "missing", lambda groups: packages.PACKAGES[:2])
    monkeypatch.setattr(packages, "_apt", lambda wanted: pytest.fail("installed"))
    monkeypatch.setattr("shutil.which", lambda name, **_: "/usr/bin/apt-get")
    told: list[str] = []
    assert packages.setup(False, lambda question: False, told.append) == 125
    assert packages.PACKAGES[0].purpose in told[0]


def test_yes_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "missing", lambda groups: packages.PACKAGES[:1])
    monkeypatch.setattr(packages, "_apt", lambda wanted: 7)
    monkeypatch.setattr("shutil.which", lambda name, **_: "/usr/bin/apt-get")
    assert packages.setup(True, lambda question: pytest.fail("asked"), lambda line: None) == 7
