"""What sharing directories with a machine takes, and what is said where that is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from isolat.guest.files import GuestFiles
from isolat.qemu import sharing
from isolat.qemu.features import Qemu
from tests.unit.layers.jobs import KIT

QEMU = Qemu("/q", "7.2.22", "", ("microvm",), (sharing.DEVICE,), sandbox=True, identity="q")
GUEST = GuestFiles("6.1", Path("/v"), Path("/i"), Path("/t"), "key", has_crun=False, live=True)


def _program(path: Path, mode: int = 0o755) -> str:
    path.touch()
    path.chmod(mode)
    return str(path)


def test_nothing_is_missing() -> None:
    assert sharing.lacking(QEMU, GUEST) == ("", "")


def test_a_qemu_without_the_device_and_a_kernel_without_the_driver_are_named() -> None:
    assert "QEMU 7.2.22 has no vhost-user-fs-device" in sharing.lacking(replace(QEMU, devices=()), GUEST)[0]
    assert "kernel 6.1 has no virtiofs" in sharing.lacking(QEMU, replace(GUEST, live=False))[0]


def test_the_first_server_that_is_there_is_taken(tmp_path: Path) -> None:
    servers = (str(tmp_path / "none"), _program(tmp_path / "closed", 0o644), _program(tmp_path / "server"))
    found = sharing.with_server(replace(KIT, virtiofsd=""), servers)
    assert (found.virtiofsd, found.live_lacks) == (servers[-1], "")
    assert sharing.warnings(servers) == ()


def test_where_there_is_none_the_remedy_is_said(tmp_path: Path) -> None:
    servers = (str(tmp_path / "none"),)
    found = sharing.with_server(KIT, servers)
    assert f"could not find {servers[0]}" in found.live_lacks and "apt-get install" in found.live_remedy
    assert len(sharing.warnings(servers)) == 1


def test_what_the_machine_lacks_is_said_first(tmp_path: Path) -> None:
    kit = replace(KIT, live_lacks="the kernel has none", live_remedy="another kernel")
    assert sharing.with_server(kit, (str(tmp_path / "none"),)).live_lacks == "the kernel has none"
