"""Kernels and modules small enough to be made in a test."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

RELEASE = "6.1.0-7-test"
VMLINUX = b"\x7fELF" + bytes(60) + f"Linux version {RELEASE} (somebody) #1".encode() + bytes(64)


def gzipped(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


def bzimage(elf: bytes = VMLINUX, pack: Callable[[bytes], bytes] = gzipped, release: str = RELEASE) -> bytes:
    """Two sectors of set-up code, then the payload 64 bytes into the protected-mode part (boot protocol 2.15)."""
    payload = pack(elf) + struct.pack("<I", len(elf))
    setup = bytearray(3 * 512)
    setup[0x1F1] = 2
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x20F)
    struct.pack_into("<H", setup, 0x20E, 0x300)
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    text = f"{release} (somebody) #1\0".encode()
    setup[0x500 : 0x500 + len(text)] = text
    return bytes(setup) + bytes(64) + payload


def module(*info: str) -> bytes:
    """An ELF with three sections: none, .modinfo, the sections' names."""
    text = b"".join(line.encode() + b"\0" for line in info)
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(text) + len(names)
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)
    section = struct.Struct("<II4QIIQQ")
    sections = (
        bytes(64)
        + section.pack(1, 1, 0, 0, 64, len(text), 0, 0, 1, 0)
        + section.pack(10, 3, 0, 0, 64 + len(text), len(names), 0, 0, 1, 0)
    )
    return bytes(header) + text + names + sections


def module_tree(at: Path, needs: dict[str, str], builtin: tuple[str, ...] = ()) -> Path:
    """A directory as /lib/modules/RELEASE; ``needs``: file's name without .ko to its ``depends``."""
    for name, depends in needs.items():
        path = at / "kernel" / f"{name}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(module(f"depends={depends}", "license=GPL"))
    at.mkdir(parents=True, exist_ok=True)
    (at / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in builtin))
    return at
