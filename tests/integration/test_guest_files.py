"""The guest's files for real: a kernel fetched from the archive, the agent in an initramfs, crun with its libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from isolat.deadline import NEVER
from isolat.errors import StoreError
from isolat.guest import blank, files, kernel, modules, tools
from tests.support.guest import CACHE, NATIVE, guest_files

pytestmark = pytest.mark.root


@pytest.mark.timeout(600)
def test_all_of_it_is_made_and_then_found_quickly() -> None:
    made = guest_files()
    assert made.vmlinux.read_bytes()[:4] == b"\x7fELF"
    assert made.initramfs.stat().st_size < 4 << 20
    assert made.has_crun == (tools.find_crun() is not None)
    start = time.monotonic()
    assert files.ensure(CACHE, NATIVE) == made
    assert time.monotonic() - start < 0.5
    order = modules.closure(kernel.Kernel(made.release, made.vmlinux, CACHE / "kernel" / "modules"))
    assert {"erofs.ko", "overlay.ko", "virtio_mmio.ko"} <= {modules.file_name(path) for path in order}


@pytest.mark.timeout(600)
def test_a_machine_without_package_lists_fetches_them_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernel._apt

    def as_if_without_lists(work: Path, words: list[str], private: bool, d: object) -> None:
        if not private:
            raise StoreError("there are no lists")
        real(work, words, private, NEVER)

    monkeypatch.setattr(kernel, "_apt", as_if_without_lists)
    kernel._let_apt_write(tmp_path)
    deb = kernel._download(tmp_path, kernel.PACKAGE, NEVER)
    assert kernel._parts(deb, NEVER)[0].startswith("linux-image-")


@pytest.mark.skipif(tools.find_crun() is None, reason="no crun")
def test_crun_runs_from_the_tools_by_their_own_loader_and_libraries(tmp_path: Path) -> None:
    at = tmp_path / "tools"
    at.mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", guest_files().tools, at], check=True)
    try:
        argv = [word.replace(tools.AT, str(at)) for word in tools.CRUN_ARGV]
        said = subprocess.run([*argv, "--version"], capture_output=True, text=True, check=True)
        assert said.stdout.startswith("crun version")
        assert os.access(f"{at}/bin/isolat-init", os.X_OK)
    finally:
        subprocess.run(["umount", at], check=True)


def test_an_empty_disk_can_be_mounted_and_written_to(tmp_path: Path) -> None:
    disk, at = tmp_path / "disk", tmp_path / "mnt"
    blank.copy_sparse(blank.blank(CACHE, 1 << 30), disk)
    at.mkdir()
    subprocess.run(["mount", "-t", "ext4", "-o", f"loop,{blank.MOUNT_OPTIONS}", disk, at], check=True)
    try:
        (at / "file").write_bytes(bytes(1 << 20))
        assert at.stat().st_uid == 0 and shutil.disk_usage(at).free > 900 << 20
    finally:
        subprocess.run(["umount", at], check=True)
    checked = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
