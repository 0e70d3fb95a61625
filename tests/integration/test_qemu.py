"""Every dialogue with a real QEMU. Most machines here have no kernel: what is tried is QEMU, not a guest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.errors import StartFailed
from isolat.guest.files import GuestFiles
from isolat.linux import mounts
from isolat.qemu import accel, dialogue, features, jail, pc
from isolat.qemu.argv import TCG_CPU, Machine, microvm_argv, placeholder
from isolat.qemu.qmp import Qmp, QmpRefused
from tests.support.machines import JAIL_UID, Running, memory, seal

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which(features.FULL) is None, reason="needs QEMU"),
    pytest.mark.timeout(60),
]

D_S = 20.0
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x2, 0x1000
EMPTY = Machine(f"/usr/bin/{features.FULL}", "tcg", TCG_CPU, 64)


def d() -> Deadline:
    return Deadline(D_S)


@pytest.fixture
def ram() -> Iterator[int]:
    fd = memory(64)
    yield fd
    os.close(fd)


@pytest.fixture
def machine(ram: int) -> Iterator[Running]:
    """Stopped, without a kernel."""
    with Running(microvm_argv(EMPTY), [ram, None]) as running:
        yield running


@contextlib.contextmanager
def disk(content: bytes = b"x" * 8192, *, write: bool = False) -> Iterator[tuple[int, str]]:
    """A descriptor of a file, and the file."""
    with tempfile.NamedTemporaryFile(prefix="isolat-disk-") as file:
        file.write(content)
        file.flush()
        fd = os.open(file.name, os.O_RDWR if write else os.O_RDONLY)
        try:
            yield fd, file.name
        finally:
            os.close(fd)


def nodes(qmp: Qmp) -> set[str]:
    return {row["node-name"] for row in qmp.execute("query-named-block-nodes", {}, d())}


def drive(qmp: Qmp, device: str) -> dict[str, object]:
    rows = qmp.execute("query-block", {}, d())
    names = (device, f"/machine/peripheral/{device}/virtio-backend")  # of a PCI device the part behind the bus
    found = next(row for row in rows if row["qdev"] in names)
    return dict(found["inserted"])


def opened(machine: Running, path: str) -> int:
    """How many of QEMU's descriptors are this file."""
    fds = Path(f"/proc/{machine.pid}/fd")
    return sum(os.path.realpath(fd) == path for fd in fds.iterdir())


# disks


def test_a_disk_is_swapped_and_taken_out_again(machine: Running) -> None:
    qmp = machine.qmp
    with disk() as (image, path), disk(write=True) as (writable, _):
        dialogue.swap_disk(qmp, "vda", "image", image, True, d())
        dialogue.swap_disk(qmp, "vdb", "disk", writable, False, d())
        assert (drive(qmp, "vda")["node-name"], drive(qmp, "vda")["ro"]) == ("image", True)
        assert (drive(qmp, "vdb")["node-name"], drive(qmp, "vdb")["ro"]) == ("disk", False)
        assert opened(machine, path) >= 1
        dialogue.unplug_disk(qmp, "vda", d())
        assert drive(qmp, "vda")["node-name"] == placeholder("vda")
        assert "image" not in nodes(qmp)


def test_one_disk_follows_another(machine: Running) -> None:
    with disk() as (one, _), disk() as (other, _):
        dialogue.swap_disk(machine.qmp, "vda", "one", one, True, d())
        dialogue.swap_disk(machine.qmp, "vda", "other", other, True, d())
        assert drive(machine.qmp, "vda")["node-name"] == "other"
        assert "one" not in nodes(machine.qmp)


def test_swapping_and_taking_out_twice_is_fine(machine: Running) -> None:
    with disk() as (image, _):
        for _ in range(2):
            dialogue.swap_disk(machine.qmp, "vda", "image", image, True, d())
        for _ in range(2):
            dialogue.unplug_disk(machine.qmp, "vda", d())


def test_a_running_machine_lets_go_of_its_old_disk(machine: Running) -> None:
    dialogue.cont(machine.qmp, d())
    with disk() as (image, path):
        dialogue.swap_disk(machine.qmp, "vda", "image", image, True, d())
        dialogue.unplug_disk(machine.qmp, "vda", d())
        assert opened(machine, path) == 0


def test_a_descriptor_of_the_wrong_mode_is_refused(machine: Running) -> None:
    with disk() as (image, _), pytest.raises(QmpRefused):
        dialogue.swap_disk(machine.qmp, "vdb", "disk", image, False, d())


def test_a_disk_that_is_only_read_can_not_be_put_under_a_writing_device(machine: Running) -> None:
    with disk() as (image, _), pytest.raises(QmpRefused):
        dialogue.swap_disk(machine.qmp, "vdb", "disk", image, True, d())


# states


@pytest.fixture(scope="module")
def template() -> Iterator[tuple[int, int]]:
    """A saved machine's sealed memory and state."""
    ram, state = memory(64), os.memfd_create("state", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    with Running(microvm_argv(replace(EMPTY, share=True)), [ram, None]) as running:
        length = dialogue.save(running.qmp, d(), to=state)
        assert dialogue.status(running.qmp, d()) in ("finish-migrate", "postmigrate")
        dialogue.quit_(running.qmp, d())
        assert running.process.wait(5) == 0
    assert 10_000 < length == os.fstat(state).st_size < 1 << 20
    seal(ram)
    seal(state)
    yield ram, state
    os.close(ram)
    os.close(state)


@contextlib.contextmanager
def cloned(template: tuple[int, int], asked: Machine = EMPTY, root: str = "") -> Iterator[Running]:
    state = os.open(f"/proc/self/fd/{template[1]}", os.O_RDONLY)
    try:
        with Running(microvm_argv(replace(asked, incoming=True)), [template[0], None, state], jail=root) as running:
            yield running
    finally:
        os.close(state)


def test_a_clone_continues_where_its_template_was_saved(template: tuple[int, int]) -> None:
    with cloned(template) as running:
        assert dialogue.status(running.qmp, d()) == "inmigrate"
        dialogue.load(running.qmp, 6, d())
        assert dialogue.status(running.qmp, d()) in ("paused", "prelaunch")
        dialogue.cont(running.qmp, d())
        assert dialogue.status(running.qmp, d()) == "running"
        dialogue.stop(running.qmp, d())
        assert dialogue.status(running.qmp, d()) == "paused"


def test_two_clones_load_the_same_state_at_once(template: tuple[int, int]) -> None:
    with cloned(template) as one, cloned(template) as other:
        for running in (one, other):
            dialogue.load(running.qmp, 6, d())


def test_a_clone_takes_disks(template: tuple[int, int]) -> None:
    with cloned(template) as running, disk() as (image, _):
        dialogue.load(running.qmp, 6, d())
        dialogue.swap_disk(running.qmp, "vda", "image", image, True, d())
        dialogue.cont(running.qmp, d())
        assert drive(running.qmp, "vda")["node-name"] == "image"


@pytest.mark.parametrize("state", [b"", b"\0" * 65536, b"QEVM\0\0\0\3" + b"x" * 4096])
def test_what_is_no_state_ends_qemu_with_its_words(ram: int, state: bytes) -> None:
    with disk(state) as (fd, _), cloned((ram, fd)) as running:
        with pytest.raises(StartFailed, match="QEMU"):
            dialogue.load(running.qmp, 6, d())
        assert running.process.wait(5) != 0
        assert "load of migration failed" in running.words()


def test_sealed_memory_can_not_be_changed(template: tuple[int, int]) -> None:
    with pytest.raises(PermissionError):
        os.pwrite(template[0], b"x", 0)


def test_a_restored_machine_is_small(template: tuple[int, int]) -> None:
    with cloned(template) as running:
        dialogue.load(running.qmp, 6, d())
        assert running.anonymous_mib() < 32


# the monitor


@pytest.mark.parametrize("half", [b'{"execute": "query-st', b'{"execute": "a\\', b'{"x": [[[', b"", b"nonsense"])
def test_a_killed_daemons_conversation_is_taken_up(machine: Running, half: bytes) -> None:
    """Half a request was sent, half a reply was read, and QEMU's end is held by somebody else."""
    with socket.socket(fileno=os.dup(machine.qmp._sock.fileno())) as earlier:
        earlier.settimeout(5)
        earlier.sendall(b'{"execute": "query-status", "id": "old"}\n')
        assert len(earlier.recv(9)) == 9
        earlier.sendall(half)
        with Qmp.connect(socket.socket(fileno=os.dup(earlier.fileno())), d()) as resumed:
            assert dialogue.status(resumed, d()) == "prelaunch"


def test_a_refusal_has_qemus_words(machine: Running) -> None:
    with pytest.raises(QmpRefused, match="no-such-node"):
        machine.qmp.execute("blockdev-del", {"node-name": "no-such-node"}, d())


def test_the_end_is_told(machine: Running) -> None:
    dialogue.quit_(machine.qmp, d())
    assert machine.process.wait(5) == 0
    with pytest.raises(StartFailed, match="QEMU ended"):
        dialogue.status(machine.qmp, d())
    dialogue.quit_(machine.qmp, d())


# the network


@contextlib.contextmanager
def tap() -> Iterator[int]:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EPERM):
            pytest.skip(f"no tap devices here: {error.strerror}")
        raise
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14x", b"isolat-t%d", _IFF_TAP | _IFF_NO_PI))
        yield fd
    finally:
        os.close(fd)


def test_a_network_is_plugged_in_late(template: tuple[int, int]) -> None:
    with cloned(template) as running, tap() as fd:
        dialogue.load(running.qmp, 6, d())
        dialogue.plug_network(running.qmp, fd, d())
        dialogue.cont(running.qmp, d())
        assert dialogue.status(running.qmp, d()) == "running"


# the PC


def test_a_pc_shows_its_screen_and_has_a_power_button() -> None:
    machine = pc.Pc(EMPTY.binary, "tcg", TCG_CPU, 128, disks=(pc.Disk(), pc.Disk(read_only=True)))
    with contextlib.ExitStack() as stack:
        first, _ = stack.enter_context(disk(bytes(1 << 20), write=True))
        second, _ = stack.enter_context(disk())
        with Running(pc.pc_argv(machine), [None, first, second]) as running:
            assert dialogue.status(running.qmp, d()) == "prelaunch"
            assert drive(running.qmp, "vdb")["ro"]
            dialogue.cont(running.qmp, d())
            shot = os.memfd_create("shot")
            try:
                for _ in range(2):
                    dialogue.screendump(running.qmp, shot, d())
                    assert os.pread(shot, 8, 0) == b"\x89PNG\r\n\x1a\n"
            finally:
                os.close(shot)
            dialogue.powerdown(running.qmp, d())
            running.qmp.wait_event("POWERDOWN", lambda _: True, d())


# the jail


@pytest.fixture
def jailed() -> Iterator[tuple[Path, Path]]:
    """A jail and the directory of the guest's files."""
    directory = Path(tempfile.mkdtemp(prefix="isolat-jail-", dir="/tmp"))
    directory.chmod(0o711)
    guest, root = directory / "guest", directory / "jail"
    try:
        jail.ensure(root, guest)
        yield root, guest
    finally:
        jail.remove(root)
        shutil.rmtree(directory)


def test_the_jail_holds_little_and_is_read_only(jailed: tuple[Path, Path]) -> None:
    root, guest = jailed
    (guest / "vmlinux").write_text("x")
    assert {path.name for path in root.iterdir()} >= {"usr", "lib", "dev", "proc", "guest"}
    assert not any((root / name).exists() for name in ("etc", "root", "home", "tmp", "var", "run", "sys"))
    assert {path.name for path in (root / "dev").iterdir()} == {"null", "zero", "random", "urandom"}
    assert (root / "guest/vmlinux").read_text() == "x"
    for path in (root / "x", root / "dev/x", root / "usr/x", root / "guest/x"):
        with pytest.raises(OSError, match="Read-only file system"):
            path.touch()


def test_making_and_removing_the_jail_twice_is_fine(jailed: tuple[Path, Path]) -> None:
    root, guest = jailed
    before = len(mounts.mounts())
    jail.ensure(root, guest)
    assert len(mounts.mounts()) == before
    for _ in range(2):
        jail.remove(root)
    assert not root.exists()
    assert not any(str(root) in entry.target for entry in mounts.mounts())


def test_a_half_made_jail_is_made_again(jailed: tuple[Path, Path]) -> None:
    root, guest = jailed
    mounts.umount(str(root / "usr"))
    jail.ensure(root, guest)
    assert (root / "usr/bin").is_dir()
    assert sum(entry.target == str(root) for entry in mounts.mounts()) == 1


def test_the_jail_gets_what_kvm_needs_when_it_is_needed(jailed: tuple[Path, Path]) -> None:
    if not Path("/dev/kvm").exists():
        pytest.skip("there is no /dev/kvm")
    root, guest = jailed
    jail.ensure(root, guest, kvm=True)
    assert (root / "dev/kvm").stat().st_mode & 0o777 == 0o666
    jail.ensure(root, guest)
    assert (root / "dev/kvm").exists()


def test_qemu_runs_in_the_jail_without_any_right(jailed: tuple[Path, Path], template: tuple[int, int]) -> None:
    with cloned(template, root=str(jailed[0])) as running, disk() as (image, _):
        dialogue.load(running.qmp, 6, d())
        dialogue.swap_disk(running.qmp, "vda", "image", image, True, d())
        dialogue.cont(running.qmp, d())
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{running.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["Uid"].split() == [str(JAIL_UID)] * 4
        assert int(status["CapEff"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert status["NSpid"].split()[-1] == "1"
        assert Path(f"/proc/{running.pid}/root/usr/bin/{features.FULL}").exists()
        assert not Path(f"/proc/{running.pid}/root/etc").exists()


def test_a_machine_outlives_its_jail(jailed: tuple[Path, Path], template: tuple[int, int]) -> None:
    """As when a daemon ends and the next one makes the jail anew, with the unmounting seen by the machine."""
    root, guest = jailed
    jail.remove(root)
    mounts.share(str(root.parent))
    try:
        jail.ensure(root, guest)
        with cloned(template, root=str(root)) as running, disk() as (image, _):
            jail.remove(root)
            dialogue.load(running.qmp, 6, d())
            dialogue.swap_disk(running.qmp, "vda", "image", image, True, d())
            dialogue.cont(running.qmp, d())
            jail.ensure(root, guest)
            assert dialogue.status(running.qmp, d()) == "running"
    finally:
        jail.remove(root)
        mounts.umount(str(root.parent), mounts.MNT_DETACH)


def test_a_jailed_qemu_reads_its_kernel_from_the_guests_files(jailed: tuple[Path, Path], ram: int) -> None:
    """What is there is no kernel, and QEMU has looked at it: it says so."""
    root, guest = jailed
    (guest / "vmlinux").write_bytes(b"\x7fELF" + bytes(4096))
    with pytest.raises(StartFailed) as caught:
        Running(microvm_argv(replace(EMPTY, vmlinux="/guest/vmlinux")), [ram, None], jail=str(root))
    assert "loading elf kernel" in caught.value.__notes__[0]


# what is there


def test_qemu_tells_what_it_can() -> None:
    found = features.find(d())
    assert found.missing("microvm") == ()
    assert found.missing("q35") == ()
    assert found.sandbox
    assert found.version in found.identity


def test_kvm_counts_only_when_a_guest_comes_up(tmp_path: Path) -> None:
    """With files that are no guest it never does, whatever /dev/kvm says."""
    for name in ("vmlinux", "initramfs"):
        (tmp_path / name).write_bytes(b"\x7fELF" + bytes(4096))
    guest = GuestFiles("6.1", tmp_path / "vmlinux", tmp_path / "initramfs", tmp_path / "tools", "none", has_crun=False)
    found = accel.choose(features.find(d()), guest, tmp_path / "accel.json", d())
    assert found.kind == "tcg"
    assert "kvm" in found.reason.lower()
    assert accel.choose(features.find(d()), guest, tmp_path / "accel.json", d()) == found
