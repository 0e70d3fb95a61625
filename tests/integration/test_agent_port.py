"""A machine's port with nobody at its other end for a while: what was said meanwhile is not lost."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.guest import kernel
from isolat.wire import kinds as k
from tests.support import qemu
from tests.support.guest import guest_files, tsc_khz
from tests.unit.native.wireside import wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not shutil.which(qemu.BINARY), reason="no QEMU"),
    pytest.mark.timeout(600),  # the first one fetches a kernel
]
BOOT_S = 60.0
ROOT = b"/run/isolat/image"
MS_RDONLY, MS_BIND = 1, 4096


def connect(path: Path) -> qemu.Serial:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return qemu.Serial(sock)


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Path]:
    """The agent's port is a socket that QEMU listens on, so that its other end can go and come."""
    files = guest_files()
    at = tmp_path / "port"
    tsc = (f"tsc_early_khz={tsc_khz()}", "lpj=4000000", "mitigations=off")
    arguments = " ".join(
        ("console=ttyS0", "quiet", "panic=-1", "reboot=t", "no_timer_check", *tsc, *kernel.KERNEL_ARGUMENTS)
    )
    qemu.make_image(tmp_path / "image", ("sh", "sleep", "head"))
    disks = (qemu.raw_disk(tmp_path / "image", True),)
    argv = [
        *qemu.argv_of(files.vmlinux, files.initramfs, arguments, disks, 128, "Westmere-v1"),
        *("-chardev", f"socket,id=agent,path={at},server=on,wait=off"),
        *("-device", f"virtserialport,chardev=agent,nr=1,name={qemu.PORT}"),
    ]
    with (tmp_path / "words").open("wb") as words:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
    try:
        wait_for(at.exists, "QEMU's socket")
        yield at
    finally:
        process.kill()
        process.wait()


def test_what_was_said_to_nobody_is_said_to_the_next(port: Path) -> None:
    c = connect(port)
    c.answer(c.send(k.HELLO, [(k.T_VERSION, k.VERSION), (k.T_ROLE, "keeper")]), BOOT_S)
    c.step(1, [(k.T_PATH, ROOT), (k.T_MODE, 0o755)])
    c.step(3, [(k.T_SOURCE, b"/dev/vda"), (k.T_TARGET, ROOT), (k.T_FSTYPE, "erofs"), (k.T_COUNT, MS_RDONLY)])
    c.step(3, [(k.T_SOURCE, b"/dev"), (k.T_TARGET, ROOT + b"/dev"), (k.T_FSTYPE, "none"), (k.T_COUNT, MS_BIND)])
    c.start(1, ["sh", "-c", "sleep 1; echo nobody hears; head -c 100000 /dev/zero >&2; exit 3"], [(k.T_ROOT, ROOT)])
    c.close()
    time.sleep(4)
    c = connect(port)
    code, out, err = c.finish(1)
    assert (code, out, len(err)) == (3, b"nobody hears\n", 100_000)
    assert c.procs()["p1"].int(k.T_STATE) == 1
    c.close()
