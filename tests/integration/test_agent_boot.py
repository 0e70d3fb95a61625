"""The agent as PID 1 of a real machine (QEMU's microvm, emulated): its boot, and all that the protocol lets it do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.guest import blank, kernel, tools
from isolat.wire import codec
from isolat.wire import kinds as k
from tests.support import qemu
from tests.support.guest import CACHE, guest_files, tsc_khz
from tests.support.qemu import Machine, Serial
from tests.unit.native.wireside import Gone, Refused, wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not shutil.which(qemu.BINARY), reason="no QEMU"),
    pytest.mark.timeout(600),  # the first one fetches a kernel
]
BOOT_S = 60.0
MS_RDONLY, MS_NOATIME, MS_BIND = 1, 1024, 4096
IMAGE, DISK, ROOT = "/run/isolat/image", "/run/isolat/disk", "/run/isolat/rootfs"
ALARM = "#include <unistd.h>\nint main(void) { alarm(1000); return pause(); }\n"
PROGRAMS = ("sh", "cat", "sleep", "head", "stty", "id")


class Guest:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.c = Serial(machine.agent)
        hello = self.c.answer(self.c.send(k.HELLO, [(k.T_VERSION, k.VERSION), (k.T_ROLE, "keeper")]), BOOT_S)
        assert (hello.text(k.T_ROLE), hello.int(k.T_PID)) == ("agent", 1), machine.words
        self.boot_s = time.monotonic() - machine.started_at_s

    def read(self, path: str, count: int = 65536) -> bytes:
        fields: codec.Fields = [(k.T_PATH, path.encode()), (k.T_OFFSET, 0), (k.T_COUNT, count)]
        return self.c.ask(k.READ, fields).bytes(k.T_DATA)

    def mount(self, source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
        self.mkdir(target)
        self.c.step(3, [
            (k.T_SOURCE, source.encode()), (k.T_TARGET, target.encode()), (k.T_FSTYPE, kind), (k.T_COUNT, flags),
            (k.T_OPTIONS, options.encode()),
        ])  # fmt: skip

    def mkdir(self, path: str) -> None:
        self.c.step(1, [(k.T_PATH, path.encode()), (k.T_MODE, 0o755)])

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self.c.step(2, [(k.T_PATH, path.encode()), (k.T_DATA, data), (k.T_MODE, mode)])

    def run(self, *argv: str) -> None:
        self.c.step(6, [*((k.T_ARGV, word.encode()) for word in argv), (k.T_ENV, b"PATH=/bin")])

    def idle(self) -> int:
        return self.c.ask(k.IDLE).int(k.T_COUNT, -2)

    def resume(self, **more: codec.Value) -> None:
        fields: codec.Fields = [(k.T_DATA, os.urandom(64)), (k.T_TIME, time.time_ns())]
        self.c.ask(k.RESUME, [*fields, *((getattr(k, name), value) for name, value in more.items())])


def boot(directory: Path) -> Machine:
    files = guest_files()
    image, disk = directory / "image.erofs", directory / "disk.ext4"
    alarm = directory / "alarm"
    subprocess.run(["gcc", "-static", "-xc", "-", "-o", alarm], input=ALARM, text=True, check=True)
    qemu.make_image(image, (*PROGRAMS, str(alarm)))
    blank.copy_sparse(blank.blank(CACHE, 1 << 30), disk)
    tsc = (f"tsc_early_khz={tsc_khz()}", "lpj=4000000", "mitigations=off")
    always = ("console=ttyS0", "quiet", "panic=-1", "reboot=t", "no_timer_check")
    disks = (qemu.raw_disk(image, True), qemu.raw_disk(disk, False), qemu.raw_disk(files.tools, True))
    arguments = " ".join((*always, *tsc, *kernel.KERNEL_ARGUMENTS))
    return Machine(files.vmlinux, files.initramfs, arguments, directory, disks=disks)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    machine = boot(tmp_path_factory.mktemp("machine"))
    try:
        guest = Guest(machine)
        guest.resume(T_HOST="box")
        guest.mount("/dev/vda", IMAGE, "erofs", MS_RDONLY)
        guest.mount("/dev/vdb", DISK, "ext4", MS_NOATIME, "noinit_itable")
        guest.mount("/dev/vdc", tools.AT, "erofs", MS_RDONLY)
        for name in ("upper", "work"):
            guest.mkdir(f"{DISK}/{name}")
        guest.mount("isolat", ROOT, "overlay", 0, f"lowerdir={IMAGE},upperdir={DISK}/upper,workdir={DISK}/work")
        guest.mount("proc", f"{ROOT}/proc", "proc")
        guest.mount("/dev", f"{ROOT}/dev", "none", MS_BIND)
        yield guest
    finally:
        machine.close()


def test_it_boots_without_a_complaint(guest: Guest) -> None:
    complaints = [line for line in guest.machine.words.splitlines() if "isolat-agent:" in line]
    assert not complaints
    assert guest.boot_s < BOOT_S
    assert guest.read("/sys/fs/cgroup/cgroup.subtree_control").split() == [b"cpu", b"memory", b"pids"]
    assert b"root / tmpfs" in guest.read("/proc/mounts")
    print(f"boot {guest.boot_s:.2f} s, {guest.machine.anonymous_kib() >> 10} MiB, "
          f"initramfs {guest_files().initramfs.stat().st_size >> 10} KiB")  # fmt: skip


def test_a_resume_sets_clock_name_and_randomness(guest: Guest) -> None:
    guest.resume(T_HOST="other", T_PATH=b"/dev/vda")
    first = guest.read("/proc/sys/kernel/random/uuid")
    guest.resume()
    assert guest.read("/proc/sys/kernel/random/uuid") != first
    assert guest.read("/proc/sys/kernel/hostname") == b"other\n"
    began = next(int(line.split()[1]) for line in guest.read("/proc/stat").splitlines() if line.startswith(b"btime"))
    uptime = float(guest.read("/proc/uptime").split()[0])
    assert abs(began + uptime - time.time()) < 1.5  # btime has no fractions


def test_the_guests_clock_runs_as_fast_as_ours(guest: Guest) -> None:
    ours, theirs = time.monotonic(), float(guest.read("/proc/uptime").split()[0])
    time.sleep(2)
    ours, theirs = time.monotonic() - ours, float(guest.read("/proc/uptime").split()[0]) - theirs
    assert abs(ours - theirs) < 0.1


@pytest.mark.parametrize("fields", [[], [(k.T_DATA, bytes(15))], [(k.T_DATA, bytes(513))]], ids=["none", "15", "513"])
def test_a_resume_without_enough_entropy_is_refused(guest: Guest, fields: codec.Fields) -> None:
    with pytest.raises(Refused, match="entropy"):
        guest.c.ask(k.RESUME, fields)


def test_a_resume_names_the_device_that_it_cannot_use(guest: Guest) -> None:
    with pytest.raises(Refused, match="/dev/vdz"):
        guest.resume(T_PATH=b"/dev/vdz")


def test_a_process_has_its_streams(guest: Guest) -> None:
    guest.c.start(1, ["sh", "-c", "cat; echo error >&2; exit 7"], [(k.T_ROOT, ROOT.encode())], k.F_STDIN)
    guest.c.type(1, b"some text\n", end=True)
    assert guest.c.finish(1) == (7, b"some text\n", b"error\n")


def test_much_output_comes_whole(guest: Guest) -> None:
    guest.c.start(2, ["head", "-c", "3000000", "/dev/zero"], [(k.T_ROOT, ROOT.encode())])
    assert guest.c.finish(2) == (0, bytes(3_000_000), b"")


def test_a_terminal_is_one(guest: Guest) -> None:
    more: codec.Fields = [(k.T_ROOT, ROOT.encode()), (k.T_ROWS, 30), (k.T_COLS, 100)]
    guest.c.start(3, ["stty", "size"], more, k.F_TTY | k.F_STDIN)
    assert guest.c.finish(3)[:2] == (0, b"30 100\r\n")


def test_what_does_not_exist_is_told_apart(guest: Guest) -> None:
    with pytest.raises(Refused) as caught:
        guest.c.start(4, ["nothing"], [(k.T_ROOT, ROOT.encode())])
    assert caught.value.code == 127


def test_a_machine_knows_when_it_is_idle(guest: Guest) -> None:
    wait_for(lambda: guest.idle() == -1, "rest")
    guest.c.start(5, ["cat"], [(k.T_ROOT, ROOT.encode())], k.F_STDIN)
    wait_for(lambda: guest.idle() == -1, "a process that waits")
    pid = guest.c.start(6, ["sh", "-c", "while :; do :; done"], [(k.T_ROOT, ROOT.encode())])
    assert pid > 1 and guest.idle() == 0
    guest.c.ask(k.SIGNAL, [(k.T_KEY, "p6"), (k.T_SIGNAL, 9), (k.T_SCOPE, k.SCOPE_PROCESS)])
    assert guest.c.finish(6)[0] == 137
    guest.c.type(5, b"", end=True)
    assert guest.c.finish(5)[0] == 0
    guest.c.start(7, ["sleep", "1"], [(k.T_ROOT, ROOT.encode())])
    assert guest.idle() in range(1001)
    guest.c.finish(7)
    wait_for(lambda: guest.idle() == -1, "rest again")


def test_an_alarm_keeps_a_machine_awake(guest: Guest) -> None:
    wait_for(lambda: guest.idle() == -1, "rest")
    guest.c.start(10, ["alarm"], [(k.T_ROOT, ROOT.encode())])
    for _ in range(20):
        assert guest.idle() == 0
        time.sleep(0.01)
    guest.c.ask(k.SIGNAL, [(k.T_KEY, "p10"), (k.T_SIGNAL, 9), (k.T_SCOPE, k.SCOPE_PROCESS)])
    guest.c.finish(10)
    wait_for(lambda: guest.idle() == -1, "rest again")


def test_before_a_template_is_saved_the_caches_are_given_back(guest: Guest) -> None:
    def cached() -> int:
        lines = guest.read("/proc/meminfo").decode().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Cached:"))

    guest.run(tools.CRUN, "--version")
    before = cached()
    guest.c.ask(k.SETTLE)
    assert cached() < before - 1000


@pytest.mark.skipif(tools.find_crun() is None, reason="no crun")
def test_crun_makes_a_container_from_the_tools(guest: Guest) -> None:
    bundle = "/run/isolat/bundle"
    guest.mkdir(bundle)
    namespaces = ("pid", "network", "ipc", "uts", "mount", "cgroup", "user")
    ids = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    config = {
        "ociVersion": "1.0.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/sh", "-c", "exit 9"], "cwd": "/",
                    "env": ["PATH=/bin"]},
        "root": {"path": ROOT},
        "mounts": [{"destination": f"/{name}", "type": kind, "source": kind}
                   for name, kind in (("proc", "proc"), ("dev", "tmpfs"))],
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "uidMappings": ids, "gidMappings": ids, "cgroupsPath": "/isolat/test",
            "resources": {"memory": {"limit": 32 << 20}, "pids": {"limit": 20}},
        },
    }  # fmt: skip
    guest.file(f"{bundle}/config.json", json.dumps(config).encode())
    words = ["--root", "/run/crun", "--cgroup-manager=cgroupfs", "run", "-b", bundle]
    for number, argv in ((8, [tools.CRUN]), (9, list(tools.CRUN_ARGV))):
        start = time.monotonic()
        guest.c.start(number, [*argv, *words, f"c{number}"])
        code, out, err = guest.c.finish(number)
        assert (code, out) == (9, b""), err
        print(f"crun run: {1000 * (time.monotonic() - start):.0f} ms")


def test_its_end_is_the_machines(tmp_path: Path) -> None:
    machine = boot(tmp_path)
    try:
        guest = Guest(machine)
        try:
            guest.c.ask(k.QUIT)
        except Gone:
            pass
        machine.process.wait(20)
    finally:
        machine.close()
