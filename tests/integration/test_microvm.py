"""What is true of microVMs and of no other layer: their kernel, their template, parking, the unprivileged QEMU."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolat.engine.paths import StateRoot
from tests.support import traces
from tests.support.microvms import (
    MEMORY,
    MIB,
    cpu_s,
    is_parked,
    link,
    machines,
    memory_of,
    qemu,
    spec,
    status,
    template_memory,
    until_parked,
)
from tests.support.roots import Root, clean_root, private_root
from tests.support.wires import Stream

pytestmark = pytest.mark.root

LAYER = ("--layer", "microvm", "-m", MEMORY)
IDENTITY = (
    "od -An -tx1 -N16 /dev/urandom; cat /proc/sys/kernel/random/uuid /etc/machine-id /proc/sys/kernel/hostname "
    "/sys/class/net/eth0/address; date +%s.%N"
)


@pytest.fixture(scope="module")
def module_root() -> Iterator[Root]:
    """One root for this module, so that its template is booted once; no machines in advance."""
    with private_root() as root:
        root.start_daemon()
        yield root


@pytest.fixture
def root(module_root: Root) -> Iterator[Root]:
    with clean_root(module_root) as found:
        yield found


def _exec(root: Root, id: str, script: str) -> str:
    stream = root.exec(id, ["sh", "-c", script])
    code = stream.ended()
    assert code == 0, f"{script}: {code}: {bytes(stream.err)!r}"
    stream.close()
    return stream.out.decode()


def _template(root: Root) -> dict[str, Any]:
    """The template of the machines of this module that has no image."""
    found = (row for row in root.ask("templates")["templates"] if row["memory_bytes"] == 128 * MIB)
    (one,) = (row for row in found if not row["image"])
    return dict(one)


def _image_template(root: Root, seconds: float = 30) -> dict[str, Any]:
    """The template of their image; made, where it is not there yet, by asking for a machine of it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = [row for row in root.ask("templates")["templates"] if row["memory_bytes"] == 128 * MIB and row["image"]]
        if found:
            return dict(found[0])
        root.ok("run", "--rm", *LAYER, "debian", "true")
        time.sleep(0.5)
    raise AssertionError(f"no template of the image after {seconds} s\n{root.log()[-2000:]}")


# a kernel of its own


def test_it_has_a_kernel_of_its_own_and_computes(root: Root) -> None:
    said = root.ok("run", "--rm", *LAYER, "debian", "sh", "-c", 'uname -r; python3 -c "print(6*7)"')
    kernel, answer = said.splitlines()
    assert kernel != os.uname().release
    assert kernel.endswith("-cloud-amd64")
    assert answer == "42"


def test_the_end_of_one_is_the_end_of_one(root: Root) -> None:
    """A QEMU that is killed, a kernel that panics: told with the console's last words, and nobody else notices."""
    killed, panics, other = (root.run_detached(spec("sleep", "600")) for _ in range(3))
    before = root.exec(other, ["sh", "-c", "echo up; cat"], stdin=True)
    before.until_out(b"up")
    _exec(root, killed, "echo the last words of this machine > /dev/kmsg; echo told > /dev/console")
    os.kill(qemu(root, killed), signal.SIGKILL)
    root.exec(panics, ["sh", "-c", "echo c > /proc/sysrq-trigger"])
    for id, words in ((killed, "told"), (panics, "Kernel panic - not syncing: sysrq triggered crash")):
        known = root.until_state(id, "exited")
        assert known["exit"]["code"] == 137
        assert words in known["reason"]
        assert words in root.ok("inspect", id)
    before.write(b"still here\n")
    before.until_out(b"still here")
    assert _exec(root, other, "echo well").strip() == "well"
    assert root.ok("run", "--rm", *LAYER, "debian", "echo", "another") == "another"


# templates


def test_a_template_cannot_be_changed(root: Root) -> None:
    """Not by root on the host, not through a clone's own descriptor, not by what its guest writes."""
    memory = template_memory(root, _image_template(root)["key"])
    one, two = (root.run_detached(spec("sleep", "600")) for _ in range(2))
    before = _digest(memory)
    own = memory_of(qemu(root, one))
    assert own.stat().st_ino == memory.stat().st_ino
    for path in (memory, own):
        assert _attempts(path) == [errno.EPERM] * 5
    for id in (one, two):
        _exec(root, id, "head -c 20000000 /dev/urandom > /dev/shm/x; sync; sha256sum /dev/shm/x")
    assert _digest(memory) == before
    assert _exec(root, two, "echo well").strip() == "well"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _attempts(path: Path) -> list[int]:
    """Everything by which a file could be changed; the error of each, 0 where it succeeded."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    punch = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE: what a balloon does
    ways = (
        lambda: os.pwrite(fd, b"changed", 4096),
        lambda: os.ftruncate(fd, 4096),
        lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        lambda: _checked(libc.fallocate(fd, punch, ctypes.c_long(0), ctypes.c_long(4096))),
        lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    )
    found = []
    try:
        for way in ways:
            try:
                way()
                found.append(0)
            except OSError as error:
                found.append(error.errno or -1)
    finally:
        os.close(fd)
    return found


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "it failed")


def test_templates_are_listed_outlive_a_killed_daemon_and_are_pruned(root: Root) -> None:
    root.ok("run", "--rm", *LAYER, "debian", "true")
    before = _template(root)
    runs = root.run_detached(spec("sleep", "600"))
    root.kill_daemon()
    root.start_daemon()
    root.ok("run", "--rm", *LAYER, "debian", "true")
    assert _template(root) == before, "the next daemon booted another one"
    assert json.loads(root.ok("template", "ls", "--json"))["warm"] == 0
    of_image = _image_template(root)
    for word in (before["id"], of_image["id"], of_image["image"][:12]):
        assert word in root.ok("template", "ls")
    assert before["id"] in root.ok("template", "prune")
    assert root.ask("templates")["templates"] == []
    assert list((root.path / "templates").iterdir()) == []
    assert _exec(root, runs, "head -c 1000000 /dev/urandom | wc -c").strip() == "1000000", "a clone goes on without it"
    assert root.ok("template", "create", "--layer", "microvm", "-m", MEMORY) == _template(root)["id"]


def test_a_machine_without_a_template_shares_nothing(root: Root) -> None:
    id = root.run_detached(spec("sleep", "600", mem_limit="256m", x_microvm={"template": False}))
    memory = template_memory(root, root.ok("template", "create", "--layer", "microvm", "-m", MEMORY))
    assert memory_of(qemu(root, id)).stat().st_ino != memory.stat().st_ino
    assert _exec(root, id, "echo well").strip() == "well"


def test_a_plan_boots_nothing(root: Root) -> None:
    before = root.ask("templates")
    said = root.ok("run", "--plan", "--layer", "microvm", "-m", "192m", "debian", "true")
    assert "layer microvm" in said
    assert "/dev/vda" in said
    assert root.ask("templates") == before
    assert machines(root) == []


# what two clones must not have in common


def test_two_clones_differ_and_have_the_right_time(root: Root) -> None:
    found = []
    for _ in range(2):
        _, stream, _ = root.run(spec("sh", "-c", IDENTITY, x_remove=True))
        assert stream.ended() == 0
        found.append(stream.out.decode())
        told_right(found[-1])
    differ(*found)


def test_a_machine_that_was_parked_has_the_right_time(root: Root) -> None:
    id = root.run_detached(spec("sleep", "infinity", x_microvm={"park_s": 0.3}))
    until_parked(qemu(root, id))
    time.sleep(2)
    told_right(_exec(root, id, IDENTITY))


def differ(one: str, other: str) -> None:
    """Randomness, uuid, machine-id, host name and address of two, line by line; the rest is the time."""
    first, second = one.splitlines()[:5], other.splitlines()[:5]
    assert len(first) == len(second) == 5
    assert [a for a, b in zip(first, second, strict=True) if a == b] == []


def told_right(said: str) -> None:
    assert abs(float(said.splitlines()[5]) - time.time()) < 1


# parking


def test_a_parked_machine_wakes_by_exec_and_sleeps_again(root: Root) -> None:
    id = root.run_detached(spec("sleep", "infinity", x_microvm={"park_s": 0.3}))
    pid = qemu(root, id)
    until_parked(pid)
    used = cpu_s(pid)
    time.sleep(0.5)
    assert cpu_s(pid) == used
    assert _exec(root, id, "echo awake").strip() == "awake"
    until_parked(pid)
    root.kill_daemon()
    root.start_daemon()
    assert _exec(root, id, "echo again").strip() == "again"
    assert root.ask("stop", {"env": id, "grace_s": 5})["code"] == 143


def test_a_parked_machine_wakes_by_input(root: Root) -> None:
    keys = {"stdin_open": True, "x_microvm": {"park_s": 0.3}}
    conversation, stream, id = root.run(spec("cat", **keys))
    stream.write(b"first\n")
    stream.until_out(b"first\n")
    pid = qemu(root, id)
    until_parked(pid)
    stream.write(b"second\n")
    stream.until_out(b"second\n")
    until_parked(pid)
    stream.close_stdin()
    assert stream.ended() == 0
    conversation.close()


def test_a_parked_machine_wakes_for_its_own_timer(root: Root) -> None:
    """What a day is to ten seconds without a word, ten seconds are to a moment."""
    script = "while :; do cat /proc/uptime; sleep 10; done"
    id = root.run_detached(spec("sh", "-c", script, x_microvm={"park_s": 0.005}))
    until_parked(qemu(root, id), 8)
    end = time.monotonic() + 20
    while len(found := root.ok("logs", id).split()[::2]) < 2:
        assert time.monotonic() < end, root.ok("logs", id)
        time.sleep(0.2)
    assert 9.9 < float(found[1]) - float(found[0]) < 12
    until_parked(qemu(root, id), 8)


def test_a_machine_with_a_timer_or_work_is_not_parked(root: Root) -> None:
    busy = [
        root.run_detached(spec("sh", "-c", script, x_microvm={"park_s": 0.2}))
        for script in ("while :; do sleep 0.3; done", "while :; do :; done")
    ]
    pids = [qemu(root, id) for id in busy]
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        assert not any(is_parked(pid) for pid in pids)
        time.sleep(0.05)


# streams


def test_sixty_four_mebibytes_come_through_unchanged(root: Root, tmp_path: Path) -> None:
    pipe_through(root, tmp_path, 64)


def pipe_through(root: Root, tmp_path: Path, mib: int) -> float:
    """So many MiB from a file through ``cat`` in a machine into another file. Seconds."""
    wanted, block = hashlib.sha256(), os.urandom(MIB)
    with (tmp_path / "in").open("wb") as file:
        for n in range(mib):
            piece = n.to_bytes(4, "little") + block[4:]
            wanted.update(piece)
            file.write(piece)
    began = time.monotonic()
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        process = root.popen("run", "-i", "--rm", *LAYER, "debian", "cat", stdin=source, stdout=target)
        assert process.wait(300) == 0
    taken = time.monotonic() - began
    assert _digest(tmp_path / "out") == wanted.hexdigest()
    return taken


def test_a_killed_daemon_takes_no_machine_and_cuts_no_stream(root: Root) -> None:
    script = "i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i+1)); sleep 0.05; done; exit 6"
    stream, id = _counting(root, script)
    parked = root.run_detached(spec("sleep", "infinity", x_microvm={"park_s": 0.3}))
    before = qemu(root, parked)
    until_parked(before)
    for _ in range(2):
        root.kill_daemon()
        root.start_daemon()
    assert stream.ended() == 6
    assert stream.out.decode().splitlines() == [f"line {n}" for n in range(30)]
    assert root.ask("wait", {"env": id})["code"] == 6
    assert qemu(root, parked) == before
    assert _exec(root, parked, "echo well").strip() == "well"


def _counting(root: Root, script: str) -> tuple[Stream, str]:
    conversation, stream, id = root.run(spec("sh", "-c", script))
    stream.until_out(b"line 0")
    conversation.close()
    return stream, id


# limits and privileges


def test_it_may_fill_its_memory_with_files(root: Root) -> None:
    script = "dd if=/dev/zero of=/big bs=1M count=330 2>/dev/null; cat /big /usr/bin/* | wc -c"
    for _ in range(2):
        assert int(root.ok("run", "--rm", "--layer", "microvm", "debian", "sh", "-c", script)) > 330 << 20


def test_who_takes_more_memory_than_the_guest_has_is_killed_inside(root: Root) -> None:
    hog = "kept = []\nwhile True: kept.append(bytearray(1 << 20))"
    available = _available_mib()
    id = root.run_detached(spec("sleep", "600"))
    stream = root.exec(id, ["python3", "-c", hog])
    assert stream.ended(60) == 137
    assert _exec(root, id, "echo well").strip() == "well"
    assert _group(root, id, "memory.max", "memory.limit_in_bytes") < (300 + 128) * MIB
    assert _group(root, id, "pids.max") == 128
    assert available - _available_mib() < 400
    assert root.state(id) == "running"


def test_an_application_that_lacked_memory_is_told_of(root: Root) -> None:
    grow = "kept = []\nwhile True: kept.append(bytearray(1 << 20))"
    grown = root.run_detached(spec("python3", "-c", grow))
    plain = root.run_detached(spec("sh", "-c", "kill -9 $$"))
    for id, oom in ((grown, True), (plain, False)):
        assert root.ok("wait", id).strip() == "137"
        assert root.ask("inspect", {"env": id})["exit"]["oom"] is oom


def _available_mib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024


def _group(root: Root, id: str, *names: str) -> int:
    """A limit in its control group, in whichever hierarchy has it."""
    groups = traces.cgroups(f"{StateRoot(root.path).cgroup}/{id}")
    return next(int(p.read_text()) for g in groups for name in names if (p := Path(g) / name).exists())


def test_qemu_has_no_privileges_no_files_and_no_company(root: Root) -> None:
    id = root.run_detached(spec("sleep", "600"))
    pid, base = qemu(root, id), root.ask("inspect", {"env": id})["uid_base"]
    known = status(pid)
    assert known["Uid"].split() == known["Gid"].split() == [str(base)] * 4
    assert known["Groups"] == ""
    assert [known[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [""] * 4
    assert (known["NoNewPrivs"], known["Seccomp"]) == ("1", "2")
    assert known["Seccomp_filters"] == "2", "the keeper's and QEMU's own"
    for kind in ("mnt", "pid", "net", "ipc", "uts"):
        assert link(pid, f"ns/{kind}") != link("self", f"ns/{kind}"), kind
    assert link(pid, "root") == f"{root.path}/mounts/jail"
    inside = {path.name for path in Path(f"/proc/{pid}/root").iterdir()}
    assert inside <= {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "guest", "dev", "proc", "finished"}
    assert {path.name for path in Path(f"/proc/{pid}/root/dev").iterdir()} <= {"null", "zero", "random", "urandom"}


def test_qemu_has_only_the_descriptors_that_it_was_given(root: Root) -> None:
    id = root.run_detached(spec("sleep", "600"))
    links = {str(path.readlink()) for path in Path(f"/proc/{qemu(root, id)}/fd").iterdir()}
    files = {link for link in links if link.startswith("/") and not link.startswith(("/memfd:", "/dev/null"))}
    image = root.ask("inspect", {"env": id})["digest"]
    assert all(image[:12] in link or link.endswith("/disk.img") for link in files), files


def test_qemu_can_make_no_file_larger_than_its_disk(root: Root) -> None:
    id = root.run_detached(spec("sleep", "600", storage_opt={"size": "96m"}))
    line = next(line for line in Path(f"/proc/{qemu(root, id)}/limits").read_text().splitlines() if "file size" in line)
    assert line.split()[3:5] == [str(96 * MIB)] * 2
    _exec(root, id, "head -c 60000000 /dev/zero >/big && sync")


def test_inside_there_is_no_trace_of_the_host(root: Root) -> None:
    """What the guest sees of the machine is QEMU's: its processor, its memory, its disks, no PCI bus."""
    id = root.run_detached(spec("sleep", "600"))
    assert "Westmere" in _exec(root, id, "grep -m1 'model name' /proc/cpuinfo") or Path("/dev/kvm").exists()
    assert int(_exec(root, id, "awk '/MemTotal/ {print $2}' /proc/meminfo")) < 128 * 1024
    disks = set(_exec(root, id, "ls /sys/block").split())
    assert {"vda", "vdb"} <= disks <= {f"vd{letter}" for letter in "abcdefgh"}
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    assert host not in _exec(root, id, "cat /proc/sys/kernel/hostname /etc/hosts; env").split()
