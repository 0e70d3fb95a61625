"""A whole PC from an image: its disk is made, boots from firmware to a login prompt, runs, shows and ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.errors import StoreError, Unsupported
from isolat.guest import blank
from isolat.images import disk, disks
from isolat.images.bootstrap import SYSTEMD
from isolat.images.store import ImageStore
from isolat.linux import mounts
from isolat.qemu import argv, dialogue, pc
from isolat.wire import kinds as k
from tests.support.guest import NATIVE
from tests.support.images import share, source_root
from tests.support.machines import Running
from tests.support.qemu import BINARY, Serial

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not shutil.which(BINARY), reason="no QEMU"),
    pytest.mark.timeout(600),  # the first one makes an image and fetches a kernel
]
DISKS = source_root() / "disks"
AGENT = NATIVE / "isolat-agent"
SIZE = 2 << 30
BOOT_S = 90.0
END_S = 30.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The digest of an image with systemd, and where it is mounted."""
    root = tmp_path_factory.mktemp("pc")
    digest = share(root, SYSTEMD)
    store = ImageStore(root)
    yield digest, store.mount(digest)
    store.unmount_all()


@pytest.fixture(scope="module")
def base(image: tuple[str, Path]) -> Path:
    digest, mount = image
    return disks.ensure(DISKS, digest, mount, AGENT, SIZE)


@contextlib.contextmanager
def _partition(base: Path, into: Path) -> Iterator[Path]:
    """The partition's bytes in a file of their own, for the tools of e2fsprogs; it is large and goes at the end."""
    argv = ["dd", f"if={base}", f"of={into}", "bs=1M", "skip=1", "conv=sparse", "status=none"]
    try:
        subprocess.run(argv, check=True, timeout=60)
        yield into
    finally:
        into.unlink(missing_ok=True)


def _check(base: Path, into: Path) -> None:
    with _partition(base, into) as partition:
        subprocess.run(["e2fsck", "-fn", partition], check=True, capture_output=True, timeout=60)


def _debugfs(partition: Path, request: str) -> str:
    done = subprocess.run(["debugfs", "-R", request, partition], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_the_file_system_is_whole_and_has_the_owners_and_modes_of_the_image(base: Path, tmp_path: Path) -> None:
    _check(base, tmp_path / "partition")
    with _partition(base, tmp_path / "partition") as partition:
        assert "Mode:  04755" in _debugfs(partition, "stat /usr/bin/passwd")
        mail = _debugfs(partition, "stat /var/mail")
        assert "Mode:  02775" in mail and "Group:     8" in mail
        assert 'Fast link dest: "/dev/null"' in _debugfs(partition, "stat /etc/systemd/system/apt-daily.timer")
        assert "Mode:  0755" in _debugfs(partition, f"stat /{disk.AGENT}")


def test_a_disk_is_made_once_and_is_sparse(base: Path, image: tuple[str, Path]) -> None:
    before = base.stat()
    assert disks.ensure(DISKS, image[0], image[1], AGENT, SIZE) == base
    assert base.stat().st_mtime_ns == before.st_mtime_ns
    assert before.st_size == SIZE and before.st_blocks * 512 < SIZE // 3
    assert before.st_mode & 0o777 == 0o400 and before.st_uid == 0


def test_a_disk_that_is_too_small_says_so_and_leaves_nothing(image: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="file system") as caught:
        disk.build_disk(image[1], DISKS / "kernel", AGENT, tmp_path / "disk", 64 << 20)
    assert caught.value.details and "--disk" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    assert not [entry for entry in mounts.mounts() if entry.target.startswith(str(tmp_path))]


def test_an_image_without_an_init_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    with pytest.raises(Unsupported, match="no systemd"):
        disks.ensure(tmp_path / "disks", "0" * 64, tmp_path / "image", AGENT, SIZE)
    assert not (tmp_path / "disks").exists()


def _boot(own: Path) -> tuple[Running, Serial]:
    """The PC with this disk, once its agent has answered."""
    machine = pc.Pc(BINARY, "tcg", argv.TCG_CPU, 512)
    descriptor = os.open(own, os.O_RDWR | os.O_CLOEXEC)
    try:
        running = Running(pc.pc_argv(machine), [None, descriptor])
    finally:
        os.close(descriptor)
    dialogue.cont(running.qmp, Deadline(10))
    agent = Serial(running.agent)
    hello = agent.answer(agent.send(k.HELLO, [(k.T_VERSION, k.VERSION), (k.T_ROLE, "keeper")]), BOOT_S)
    assert hello.text(k.T_ROLE) == "agent", running.words()
    return running, agent


def _lit(png: bytes) -> int:
    """How many bytes of an RGB picture are not black (PNG, section 5: length, type, data, check)."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, packed = 8, b""
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        if png[at + 4 : at + 8] == b"IDAT":
            packed += png[at + 8 : at + 8 + length]
        at += length + 12
    return sum(1 for byte in zlib.decompress(packed) if byte)


def _wait_for_words(running: Running, text: str) -> None:
    end = time.monotonic() + BOOT_S
    while text not in running.words():
        assert time.monotonic() < end, running.words()
        time.sleep(0.1)


@pytest.fixture
def own(base: Path, tmp_path: Path) -> Iterator[Path]:
    """A machine's own copy of the disk."""
    path = tmp_path / "disk"
    blank.copy_sparse(base, path)
    path.chmod(0o600)
    yield path
    path.unlink()


@pytest.mark.soak
def test_a_pc_boots_to_its_login_prompt_runs_shows_and_is_switched_off(own: Path, tmp_path: Path) -> None:
    running, agent = _boot(own)
    with running:
        agent.start(1, ["sh", "-c", "cat /proc/1/comm; uname -r; stat -f -c %T /; id -u"])
        assert agent.finish(1) == (0, f"systemd\n{_release()}\next2/ext3\n0\n".encode(), b"")
        _wait_for_words(running, " login: ")
        picture = tmp_path / "screen.png"
        with picture.open("wb") as file:
            dialogue.screendump(running.qmp, file.fileno(), Deadline(20))
        assert _lit(picture.read_bytes()) > 500
        dialogue.powerdown(running.qmp, Deadline(10))
        assert running.process.wait(END_S) == 0, running.words()
    _check(own, tmp_path / "partition")


def _release() -> str:
    return disk.find_kernel(DISKS / "kernel").release
