"""A kernel out of a package, or out of a user's file."""

from __future__ import annotations

import bz2
import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from isolat.errors import StoreError, Unsupported, UsageError
from isolat.guest import kernel
from tests.unit.guest.elves import RELEASE, VMLINUX, bzimage, gzipped


def lz4(data: bytes) -> bytes:
    return subprocess.run(["lz4", "-lc"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("pack", [gzipped, lzma.compress, bz2.compress, lz4])
def test_the_elf_comes_out_of_a_bzimage_whatever_its_compression(pack: Callable[[bytes], bytes]) -> None:
    if pack is lz4 and not shutil.which("lz4"):
        pytest.skip("no lz4")
    assert kernel.extract(bzimage(pack=pack), "x") == VMLINUX


def test_an_elf_is_taken_as_it_is() -> None:
    assert kernel.extract(VMLINUX, "x") == VMLINUX


def test_what_cannot_be_decompressed_is_said() -> None:
    with pytest.raises(Unsupported, match="not known here") as caught:
        kernel.extract(bzimage(pack=lambda data: b"\x89LZO" + data), "x")
    assert "vmlinux" in caught.value.hint


def test_a_missing_decompressor_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, **_: None)
    with pytest.raises(Unsupported, match="lz4") as caught:
        kernel.extract(bzimage(pack=lambda data: b"\x02\x21\x4c\x18" + data), "x")
    assert caught.value.hint == "apt-get install lz4"


@pytest.mark.parametrize("image", [b"", b"#!/bin/sh\n", bytes(4096)])
def test_what_is_no_kernel_is_refused(image: bytes) -> None:
    with pytest.raises(StoreError, match="neither"):
        kernel.extract(image, "x")


@pytest.mark.parametrize("pack", [gzipped, lzma.compress])
def test_a_damaged_payload_is_refused(pack: Callable[[bytes], bytes]) -> None:
    with pytest.raises(StoreError):
        kernel.extract(bzimage(pack=lambda data: pack(data)[:8] + b"damaged" * 9), "x")


def test_a_payload_that_is_no_elf_is_refused() -> None:
    with pytest.raises(StoreError, match="no ELF"):
        kernel.extract(bzimage(b"something else"), "x")


@pytest.mark.parametrize("image", [VMLINUX, bzimage()])
def test_the_release_is_in_the_file(image: bytes) -> None:
    assert kernel.release_of(image) == RELEASE


def test_the_parts_of_a_kernel_are_among_what_it_depends_on() -> None:
    depends = "kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120) | linux-initramfs-tool"
    assert kernel.parse_parts(depends) == []
    assert kernel.parse_parts("linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)") == [
        "linux-image-6.1.0-56-cloud-amd64=6.1.192-2"
    ]
    assert kernel.parse_parts("linux-binary-7 (= 7-1) | x, linux-modules-7 (= 7-1)") == [
        "linux-binary-7=7-1",
        "linux-modules-7=7-1",
    ]


def test_without_apt_the_other_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, **_: None)
    with pytest.raises(Unsupported, match="apt-get") as caught:
        kernel.fetch(tmp_path / "kernel")
    assert "--kernel" in caught.value.hint


def test_a_failed_fetch_leaves_nothing_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def fails(work: Path, words: list[str], private: bool, d: object) -> None:
        asked.append((*words, "private" if private else "own"))
        raise StoreError("no", details=("E: no network",))

    monkeypatch.setattr(kernel, "_apt", fails)
    monkeypatch.setattr("shutil.which", lambda name, **_: f"/usr/bin/{name}")
    with pytest.raises(StoreError, match="network") as caught:
        kernel.fetch(tmp_path / "guest" / "kernel", "linux-image-x")
    assert "--kernel" in caught.value.hint and caught.value.details == ("E: no network",)
    assert asked == [("download", "linux-image-x", "own"), ("update", "private")]
    assert list((tmp_path / "guest").iterdir()) == []


def test_a_users_kernel_brings_the_modules_beside_it(tmp_path: Path) -> None:
    (tmp_path / "modules" / RELEASE).mkdir(parents=True)
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    found = kernel.from_file(tmp_path / "vmlinuz", into=tmp_path / "out" / "vmlinux")
    assert found == kernel.Kernel(RELEASE, tmp_path / "out" / "vmlinux", tmp_path / "modules" / RELEASE)
    assert found.vmlinux.read_bytes() == VMLINUX


def test_a_users_vmlinux_is_used_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(VMLINUX)
    assert kernel.from_file(tmp_path / "vmlinux") == kernel.Kernel(RELEASE, tmp_path / "vmlinux", None)


def test_a_users_kernel_that_is_not_there_is_a_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        kernel.from_file(tmp_path / "vmlinux")
