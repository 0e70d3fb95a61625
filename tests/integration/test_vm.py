"""One whole PC, booted once: what runs in it, its screen, how it is switched off. And machines that die.

The conformance suite on it costs a boot for each test: `make soak`.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolat.client.sdk import Client
from isolat.images.bootstrap import SYSTEMD
from tests.support import images, traces
from tests.support.images import IMAGE
from tests.support.qemu import BINARY
from tests.support.roots import Root, clean_root, private_root

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not shutil.which(BINARY), reason="no QEMU"),
    pytest.mark.timeout(600),  # the first one makes an image and fetches a kernel
]
TICKING = "trap 'echo asked; exit 7' TERM; echo up; while :; do sleep 0.2; done"
OFF_S = 20.0


@pytest.fixture(scope="module")
def machines_root() -> Iterator[Root]:
    with private_root() as root:
        images.share_bootable(root.path)
        root.start_daemon()
        yield root


@pytest.fixture(scope="module")
def pc(machines_root: Root) -> str:
    """Its id. The root's end removes it, and proves that nothing is left."""
    service = {"image": SYSTEMD, "runtime": "vm", "command": ["sh", "-c", TICKING], "hostname": "box"}
    return machines_root.run_detached(service)


def _exec(root: Root, env: str, *command: str, **more: Any) -> tuple[int | None, bytes, bytes]:
    stream = root.exec(env, command, **more)
    code = stream.ended()
    stream.close()
    return code, bytes(stream.out), bytes(stream.err)


def test_files_go_in_and_out_while_it_runs(machines_root: Root, pc: str, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("words")
    machines_root.ok("cp", "-a", str(tmp_path), f"{pc}:/srv/new")
    assert _exec(machines_root, pc, "cat", "/srv/new/words")[1] == b"words"
    machines_root.ok("cp", f"{pc}:/srv/new/words", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "words"
    for verb in ("diff", "commit"):
        done = machines_root.cli(verb, pc)
        assert (done.returncode, b"not kept apart" in done.stderr) == (125, True)


def test_it_is_a_whole_system(machines_root: Root, pc: str) -> None:
    script = "cat /proc/1/comm; stat -f -c %T /; hostname; getent hosts box; systemctl is-active dbus; ls /dev/vda1"
    found = _exec(machines_root, pc, "sh", "-c", script)
    assert found[0] == 0, found
    assert found[1].decode().split() == ["systemd", "ext2/ext3", "box", "127.0.1.1", "box", "active", "/dev/vda1"]


def test_its_kernel_and_clock(machines_root: Root, pc: str) -> None:
    told = _exec(machines_root, pc, "sh", "-c", "cat /proc/sys/kernel/random/boot_id; date +%s.%N")[1].decode().split()
    assert told[0] != Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert abs(float(told[1]) - time.time()) < 2


def test_streams_codes_and_terminals_of_exec(machines_root: Root, pc: str) -> None:
    assert _exec(machines_root, pc, "sh", "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
    tty = _exec(machines_root, pc, "sh", "-c", "test -t 0 && stty size", tty=True, stdin=True, rows=33, cols=77)
    assert tty[:2] == (0, b"33 77\r\n")
    assert machines_root.cli("exec", "-i", pc, "cat", input=b"through\n").stdout == b"through\n"
    assert machines_root.cli("exec", pc, "no-such-command").returncode == 127
    assert _exec(machines_root, pc, "id", "-un", user="nobody")[1] == b"nobody\n"


def test_logs_of_its_application(machines_root: Root, pc: str) -> None:
    assert machines_root.ok("logs", pc) == "up"


def test_its_disk_is_its_own(machines_root: Root, pc: str) -> None:
    disk = machines_root.path / "envs" / pc / "disk.img"
    about = disk.stat()
    assert (about.st_uid, about.st_mode & 0o777) == (0, 0o600)
    assert about.st_size == 10 << 30 and about.st_blocks * 512 < 1 << 30
    assert _exec(machines_root, pc, "sh", "-c", "echo mine > /usr/mark && sync && cat /usr/mark")[1] == b"mine\n"


def _pixels(png: bytes) -> set[bytes]:
    """The colours of an RGB picture (PNG, section 5: length, type, data, check; section 9: filter byte of each row)."""
    assert png[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    width, height, depth, colours = struct.unpack_from(">IIBB", png, 16)
    assert width >= 640 and height >= 400 and (depth, colours) == (8, 2)
    at, packed = 8, b""
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        if png[at + 4 : at + 8] == b"IDAT":
            packed += png[at + 8 : at + 8 + length]
        at += length + 12
    data, row = zlib.decompress(packed), 1 + 3 * width
    assert len(data) == height * row
    lines = [data[n * row + 1 : (n + 1) * row] for n in range(height)]
    return {line[n : n + 3] for line in lines for n in range(0, len(line), 3)}


def test_its_screen(machines_root: Root, pc: str, tmp_path: Path) -> None:
    end = time.monotonic() + 30
    while _exec(machines_root, pc, "systemctl", "is-active", "getty@tty1")[0] and time.monotonic() < end:
        time.sleep(0.5)
    picture = tmp_path / "screen.png"
    machines_root.ok("screenshot", pc, str(picture))
    assert len(_pixels(picture.read_bytes())) > 1
    again = machines_root.cli("screenshot", pc, "-").stdout
    assert _pixels(again) and Client(machines_root.path, start=False).get(pc).screenshot()[:8] == again[:8]
    refused = machines_root.cli("screenshot", pc, str(tmp_path / "no" / "such"))
    assert refused.returncode == 125 and b"cannot write" in refused.stderr


def test_stop_asks_the_application_then_switches_the_machine_off(machines_root: Root, pc: str) -> None:
    began = time.monotonic()
    told = machines_root.ask("stop", {"env": pc, "grace_s": 10})
    assert time.monotonic() - began < OFF_S
    assert (told["code"], told["forced"], told["reason"]) == (7, False, "")
    assert machines_root.ok("logs", pc) == "up\nasked"
    console = (machines_root.path / "envs" / pc / "guest.tail").read_text(errors="replace")
    assert "Power down" in console, console
    assert traces.processes(pc, f"/{pc}") == {}
    assert machines_root.cli("screenshot", pc, "-").returncode == 125
    machines_root.ask("rm", {"env": pc})
    assert traces.none_of_environment(machines_root.path, pc) == []


@pytest.fixture
def root(machines_root: Root) -> Iterator[Root]:
    with clean_root(machines_root) as found:
        yield found


def _qemu(id: str) -> int:
    """The pid of the QEMU that this environment's machine is."""
    found = [pid for pid, words in traces.processes("nothing of this name", f"/{id}").items() if "qemu" in words]
    assert len(found) == 1
    return found[0]


def _microvm(root: Root) -> str:
    return root.run_detached({"image": IMAGE, "runtime": "microvm", "command": ["sleep", "600"]})


def test_a_killed_machine_is_told_from_a_killed_application(root: Root) -> None:
    machine, application = _microvm(root), _microvm(root)
    os.kill(_qemu(machine), signal.SIGKILL)
    root.ask("kill", {"env": application, "signal": "KILL"})
    for env in (machine, application):
        told = root.ask("wait", {"env": env})
        assert (told["code"], told["signal"]) == (137, 9)
        assert ("ended under it" in told["reason"]) == (env == machine), told


def test_a_panic_is_told_with_the_consoles_last_words(root: Root) -> None:
    machine, other = _microvm(root), _microvm(root)
    stream = root.exec(machine, ["sh", "-c", "echo c > /proc/sysrq-trigger"])
    told = root.ask("wait", {"env": machine})
    assert "Kernel panic - not syncing: sysrq" in told["reason"], told
    stream.close()
    assert root.exec(other, ["true"]).ended() == 0


def test_with_its_image_the_disks_made_from_it_go(machines_root: Root) -> None:
    disks = machines_root.path / "disks"
    assert list(disks.glob("*.disk"))
    machines_root.ok("rmi", SYSTEMD)
    assert list(disks.glob("*.disk")) == []
    assert (disks / "kernel").exists()
