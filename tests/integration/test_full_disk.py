"""A disk that is full: one clear error, and nothing that was there is lost."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator

import pytest

from isolat.linux import mounts
from tests.support import registry
from tests.support.roots import Root

pytestmark = pytest.mark.root

MS_REMOUNT = 0x20
SIZE = 160 << 20


def _archive(size: int) -> bytes:
    """A root file system with one file that can't be compressed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("file")
        member.size = size
        tar.addfile(member, io.BytesIO(os.urandom(size)))
    return out.getvalue()


@pytest.fixture
def small_disk() -> Iterator[Root]:
    root = Root()
    mounts.mount("none", str(root.path), "tmpfs", 0, f"size={SIZE},mode=0711")
    try:
        yield root
    finally:
        root.kill_daemon()
        mounts.umount_below(str(root.path))
        mounts.umount(str(root.path), mounts.MNT_DETACH)
        root.path.rmdir()


@pytest.mark.parametrize(
    "size", [50 << 20, pytest.param(150 << 20, marks=pytest.mark.soak)], ids=["the file system", "the archive"]
)
def test_import_and_pull_say_so_once(small_disk: Root, tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    """With the smaller one the blob finds room and the file system that is made of it does not."""
    root = small_disk
    before = root.cli("import", "-", "small", input=_archive(1 << 20))
    assert before.returncode == 0, before.stderr
    done = root.cli("import", "-", "large", input=_archive(size))
    assert done.returncode == 125
    assert b"no room" in done.stderr and b"defect" not in done.stderr, done.stderr
    assert done.stderr.count(b"isolat:") == 1
    assert root.ok("images", "-q") == "small:latest"
    assert root.ok("system", "check", "--deep") == "all is well"
    assert list((root.path / "images" / "tmp").iterdir()) == []
    with registry.running(tmp_path_factory.mktemp("r") / "registry") as address:
        root.ok("push", "small", f"{address}/small")
        root.ok("rmi", "small")
        filler = root.path / "filler"
        with filler.open("wb") as file:
            file.write(bytes(os.statvfs(root.path).f_bavail * os.statvfs(root.path).f_frsize - (1 << 20)))
        done = root.cli("pull", f"{address}/small")
        assert done.returncode == 125 and b"room" in done.stderr, done.stderr
        assert root.ok("system", "check") == "all is well"
        filler.unlink()
        mounts.mount("none", str(root.path), "tmpfs", MS_REMOUNT, f"size={8 * SIZE}")
        root.ok("pull", f"{address}/small")
    assert root.ok("system", "check", "--deep") == "all is well"
