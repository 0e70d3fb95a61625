"""The bootable disk: what is put where, without making one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from isolat.errors import StoreError, Unsupported
from isolat.images import disk, disks, grub, units
from tests.unit.guest.elves import RELEASE, bzimage, module_tree

MIB = 1 << 20


def _boot() -> bytes:
    """A boot.img: 512 bytes, whose address of the next part is sector 1."""
    image = bytearray(b"\xeb" * 512)
    struct.pack_into("<Q", image, 0x5C, 1)
    return bytes(image)


def _core(sectors: int, start: int = 2) -> bytes:
    """A core.img: its first sector ends with where the others are."""
    return bytes(500) + struct.pack("<QHH", start, sectors - 1, 0x820) + b"\xcc" * (512 * (sectors - 1))


def test_the_partition_is_active_and_reaches_from_one_mib_to_the_end() -> None:
    sector = grub.mbr(_boot(), 64 * MIB, 0x01020304)
    assert len(sector) == 512 and sector[510:] == b"\x55\xaa"
    assert sector[440:446] == b"\x04\x03\x02\x01\0\0"
    active, kind, first, count = struct.unpack("<B3xB3xII", sector[446:462])
    assert (active, kind, first, count) == (0x80, 0x83, 2048, 64 * 2048 - 2048)
    assert sector[462:510] == bytes(48)


@pytest.mark.parametrize("size", [0, MIB, 1 << 41])
def test_a_disk_that_a_bios_table_cannot_tell_of_is_refused(size: int) -> None:
    with pytest.raises(StoreError, match="partition table"):
        grub.mbr(_boot(), size, 0)


def test_the_boot_loader_lies_in_a_row_up_to_the_partition() -> None:
    area = grub.embed(grub.mbr(_boot(), 64 * MIB, 0), _core(100))
    assert len(area) == MIB
    assert area[512 : 101 * 512] == _core(100) and not any(area[101 * 512 :])


@pytest.mark.parametrize("core", [_core(2048), _core(100, start=3), _core(100)[:-512] + bytes(2048)])
def test_a_boot_loader_that_would_not_find_itself_is_refused(core: bytes) -> None:
    with pytest.raises(StoreError):
        grub.embed(grub.mbr(_boot(), 64 * MIB, 0), core)


def test_the_kernel_is_started_at_once() -> None:
    lines = grub.configuration("root=/dev/vda1 quiet").splitlines()
    assert lines[0] == "set timeout=0"
    assert "    linux16 /boot/vmlinuz root=/dev/vda1 quiet" in lines


def test_nothing_is_both_a_file_and_a_link() -> None:
    files, links = units.files("/dev/vda1"), units.links()
    assert not set(files) & set(links)
    assert all(not name.startswith("/") for name in (*files, *links))
    assert files["etc/fstab"] == "/dev/vda1 / ext4 rw,noatime 0 0\n"


def test_the_agent_and_two_terminals_are_started_and_no_unit_of_those_is_masked() -> None:
    links = units.links()
    assert links["etc/systemd/system/multi-user.target.wants/isolat-agent.service"].endswith("isolat-agent.service")
    assert {name.rpartition("/")[2] for name in links if "getty.target.wants" in name} == {
        "getty@tty1.service",
        "serial-getty@ttyS0.service",
    }
    masked = {name.rpartition("/")[2] for name, target in links.items() if target == "/dev/null"}
    assert not masked & {"isolat-agent.service", "getty.target", "systemd-logind.service", "dbus.service"}
    assert "ExecStart=/" + disk.AGENT + " --service\n" in units.files("x")[f"etc/systemd/system/{units.AGENT_UNIT}"]


def test_the_key_changes_with_all_that_goes_into_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    keys = {
        disk.key("d", "r", one, MIB),
        disk.key("e", "r", one, MIB),
        disk.key("d", "s", one, MIB),
        disk.key("d", "r", other, MIB),
        disk.key("d", "r", one, 2 * MIB),
    }
    assert len(keys) == 5
    before = disk.key("d", "r", one, MIB)
    assert before in keys
    monkeypatch.setattr(units, "MASKED", ())
    assert disk.key("d", "r", one, MIB) != before


def test_an_image_without_systemd_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        disk.check(tmp_path)
    assert "isolat image bootstrap debian-systemd" in caught.value.hint


@pytest.mark.parametrize("where", ["lib", "usr/lib"])
def test_the_init_is_where_the_image_has_it(tmp_path: Path, where: str) -> None:
    path = tmp_path / where / "systemd/systemd"
    path.parent.mkdir(parents=True)
    path.touch()
    assert disk.init_of(tmp_path) == f"/{where}/systemd/systemd"


@pytest.mark.parametrize(
    ("image", "modules"), [("boot/vmlinuz-" + RELEASE, f"lib/modules/{RELEASE}"), ("vmlinuz", "modules")]
)
def test_a_kernel_is_found_in_a_package_and_in_what_was_fetched(tmp_path: Path, image: str, modules: str) -> None:
    (tmp_path / image).parent.mkdir(exist_ok=True)
    (tmp_path / image).write_bytes(bzimage())
    (tmp_path / modules).mkdir(parents=True)
    assert disk.find_kernel(tmp_path) == disk.PcKernel(RELEASE, tmp_path / image, tmp_path / modules)


def test_no_kernel_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    with pytest.raises(StoreError, match="no kernel with its modules"):
        disk.find_kernel(tmp_path)


def test_the_initrd_holds_the_modules_in_order_and_says_where_the_root_is(tmp_path: Path) -> None:
    needs = {"virtio_blk": "virtio", "virtio_pci": "virtio", "virtio_console": "", "virtio": "", "ext4": ""}
    tree = module_tree(tmp_path / "modules", needs)
    agent = tmp_path / "agent"
    agent.write_bytes(b"THE AGENT")
    made = disk.initrd(disk.PcKernel(RELEASE, tmp_path, tree), agent, "/lib/systemd/systemd")
    assert b"/dev/vda1 ext4 - /lib/systemd/systemd\n" in made
    assert b"THE AGENT" in made
    assert b"virtio.ko\nvirtio_pci.ko\nvirtio_blk.ko\next4.ko\nvirtio_console.ko\n" in made


def test_file_system_and_overlay_are_made_by_a_confined_child() -> None:
    program = disk.mkfs_argv(Path("/w/out/disk"), Path("/w/root"), 64 * MIB)
    assert program[-2:] == ["/w/out/disk", f"{63 << 10}k"]
    assert "offset=1048576" in program[program.index("-E") + 1]
    argv = disk.overlaid_argv(Path("/i:1"), Path("/w/added"), Path("/w/root"), Path("/w/out"), program)
    assert argv[:4] == ["setpriv", "--pdeathsig", "KILL", "--"]
    assert "ro,nodev,lowerdir=/w/added:/i\\:1" in argv
    assert argv[argv.index("--write") + 1] == "/w/out" and "--user" in argv


def test_a_layer_that_cannot_be_named_is_refused() -> None:
    with pytest.raises(StoreError, match="comma"):
        disk.overlaid_argv(Path("/a,b"), Path("/w"), Path("/r"), Path("/o"), [])


def test_disks_of_images_that_have_gone_are_removed(tmp_path: Path) -> None:
    digests = ["a" * 64, "b" * 64]
    for digest in digests:
        (tmp_path / f"{digest[:16]}-4096-k.disk").touch()
    assert disks.prune(tmp_path, [digests[0]]) == 1
    assert [path.name for path in tmp_path.iterdir()] == [f"{'a' * 16}-4096-k.disk"]
