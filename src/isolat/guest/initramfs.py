"""The guest's initramfs: the agent as /init, the modules that it loads, and their order.

``modules/order`` names what every machine loads, ``modules/live`` what those do beside whose kernel is told
``isolat.live``.

A cpio archive in the form that the kernel reads (Documentation/driver-api/early-userspace/buffer-format.rst, "newc"),
written here: the same input gives the same bytes, which the key of a template needs, and no cpio command is. Not
compressed: a machine without hardware virtualization would emulate the decompression.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from isolat.guest import modules
from isolat.guest.kernel import Kernel, read_compressed

_DIRECTORY, _FILE = 0o040755, 0o100000
_TRAILER = "TRAILER!!!"
_BLOCK = 512


@dataclass(frozen=True)
class Entry:
    name: str  # without a slash in front
    mode: int  # with the type
    data: bytes = b""


def build(kernel: Kernel, agent: Path, out: Path) -> None:
    """Write ``out``, replacing it atomically. Raises Unsupported where the kernel lacks a module."""
    beside = out.with_name(out.name + ".tmp")
    beside.write_bytes(archive(entries(kernel, agent)))
    beside.replace(out)


def entries(kernel: Kernel, agent: Path) -> list[Entry]:
    loaded = modules.closure(kernel)
    live = modules.live(kernel) or []
    files = [
        Entry(f"modules/{modules.file_name(path)}", _FILE | 0o600, read_compressed(path)) for path in (*loaded, *live)
    ]
    directories = [Entry(name, _DIRECTORY) for name in ("dev", "modules", "proc", "root", "sys")]
    return [
        *directories,
        Entry("init", _FILE | 0o755, agent.read_bytes()),
        Entry("modules/order", _FILE | 0o600, _names(loaded)),
        *([Entry("modules/live", _FILE | 0o600, _names(live))] if live else []),
        *files,
    ]


def _names(files: Iterable[Path]) -> bytes:
    return "".join(f"{modules.file_name(path)}\n" for path in files).encode()


def archive(content: Iterable[Entry]) -> bytes:
    """The archive's bytes: sorted by name, so that a directory precedes what is in it; no owners, no times."""
    out = bytearray()
    for number, entry in enumerate(sorted(content, key=lambda entry: entry.name), start=1):
        _put(out, number, entry)
    _put(out, 0, Entry(_TRAILER, 0))
    out += bytes(-len(out) % _BLOCK)
    return bytes(out)


def _put(out: bytearray, inode: int, entry: Entry) -> None:
    """c_ino, mode, uid, gid, nlink, mtime, filesize, the device's two, the node's two, namesize, check; name, data."""
    name = entry.name.encode() + b"\0"
    links = 2 if entry.mode & 0o170000 == 0o040000 else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    out += bytes(-len(out) % 4)
    out += entry.data
    out += bytes(-len(out) % 4)
