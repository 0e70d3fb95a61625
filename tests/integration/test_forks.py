"""Snapshots of real running machines, and machines made from them: the agent and its processes go on in each."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, IllegalState, IsolatError, Lost, Refused, StartFailed
from isolat.guest import blank
from isolat.linux import mounts
from isolat.qemu import dialogue, features, forks, jail, memory
from isolat.qemu.argv import TCG_CPU, Machine, microvm_argv
from isolat.wire import codec
from isolat.wire import kinds as k
from tests.support import machines, qemu
from tests.support.guest import CACHE, guest_files, tsc_khz
from tests.support.machines import Running
from tests.support.qemu import Serial

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not shutil.which(qemu.BINARY), reason="no QEMU"),
    pytest.mark.timeout(600),  # the first one fetches a kernel
]
D_S = 30.0
BOOT_S = 60.0
STATE = 6
CHILDREN = 3
ANSWER_MS, ANSWER_MS_PER_MIB, STOPPED_MS = 150.0, 2.0, 50.0
IMAGE = "/run/isolat/image"
DISK = f"{IMAGE}/tmp/disk"
MS_RDONLY, MS_NOATIME, MS_BIND = 1, 1024, 4096
PROGRAMS = ("sh", "cat", "head", "sha256sum", "sync")
# Counts in its own memory, and looks whether a megabyte of it is still what it was.
COUNTER = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(void)
{
    enum { N = 1 << 18 };
    unsigned *own = malloc(N * sizeof *own), bad = 0;
    int fd = open("/tmp/count", O_RDWR | O_CREAT | O_TRUNC, 0600);
    for (unsigned i = 0; i < N; i++)
        own[i] = i * 2654435761u;
    for (unsigned n = 0;; n++) {
        for (unsigned i = n % 64; i < N; i += 64)
            bad += own[i] != i * 2654435761u;
        char line[64];
        pwrite(fd, line, snprintf(line, sizeof line, "%10u %u\n", n, bad), 0);
        usleep(10000);
    }
}
"""


def d() -> Deadline:
    return Deadline(D_S)


@dataclass(frozen=True)
class Template:
    machine: Machine
    ram: int
    state: int
    image: Path

    @property
    def inode(self) -> memory.Inode:
        return memory.Inode.of(self.ram)


@dataclass(frozen=True)
class Snapshot:
    state: int
    delta: int
    captured: forks.Captured


class Guest:
    """A running machine, spoken with as its keeper would."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.c = Serial(running.agent)
        self.answer_ms = 0.0  # of a child: from before its QEMU was started

    def hello(self) -> None:
        answer = self.c.answer(self.c.send(k.HELLO, [(k.T_VERSION, k.VERSION), (k.T_ROLE, "keeper")]), BOOT_S)
        assert answer.text(k.T_ROLE) == "agent"

    def resume(self, name: str) -> None:
        self.c.ask(k.RESUME, [(k.T_DATA, os.urandom(64)), (k.T_TIME, time.time_ns()), (k.T_HOST, name)])

    def mount(self, source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
        if not target.startswith(f"{IMAGE}/") or target == DISK:  # it has its directories
            self.c.step(1, [(k.T_PATH, target.encode()), (k.T_MODE, 0o755)])
        self.c.step(3, [
            (k.T_SOURCE, source.encode()), (k.T_TARGET, target.encode()), (k.T_FSTYPE, kind), (k.T_COUNT, flags),
            (k.T_OPTIONS, options.encode()),
        ])  # fmt: skip

    def furnish(self) -> None:
        """A root to run programs in."""
        self.mount("/dev/vda", IMAGE, "erofs", MS_RDONLY)
        self.mount("/dev", f"{IMAGE}/dev", "none", MS_BIND)
        self.mount("tmp", f"{IMAGE}/tmp", "tmpfs", options="mode=1777")

    def start(self, number: int, *argv: str) -> None:
        self.c.start(number, argv, [(k.T_ROOT, IMAGE.encode())])

    def run(self, number: int, script: str) -> str:
        """What a shell says."""
        self.start(number, "sh", "-c", script)
        code, out, err = self.c.finish(number)
        assert code == 0, err
        return out.decode().strip()

    def read(self, path: str) -> str:
        fields: codec.Fields = [(k.T_PATH, path.encode()), (k.T_OFFSET, 0), (k.T_COUNT, 4096)]
        return self.c.ask(k.READ, fields).bytes(k.T_DATA).decode().strip()

    def count(self) -> int:
        n, bad = self.read(f"{IMAGE}/tmp/count").split()
        assert bad == "0"
        return int(n)

    def uuid(self) -> str:
        return self.read("/proc/sys/kernel/random/uuid")

    def capture(self, template: Template, disks: tuple[forks.DiskCopy, ...] = ()) -> Snapshot:
        state, delta = (os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for name in ("state", "delta"))
        running = self.running
        captured = forks.capture(running.qmp, running.pid, template.inode, state, delta, d(), disks=disks)
        return Snapshot(state, delta, captured)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    directory = tmp_path_factory.mktemp("forks")
    image, counter = directory / "image.erofs", directory / "counter"
    subprocess.run(["gcc", "-O1", "-static", "-w", "-xc", "-", "-o", counter], input=COUNTER, text=True, check=True)
    qemu.make_image(image, (*PROGRAMS, str(counter)))
    files = guest_files()
    machine = Machine(
        f"/usr/bin/{features.FULL}", "tcg", TCG_CPU, 128,
        tsc_khz=tsc_khz(), vmlinux=str(files.vmlinux), initramfs=str(files.initramfs),
    )  # fmt: skip
    ram, state = machines.memory(128), os.memfd_create("state", os.MFD_CLOEXEC)
    with Running(microvm_argv(replace(machine, share=True)), [ram, None]) as running:
        dialogue.cont(running.qmp, d())
        guest = Guest(running)
        guest.hello()
        guest.c.ask(k.SETTLE)
        dialogue.save(running.qmp, d(), to=state)
    machines.seal(ram)
    yield Template(machine, ram, state, image)
    os.close(ram)
    os.close(state)


@contextlib.contextmanager
def waiting(template: Template, state: int, root: str = "") -> Iterator[Running]:
    """A QEMU that waits for this state."""
    opened = os.open(f"/proc/self/fd/{state}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        argv = microvm_argv(replace(template.machine, incoming=True))
        with Running(argv, [template.ram, None, opened], jail=root) as running:
            yield running
    finally:
        os.close(opened)


def swap(running: Running, device: str, path: Path, *, read_only: bool) -> None:
    fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        dialogue.swap_disk(running.qmp, device, f"my-{device}", fd, read_only, d())
    finally:
        os.close(fd)


@contextlib.contextmanager
def parent(template: Template, disk: Path | None = None, root: str = "") -> Iterator[Guest]:
    """A clone of the template with a counter in it that has counted."""
    with waiting(template, template.state, root) as running:
        dialogue.load(running.qmp, STATE, d())
        swap(running, "vda", template.image, read_only=True)
        if disk:
            swap(running, "vdb", disk, read_only=False)
        dialogue.cont(running.qmp, d())
        guest = Guest(running)
        guest.hello()
        guest.resume("parent")
        guest.furnish()
        if disk:
            guest.mount("/dev/vdb", DISK, "ext4", MS_NOATIME, "noinit_itable")
        guest.start(1, "counter")
        until_it_counts(guest, 3)
        yield guest


def until_it_counts(guest: Guest, to: int) -> None:
    ends = Deadline(D_S)
    while True:
        with contextlib.suppress(Exception):
            if guest.count() >= to:
                return
        ends.check("the counter")
        time.sleep(0.01)


@contextlib.contextmanager
def child(template: Template, snapshot: Snapshot, disk: Path | None = None, root: str = "") -> Iterator[Guest]:
    """A machine from a snapshot that has answered."""
    begun = time.monotonic()
    with waiting(template, snapshot.state, root) as running:
        forks.restore(running.qmp, running.pid, template.inode, STATE, snapshot.delta, d())
        assert dialogue.status(running.qmp, d()) == "paused"
        swap(running, "vda", template.image, read_only=True)
        if disk:
            swap(running, "vdb", disk, read_only=False)
        dialogue.cont(running.qmp, d())
        guest = Guest(running)
        guest.hello()
        guest.answer_ms = 1000 * (time.monotonic() - begun)
        guest.resume("child")
        yield guest


def close(snapshot: Snapshot) -> None:
    os.close(snapshot.state)
    os.close(snapshot.delta)


@pytest.mark.parametrize("mib", [1, 10, 40])
def test_children_go_on_where_their_parent_was(template: Template, mib: int) -> None:
    with parent(template) as guest:
        said = guest.run(2, f"head -c {mib << 20} /dev/urandom >/tmp/big; sha256sum /tmp/big")
        before = guest.count()
        snapshot = guest.capture(template)
        after = guest.count()
        answers: list[float] = []
        seen = {guest.uuid()}
        for _ in range(CHILDREN):
            with child(template, snapshot) as one:
                answers.append(one.answer_ms)
                assert before <= one.count() <= after + 10
                until_it_counts(one, after + 20)
                assert one.run(10, "sha256sum /tmp/big") == said
                seen.add(one.uuid())
                assert one.read("/proc/sys/kernel/hostname") == "child"
                own_mib = one.running.anonymous_mib()
        until_it_counts(guest, after + 20)
        assert guest.read("/proc/sys/kernel/hostname") == "parent"
        assert guest.run(3, "sha256sum /tmp/big") == said
        assert len(seen) == CHILDREN + 1
    close(snapshot)
    captured = snapshot.captured
    print(
        f"{mib} MiB: delta {captured.own_bytes / 2**20:.1f} MiB in {captured.runs} runs, state {captured.state_bytes} "
        f"bytes, ahead {captured.ahead_ms:.0f} ms, stopped {captured.stopped_ms:.1f} ms; first answers "
        f"{', '.join(f'{ms:.0f}' for ms in answers)} ms, {own_mib:.0f} MiB"
    )
    assert captured.own_bytes >= mib << 20
    assert captured.stopped_ms <= STOPPED_MS
    assert min(answers) <= ANSWER_MS + ANSWER_MS_PER_MIB * mib


def test_a_disk_is_as_it_was_in_the_same_moment(template: Template, tmp_path: Path) -> None:
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    blank.copy_sparse(blank.blank(CACHE, 64 << 20), disk)
    disk.chmod(0o600)
    with parent(template, disk) as guest, disk.open("rb") as source, copy.open("wb") as target:
        old = guest.run(2, "head -c 3000000 /dev/urandom >/tmp/disk/old; sync; sha256sum /tmp/disk/old")
        new = guest.run(3, "head -c 2000000 /dev/urandom >/tmp/disk/new; sha256sum /tmp/disk/new")
        snapshot = guest.capture(template, (forks.DiskCopy(source.fileno(), target.fileno()),))
        guest.run(4, "echo more >/tmp/disk/old; echo parent >/tmp/disk/of; sync")
        with child(template, snapshot, copy) as one:
            assert one.run(10, "sha256sum /tmp/disk/old") == old
            assert one.run(11, "sha256sum /tmp/disk/new") == new
            assert one.run(12, "echo child >/tmp/disk/mine; cat /tmp/disk/*e; sync") == "child"
            one.c.step(3, [(k.T_TARGET, DISK.encode())], revert=True)
            one.c.ask(k.SETTLE)
        assert guest.run(5, "cat /tmp/disk/of") == "parent"
    close(snapshot)
    checked = subprocess.run(["e2fsck", "-fn", copy], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert copy.stat().st_size == disk.stat().st_size
    assert copy.stat().st_blocks * 512 < 32 << 20
    print(f"stopped {snapshot.captured.stopped_ms:.1f} ms")


def test_a_child_has_children(template: Template) -> None:
    with parent(template) as guest:
        snapshot = guest.capture(template)
        with child(template, snapshot) as one:
            said = one.run(10, "head -c 2000000 /dev/urandom >/tmp/of; sha256sum /tmp/of")
            count = one.count()
            second = one.capture(template)
            with child(template, second) as other:
                assert other.run(11, "sha256sum /tmp/of") == said
                assert other.count() >= count
            close(second)
    close(snapshot)


def descriptors(pid: int) -> list[str]:
    """What this process has open."""
    return sorted(str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir())


def test_qemu_keeps_nothing_of_the_copies_that_were_taken(template: Template, tmp_path: Path) -> None:
    """Neither a descriptor of what a snapshot on disk is, nor any other one more than before."""
    with parent(template) as guest:
        before = descriptors(guest.running.pid)
        for n in range(5):
            kept = tmp_path / f"state-{n}"
            with kept.open("wb+") as file:
                delta = os.memfd_create("delta", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                running = guest.running
                seen: list[list[str]] = []
                with watched(running, seen):
                    captured = forks.capture(running.qmp, running.pid, template.inode, file.fileno(), delta, d())
                os.close(delta)
            assert kept.stat().st_size == captured.state_bytes > 0
            assert seen, "nothing was looked at while the machine stood still"
            assert not any(str(kept) in names for names in seen), "QEMU could write to the snapshot's own file"
        assert descriptors(guest.running.pid) == before


def test_where_there_is_no_room_nothing_is_copied(template: Template, tmp_path: Path) -> None:
    """It is asked for before, and told how much: the machine's own pages are counted without being read."""
    asked: list[tuple[int, int, int]] = []

    def none(*wanted: int) -> None:
        asked.append((wanted[0], wanted[1], wanted[2]))
        raise Refused("there is no room")

    disk = tmp_path / "disk"
    disk.write_bytes(bytes(range(256)) * 4096)
    with parent(template) as guest, disk.open("rb") as source, (tmp_path / "copy").open("wb") as target:
        guest.run(2, f"head -c {20 << 20} /dev/urandom >/tmp/big")
        state, delta = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("state", "delta"))
        disks, running = (forks.DiskCopy(source.fileno(), target.fileno()),), guest.running
        with pytest.raises(Refused):
            forks.capture(running.qmp, running.pid, template.inode, state, delta, d(), disks=disks, room=none)
        (now, altogether, of_disk), *more = asked
        assert not more
        assert now == altogether >= 20 << 20
        assert of_disk in (0, disk.stat().st_blocks * 512)  # 0: the file system shares its blocks
        assert os.fstat(state).st_blocks == os.fstat(delta).st_blocks == 0
        assert of_disk == 0 or not os.fstat(target.fileno()).st_blocks
        until_it_counts(guest, guest.count() + 3)
        os.close(state)
        os.close(delta)


def test_what_the_guest_writes_meanwhile_is_asked_for_too(template: Template) -> None:
    asked: list[tuple[int, int, int]] = []
    with parent(template) as guest:
        state, delta = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("state", "delta"))

        def room(*wanted: int) -> None:
            asked.append((wanted[0], wanted[1], wanted[2]))
            if len(asked) == 2:  # the first copy is about to be made
                guest.run(2, f"head -c {8 << 20} /dev/urandom >/tmp/big")

        running = guest.running
        captured = forks.capture(running.qmp, running.pid, template.inode, state, delta, d(), room=room)
        assert asked[-1][0] >= 8 << 20
        assert asked[-1][1] == captured.own_bytes
        os.close(state)
        os.close(delta)


@contextlib.contextmanager
def watched(running: Running, seen: list[list[str]]) -> Iterator[None]:
    """What it has open after everything that it is asked."""
    execute = running.qmp.execute

    def asked(*args: Any) -> Any:
        answer = execute(*args)
        seen.append(descriptors(running.pid))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.qmp, "execute", asked)
        yield


def test_it_works_for_a_machine_without_rights(template: Template, tmp_path: Path) -> None:
    """In its jail, as a user of its own, QEMU can make no file and start no process."""
    root = tmp_path / "jail"
    try:
        jail.ensure(root, CACHE)
        with parent(template, root=str(root)) as guest:
            snapshot = guest.capture(template)
            with child(template, snapshot, root=str(root)) as one:
                until_it_counts(one, guest.count())
        close(snapshot)
    finally:
        jail.remove(root)
        assert not mounts.is_mountpoint(str(root))


def test_a_paused_machine_stays_paused(template: Template) -> None:
    with parent(template) as guest:
        dialogue.stop(guest.running.qmp, d())
        snapshot = guest.capture(template)
        assert dialogue.status(guest.running.qmp, d()) == "paused"
        dialogue.cont(guest.running.qmp, d())
        with child(template, snapshot) as one:
            until_it_counts(one, guest.count())
    close(snapshot)


def attempt(template: Template, guest: Guest, state: int, deadline: Deadline) -> None:
    delta = os.memfd_create("delta", os.MFD_CLOEXEC)
    try:
        forks.capture(guest.running.qmp, guest.running.pid, template.inode, state, delta, deadline)
    finally:
        os.close(delta)


def test_a_machine_goes_on_when_its_snapshot_fails(template: Template) -> None:
    full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    with parent(template) as guest:
        for state, deadline, error in ((full, d(), StartFailed), (guest_state(), Deadline(0.003), DeadlineExceeded)):
            with pytest.raises(error):
                attempt(template, guest, state, deadline)
            os.close(state)
            assert dialogue.status(guest.running.qmp, d()) == "running"
        until_it_counts(guest, guest.count() + 3)


def guest_state() -> int:
    return os.memfd_create("state", os.MFD_CLOEXEC)


def test_what_can_not_be_a_parent_is_refused(template: Template) -> None:
    state = guest_state()
    with waiting(template, template.state) as running, pytest.raises(IllegalState):
        attempt(template, Guest(running), state, d())
    with parent(template) as guest:
        other = replace(template, ram=machines.memory(128))
        with pytest.raises(StartFailed, match="not mapped"):
            attempt(other, guest, state, d())
        os.close(other.ram)
    os.close(state)


def test_a_machine_that_is_gone_is_told(template: Template) -> None:
    state = guest_state()
    with parent(template) as guest:
        os.kill(guest.running.pid, 9)
        with pytest.raises((Lost, StartFailed)) as caught:
            attempt(template, guest, state, d())
        assert isinstance(caught.value, IsolatError)
    os.close(state)


def test_a_delta_of_another_size_is_refused(template: Template) -> None:
    delta = os.memfd_create("delta", os.MFD_CLOEXEC)
    memory.write_table(delta, 64 << 20, [(0, memory.PAGE)])
    with waiting(template, template.state) as running, pytest.raises(StartFailed, match="no difference"):
        forks.restore(running.qmp, running.pid, template.inode, STATE, delta, d())
    os.close(delta)


# disks without a machine

MIB = 1 << 20


def sparse(path: Path, size_mib: int, data: dict[int, bytes]) -> None:
    with path.open("wb") as file:
        file.truncate(size_mib * MIB)
        for mib, content in data.items():
            file.seek(mib * MIB)
            file.write(content)


def copied(source: Path, target: Path, deadline: Deadline) -> None:
    with source.open("rb") as one, target.open("r+b" if target.exists() else "w+b") as other:
        forks.copy_disk(one.fileno(), other.fileno(), deadline)


@pytest.mark.parametrize("data", [{}, {0: b"a" * MIB}, {3: b"b" * MIB, 7: b"c" * 5000}, {15: b"d" * MIB}])
def test_a_copied_disk_has_its_data_and_its_holes(tmp_path: Path, data: dict[int, bytes]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    sparse(source, 16, data)
    copied(source, target, d())
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks


def test_a_disk_copied_again_loses_what_was_discarded(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    sparse(source, 16, {1: b"old" * 100_000, 4: b"gone" * 100_000, 9: b"end" * 100_000})
    copied(source, target, d())
    source.unlink()
    sparse(source, 12, {1: b"new" * 100_000, 6: b"more" * 100_000})
    copied(source, target, d())
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks


def test_a_disk_goes_to_another_file_system(tmp_path: Path) -> None:
    source = tmp_path / "source"
    sparse(source, 16, {2: b"x" * MIB})
    target = os.memfd_create("target", os.MFD_CLOEXEC)
    with source.open("rb") as one:
        forks.copy_disk(one.fileno(), target, d())
    assert os.pread(target, 16 * MIB, 0) == source.read_bytes()
    os.close(target)


def test_a_disk_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    sparse(tmp_path / "source", 1, {0: b"x" * 5000})
    with pytest.raises(DeadlineExceeded):
        copied(tmp_path / "source", tmp_path / "target", Deadline(0))


def test_a_target_that_is_only_read_is_refused(tmp_path: Path) -> None:
    sparse(tmp_path / "source", 1, {})
    with (tmp_path / "source").open("rb") as one, pytest.raises(StartFailed, match="copying a disk"):
        forks.copy_disk(one.fileno(), one.fileno(), d())
