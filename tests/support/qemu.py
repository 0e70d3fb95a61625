"""A machine for tests of the agent, by the plainest QEMU command line: nothing of the product's own machinery is used.

Its agent port is a socketpair whose other end the test has, so a test speaks the wire protocol with the agent itself.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from isolat.guest import tools
from isolat.wire import codec
from isolat.wire import kinds as k
from tests.unit.native.wireside import TIMEOUT_S, Controller, spawn_fields

BINARY = "qemu-system-x86_64"
PORT = "isolat"
_PLACEHOLDER = "driver=null-co,size=1099511627776,read-zeroes=on"


class Machine:
    """QEMU's ``microvm`` under TCG, one processor. ``agent`` is our end; ``words`` what console and QEMU said."""

    def __init__(
        self,
        vmlinux: Path,
        initramfs: Path,
        arguments: str,
        directory: Path,
        *,
        disks: Sequence[str] = (_PLACEHOLDER + ",read-only=on",),
        memory_mib: int = 128,
        cpu: str = "Westmere-v1",
    ) -> None:
        """``disks``: each as the value of -blockdev, without its node-name."""
        self.agent, theirs = socket.socketpair()
        self.words_file = directory / "words"
        self.started_at_s = time.monotonic()
        argv = [
            *argv_of(vmlinux, initramfs, arguments, disks, memory_mib, cpu),
            *("-chardev", f"socket,id=agent,fd={theirs.fileno()}"),
            *("-device", f"virtserialport,chardev=agent,nr=1,name={PORT}"),
        ]
        with theirs, self.words_file.open("wb") as words:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=words, stderr=words, pass_fds=[theirs.fileno()]
            )

    @property
    def words(self) -> str:
        return self.words_file.read_text(errors="replace")

    def anonymous_kib(self) -> int:
        """What this QEMU has for itself, guest memory included."""
        rollup = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return int(rollup.partition("Anonymous:")[2].split()[0])

    def cpu_s(self) -> float:
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.agent.close()


def argv_of(
    vmlinux: Path, initramfs: Path, arguments: str, disks: Sequence[str], memory_mib: int, cpu: str
) -> list[str]:
    drives: list[str] = []
    for number, disk in enumerate(disks):
        node = f"disk{number}"
        drives += ["-blockdev", f"{disk},node-name={node}", "-device", f"virtio-blk-device,drive={node}"]
    return [
        *(BINARY, "-machine", "microvm,acpi=on,isa-serial=on", "-accel", "tcg,thread=single,tb-size=64"),
        *("-cpu", cpu, "-m", str(memory_mib), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-kernel", str(vmlinux), "-initrd", str(initramfs), "-append", arguments),
        *("-device", "virtio-serial-device"),
        *drives,
        *("-netdev", "hubport,id=n0,hubid=0", "-device", "virtio-net-device,netdev=n0"),
        *("-device", "virtio-rng-device"),
    ]


def raw_disk(path: Path, read_only: bool) -> str:
    mode = "on" if read_only else "off"
    return f"driver=raw,read-only={mode},file.driver=file,file.filename={path},file.locking=off,file.read-only={mode}"


def make_image(out: Path, programs: Iterable[str]) -> None:
    """An EROFS with these programs of this machine, and the libraries that they need, as a root file system."""
    tree = out.with_suffix(".tree")
    for name in ("bin", "lib", "dev", "proc", "sys", "tmp"):
        (tree / name).mkdir(parents=True)
    (tree / "lib64").symlink_to("lib")
    (tree / "lib" / "x86_64-linux-gnu").symlink_to(".")
    for program in programs:
        path = Path(shutil.which(program) or program)
        for file in (path, *tools.libraries_of(path)):
            shutil.copy(file, tree / ("bin" if file == path else "lib") / file.name)
    subprocess.run(tools.mkfs_argv(out, tree), check=True)


class Serial(Controller):
    """A controller on a channel without descriptors: the streams of processes are frames with their number."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.out: dict[tuple[int, int], bytearray] = {}
        self.ended: set[tuple[int, int]] = set()
        self.credit: dict[int, int] = {}

    def recv(self, timeout_s: float = TIMEOUT_S) -> codec.Frame:
        """The next frame that is not of a stream."""
        while True:
            frame = super().recv(timeout_s)
            if frame.kind == k.DATA:
                self.out.setdefault((frame.id, frame.body[0]), bytearray()).extend(frame.body[1:])
                self.send_bytes(
                    codec.pack_raw(k.CREDIT, frame.body[:1] + (len(frame.body) - 1).to_bytes(4, "little"), frame.id)
                )
            elif frame.kind == k.EOF:
                self.ended.add((frame.id, frame.body[0]))
            elif frame.kind == k.CREDIT:
                self.credit[frame.id] = self.credit.get(frame.id, 0) + int.from_bytes(frame.body[1:5], "little")
            else:
                return frame

    def start(
        self, number: int, argv: Sequence[str], more: Iterable[tuple[int, codec.Value]] = (), flags: int = 0
    ) -> int:
        """Spawn with streams of this number; the key is ``p`` and the number. Its pid in the guest."""
        fields = spawn_fields(f"p{number}", argv, flags, "", ["PATH=/bin"], [(k.T_STREAM, number), *more])
        return self.ask(k.SPAWN, fields).int(k.T_PID)

    def type(self, number: int, data: bytes, end: bool = False) -> None:
        if data:
            self.send_bytes(codec.pack_raw(k.DATA, b"\0" + data, number))
        if end:
            self.send_bytes(codec.pack_raw(k.EOF, b"\0", number))

    def finish(self, number: int) -> tuple[int, bytes, bytes]:
        """Code (128 and more: a signal), stdout and stderr once it has ended."""
        code = self.exited(f"p{number}").int(k.T_CODE)
        return code, bytes(self.out.get((number, 1), b"")), bytes(self.out.get((number, 2), b""))
