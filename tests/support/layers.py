"""Layers for tests: archives written byte by byte, so that they may also be wrong; images of them; what is in a tree.

``Archive`` writes what a test says, with PAX headers where ustar has no room. ``describe`` says all of a directory tree
that a layer can say, and ``umoci`` unpacks an image for comparison.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isolat.images.flatten import LayerBlob

BLOCK = 512
TYPES = {
    "file": b"0", "link": b"1", "symlink": b"2", "char": b"3", "block": b"4", "directory": b"5", "fifo": b"6",
}  # fmt: skip


def octal(value: int, width: int) -> bytes:
    """As text where it fits, else GNU's base-256."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return (value & (1 << 8 * width - 1) - 1 | 1 << 8 * width - 1).to_bytes(width, "big")


def header(name: bytes, type: bytes = b"0", size: int = 0, **raw: bytes) -> bytes:
    """One block, its sum right unless given. ``raw`` replaces fields by their names."""
    fields = {
        "name": name[:100], "mode": octal(0o644, 8), "uid": octal(0, 8), "gid": octal(0, 8), "size": octal(size, 12),
        "mtime": octal(0, 12), "sum": b" " * 8, "type": type, "link": b"", "magic": b"ustar\x0000", "uname": b"",
        "gname": b"", "major": octal(0, 8), "minor": octal(0, 8), "prefix": b"",
    } | raw  # fmt: skip
    widths = {"name": 100, "sum": 8, "type": 1, "link": 100, "magic": 8, "uname": 32, "gname": 32, "prefix": 155}
    block = b"".join(value.ljust(widths.get(key, len(value)), b"\0") for key, value in fields.items())
    block = block.ljust(BLOCK, b"\0")
    if "sum" not in raw:
        block = block[:148] + b"%06o\0 " % sum(block) + block[156:]
    return block


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def records(values: Mapping[bytes, bytes]) -> bytes:
    """The content of a PAX header."""
    found = b""
    for name, value in values.items():
        rest = b" %s=%s\n" % (name, value)
        length = len(rest)
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        found += b"%d%s" % (length, rest)
    return found


def extended(values: Mapping[bytes, bytes], type: bytes = b"x") -> bytes:
    content = records(values)
    return header(b"PaxHeaders/x", type, len(content)) + padded(content)


@dataclass
class Archive:
    """A tar archive in the making. Names and targets are bytes; times are (seconds, nanoseconds) since the epoch."""

    parts: list[bytes] = field(default_factory=list)

    def add(
        self,
        name: bytes,
        kind: str = "file",
        data: bytes = b"",
        *,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        mtime: tuple[int, int] = (1_600_000_000, 0),
        link: bytes = b"",
        device: tuple[int, int] = (0, 0),
        xattrs: Mapping[bytes, bytes] | None = None,
    ) -> Archive:
        pax: dict[bytes, bytes] = {}
        if len(name) > 100:
            pax[b"path"] = name
        if len(link) > 100:
            pax[b"linkpath"] = link
        if mtime[1]:
            pax[b"mtime"] = b"%d.%09d" % mtime
        for key, value in (xattrs or {}).items():
            pax[b"SCHILY.xattr." + key] = value
        if pax:
            self.parts.append(extended(pax))
        self.parts.append(
            header(
                name, TYPES[kind], len(data), mode=octal(mode, 8), uid=octal(uid, 8), gid=octal(gid, 8),
                mtime=octal(mtime[0], 12), link=link[:100], major=octal(device[0], 8), minor=octal(device[1], 8),
            )
        )  # fmt: skip
        self.parts.append(padded(data))
        return self

    def raw(self, *blocks: bytes) -> Archive:
        self.parts += blocks
        return self

    def directory(self, name: bytes, mode: int = 0o755, **more: Any) -> Archive:
        return self.add(name, "directory", mode=mode, **more)

    def symlink(self, name: bytes, target: bytes) -> Archive:
        return self.add(name, "symlink", link=target)

    def link(self, name: bytes, target: bytes) -> Archive:
        return self.add(name, "link", link=target)

    def bytes(self) -> bytes:
        return b"".join(self.parts) + bytes(2 * BLOCK)


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def blob(directory: Path, archive: bytes, packed: bytes | None = None, diff_id: str | None = None) -> LayerBlob:
    """The layer as a file named by its digest; ``packed`` is its compressed form, else it stays as it is."""
    data = archive if packed is None else packed
    path = directory / digest(data).partition(":")[2]
    path.write_bytes(data)
    return LayerBlob(path, digest(data), digest(archive) if diff_id is None else diff_id, len(data))


def blobs(directory: Path, archives: Sequence[Archive | bytes]) -> list[LayerBlob]:
    directory.mkdir(exist_ok=True)
    return [blob(directory, item if isinstance(item, bytes) else item.bytes()) for item in archives]


def oci_layout(directory: Path, archives: Sequence[bytes]) -> None:
    """An image ``directory``:latest of these layers, as umoci and skopeo read them."""
    place = directory / "blobs/sha256"
    place.mkdir(parents=True)

    def put(data: bytes) -> dict[str, Any]:
        (place / digest(data).partition(":")[2]).write_bytes(data)
        return {"digest": digest(data), "size": len(data)}

    layers = [
        {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **put(gzip.compress(data, 1, mtime=0))}
        for data in archives
    ]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [digest(data) for data in archives]},
        "history": [{"created_by": "test"} for _ in archives],
    }
    described = {"mediaType": "application/vnd.oci.image.config.v1+json", **put(json.dumps(config).encode())}
    manifest = put(json.dumps({"schemaVersion": 2, "config": described, "layers": layers}).encode())
    named = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "annotations": {"org.opencontainers.image.ref.name": "latest"},
        **manifest,
    }
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def umoci(directory: Path, archives: Sequence[bytes]) -> tuple[Path, str]:
    """What umoci unpacks these layers to, and why it didn't."""
    oci_layout(directory / "oci", archives)
    target = directory / "bundle"
    argv = ["umoci", "unpack", "--image", f"{directory}/oci:latest", str(target)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=600)
    return target / "rootfs", done.stderr if done.returncode else ""


@dataclass(frozen=True)
class Described:
    """All that a layer says of one path. ``same`` names the first path of the same file."""

    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    content: str = ""
    target: bytes = b""
    device: int = 0
    same: bytes = b""
    links: int = 1
    xattrs: tuple[tuple[str, bytes], ...] = ()


def describe(root: Path) -> dict[bytes, Described]:
    """Every path below ``root`` and itself (b"."), /dev's content left out."""
    found: dict[bytes, Described] = {}
    first: dict[int, bytes] = {}
    top = os.fsencode(root)
    for directory, names, files in os.walk(top):
        if directory == top + b"/dev":
            names.clear()
            files.clear()
        for name in (*sorted(names), *sorted(files)):
            path = directory + b"/" + name
            found[path[len(top) + 1 :]] = _describe(path, path[len(top) + 1 :], first)
        names[:] = sorted(name for name in names if stat.S_ISDIR(os.lstat(directory + b"/" + name).st_mode))
    found[b"."] = _describe(top, b".", first)
    return found


def _describe(path: bytes, name: bytes, first: dict[int, bytes]) -> Described:
    it = os.lstat(path)
    kind = stat.S_IFMT(it.st_mode)
    xattrs = tuple(sorted((key, os.getxattr(path, key, follow_symlinks=False)) for key in _names(path)))
    more: dict[str, Any] = {"xattrs": xattrs}
    if kind != stat.S_IFDIR:
        more |= {"same": first.setdefault(it.st_ino, name), "links": it.st_nlink}
    if kind == stat.S_IFREG:
        with open(path, "rb") as stream:
            more |= {"size": it.st_size, "content": hashlib.file_digest(stream, "sha256").hexdigest()}
    elif kind == stat.S_IFLNK:
        more |= {"target": os.readlink(path), "size": it.st_size}  # noqa: PTH115 - bytes
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        more["device"] = it.st_rdev
    return Described(
        stat.filemode(it.st_mode)[0], stat.S_IMODE(it.st_mode), it.st_uid, it.st_gid, it.st_mtime_ns, **more
    )


def _names(path: bytes) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)
