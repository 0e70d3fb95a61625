"""Whole systems, made here from Debian's packages, flattened and compared entry by entry with what umoci unpacks.

They need the package archive, and a minute each: `make soak`. The kinds that need no network are in test_flatten.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.test_flatten import same_as_umoci
from tests.support.layers import Archive

INCLUDED = ("--include=bash,coreutils,perl-base,python3-minimal,tzdata",)
pytestmark = [pytest.mark.root, pytest.mark.soak, pytest.mark.timeout(1200)]


def _system(out: Path, suite: str, *options: str) -> bytes:
    """mmdebstrap's own archive: devices, owners, capabilities and all."""
    command = ["mmdebstrap", "--mode=root", "--format=tar", *options, suite, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return out.read_bytes()


def _program(out: Path, package: str, path: str) -> bytes:
    """One file of a package that is downloaded and unpacked, and never installed."""
    out.mkdir()
    subprocess.run(["apt-get", "download", package], cwd=out, check=True, capture_output=True, timeout=300)
    (file,) = out.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", str(file), str(out / "tree")], check=True, capture_output=True)
    return (out / "tree" / path).read_bytes()


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_a_debian(tmp_path: Path, suite: str) -> None:
    archive = _system(tmp_path / "system.tar", suite, "--variant=minbase", "--include=iputils-ping")
    changes = Archive().add(b"etc/.wh.debian_version").add(b"usr/share/.wh.doc").add(b"etc/motd", data=b"changed")
    found = same_as_umoci(tmp_path, [archive, changes])
    assert len(found) > 5000
    assert b"etc/debian_version" not in found
    assert b"usr/share/doc/base-files/copyright" not in found


def test_one_for_another_cpu(tmp_path: Path) -> None:
    """Unpacked and not configured, which needs none of its programs to run."""
    archive = _system(tmp_path / "system.tar", "bookworm", "--variant=extract", "--architectures=arm64", *INCLUDED)
    found = same_as_umoci(tmp_path, [archive])
    assert len(found) > 1500


def test_busybox_with_its_links(tmp_path: Path) -> None:
    program = _program(tmp_path / "package", "busybox-static", "bin/busybox")
    archive = Archive().directory(b"bin").add(b"bin/busybox", data=program, mode=0o755)
    for name in (b"sh", b"ls", b"cat", b"mount", b"vi"):
        archive.link(b"bin/" + name, b"bin/busybox")
    found = same_as_umoci(
        tmp_path, [archive, Archive().symlink(b"sbin", b"bin").add(b"etc/passwd", data=b"root:x:0:0::/:/bin/sh")]
    )
    assert {found[b"bin/" + name].same for name in (b"sh", b"vi")} == {found[b"bin/busybox"].same}


def test_one_static_program_and_nothing_else(tmp_path: Path) -> None:
    """As distroless images are."""
    program = _program(tmp_path / "package", "busybox-static", "bin/busybox")
    found = same_as_umoci(tmp_path, [Archive().add(b"app", data=program, mode=0o755, uid=65532)])
    assert set(found) == {b".", b"app", b"dev"}
