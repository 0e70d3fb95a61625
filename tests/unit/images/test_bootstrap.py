"""What is asked of mmdebstrap, and what is refused before it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from isolat.errors import Unsupported, UsageError
from isolat.images import bootstrap


@pytest.mark.parametrize(
    ("name", "suite"),
    [
        ("debian", "bookworm"),
        ("debian:latest", "bookworm"),
        ("debian:sid", "sid"),
        ("debian-systemd", "bookworm"),
        ("debian-systemd:trixie", "trixie"),
    ],
)
def test_the_tag_is_the_suite(name: str, suite: str) -> None:
    assert bootstrap.parse_suite(name) == suite


@pytest.mark.parametrize(
    "name", ["ubuntu", "debian:woody", "debian:", "debian:--help", "debian-systemd:", "debian-sid", "fedora:41", ""]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        bootstrap.parse_suite(name)


@pytest.mark.parametrize("package", ["", "A", "a", "--force", "x y", "x,y", "x;y", "../x", "a" * 101])
def test_what_is_no_package_name_is_refused(package: str) -> None:
    with pytest.raises(UsageError):
        bootstrap.check_packages([package])


def test_packages_are_sorted_and_once_each() -> None:
    assert bootstrap.check_packages(["zsh", "gcc:amd64", "zsh", "libstdc++6"]) == ("gcc:amd64", "libstdc++6", "zsh")


def test_packages_asked_for_replace_the_default_but_a_system_keeps_its_init() -> None:
    assert bootstrap.included("debian", None) == bootstrap.DEFAULT_INCLUDE
    assert bootstrap.included("debian:sid", ["zsh"]) == ("zsh",)
    assert "systemd-sysv" in bootstrap.included("debian-systemd", None)
    assert {"zsh", "systemd-sysv", "udev"} <= set(bootstrap.included("debian-systemd:sid", ["zsh"]))


def test_the_command_line_is_confined_and_complete() -> None:
    argv = bootstrap.mmdebstrap_argv(Path("/b/tree"), "bookworm", ["python3-minimal", "zsh"], "amd64", "")
    assert argv[:4] == ["setpriv", "--pdeathsig", "KILL", "--"]
    assert {"--mount", "--pid", "--kill-child"} <= set(argv[: argv.index("mmdebstrap")])
    assert "--include=python3-minimal,zsh" in argv
    assert argv[-2:] == ["bookworm", "/b/tree"]


def test_a_mirror_comes_last() -> None:
    assert bootstrap.mmdebstrap_argv(Path("/t"), "sid", [], "amd64", "http://m/debian")[-1] == "http://m/debian"


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match="no architecture"):
        bootstrap.check_architecture("z80")


def test_an_architecture_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(Unsupported, match="can't run s390x"):
        bootstrap.check_architecture("s390x")


def test_the_native_architecture_has_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert {bootstrap.check_architecture(name) for name in ("", "amd64", "x86_64")} == {"amd64"}
