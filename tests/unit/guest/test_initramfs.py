"""The archive that the kernel unpacks."""

from __future__ import annotations

from pathlib import Path

from isolat.guest import initramfs
from isolat.guest.initramfs import Entry
from isolat.guest.kernel import Kernel
from tests.unit.guest.elves import module_tree


def unpack(data: bytes) -> list[tuple[str, int, bytes]]:
    """Every entry as (name, mode, data), by the kernel's rules; owners and times must be zero."""
    found: list[tuple[str, int, bytes]] = []
    at = 0
    while True:
        assert data[at : at + 6] == b"070701" and at % 4 == 0
        fields = [int(data[at + 6 + i * 8 : at + 14 + i * 8], 16) for i in range(13)]
        assert fields[2] == fields[3] == fields[5] == fields[12] == 0
        size, name_size = fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = (at + 110 + name_size + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert data[start:].strip(b"\0") == b""
            return found
        found.append((name[:-1].decode(), fields[1], data[start : start + size]))
        at = (start + size + 3) & ~3


def test_what_goes_in_comes_out_sorted() -> None:
    content = [Entry("b", 0o100644, b"12345"), Entry("a", 0o040755), Entry("a/c", 0o100755, b"")]
    packed = initramfs.archive(content)
    assert unpack(packed) == [("a", 0o040755, b""), ("a/c", 0o100755, b""), ("b", 0o100644, b"12345")]
    assert len(packed) % 512 == 0
    assert initramfs.archive(reversed(content)) == packed


def test_the_agent_is_the_init_and_modules_are_listed_in_order(tmp_path: Path) -> None:
    needs = {"virtio_mmio": "virtio", "virtio": "", "virtio-rng": "virtio"}
    builtin = ("virtio_console", "virtio_blk", "virtio_net", "erofs", "overlay", "ext4")
    kernel = Kernel("6.1", tmp_path / "vmlinux", module_tree(tmp_path / "m", needs, builtin))
    (tmp_path / "agent").write_bytes(b"AGENT")
    initramfs.build(kernel, tmp_path / "agent", tmp_path / "out")
    found = {name: (mode, data) for name, mode, data in unpack((tmp_path / "out").read_bytes())}
    assert found["init"] == (0o100755, b"AGENT")
    assert found["modules/order"][1] == b"virtio.ko\nvirtio_mmio.ko\nvirtio_rng.ko\n"
    assert found["modules/virtio_rng.ko"][1] == (tmp_path / "m" / "kernel" / "virtio-rng.ko").read_bytes()
    assert {"dev", "proc", "sys", "root"} < found.keys()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_what_only_live_volumes_need_is_in_a_list_of_its_own(tmp_path: Path) -> None:
    needs = {"virtio_mmio": "virtio", "virtio": "", "virtiofs": "fuse,virtio", "fuse": ""}
    builtin = ("virtio_console", "virtio_blk", "virtio_rng", "virtio_net", "erofs", "overlay", "ext4")
    kernel = Kernel("6.1", tmp_path / "vmlinux", module_tree(tmp_path / "m", needs, builtin))
    (tmp_path / "agent").write_bytes(b"AGENT")
    found = {entry.name: entry.data for entry in initramfs.entries(kernel, tmp_path / "agent")}
    assert found["modules/order"] == b"virtio.ko\nvirtio_mmio.ko\n"
    assert found["modules/live"] == b"fuse.ko\nvirtiofs.ko\n"
    assert {"modules/fuse.ko", "modules/virtiofs.ko"} < found.keys()
