"""The structures of EROFS, as bytes (fs/erofs/erofs_fs.h, Documentation/filesystems/erofs.rst); no decisions."""

from __future__ import annotations

import struct
from collections.abc import Sequence

BITS = 12
BLOCK = 1 << BITS
SLOT = 32  # inodes are numbered by 32-byte slots
COMPACT, EXTENDED = 32, 64
FLAT_PLAIN, FLAT_INLINE, CHUNK_BASED = 0, 2, 4
HOLE = b"\xff\xff\xff\xff"  # in a chunk map

SUPER_AT = 1024
_MAGIC = 0xE0F5E1E2
_COMPAT_SUM, _COMPAT_MTIME = 0x1, 0x2
_INCOMPAT_CHUNKED = 0x4
_UUID = bytes.fromhex("00000000000040008000000000000001")
# magic, checksum, compat, block bits, slots, root, inodes, time, ns, blocks, meta, shared xattrs, UUID, name, incompat
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sI44x")
_INODE_COMPACT = struct.Struct("<HHHHIIIIHHI")
_INODE_EXTENDED = struct.Struct("<HHHHQIIIIqII16x")
_DIRENT = struct.Struct("<QHBx")
DIRENT = _DIRENT.size
_POLYNOMIAL = 0x82F63B78


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)  # noqa: PLW2901 - the register of a CRC
        table.append(value)
    return table


def crc32c(data: bytes) -> int:
    """As the kernel's crc32c(~0, …): the register is not inverted at the end."""
    table, register = _crc_table(), 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ table[(register ^ byte) & 0xFF]
    return register


def super_block(
    *, root: int, inodes: int, seconds: int, nanoseconds: int, blocks: int, meta: int, chunked: bool
) -> bytes:
    """The whole first block. ``root`` is a 16-bit number; ``seconds`` is what compact inodes have as their time."""

    def packed(checksum: int) -> bytes:
        features = _INCOMPAT_CHUNKED if chunked else 0
        compat = _COMPAT_SUM | _COMPAT_MTIME
        time = seconds & (1 << 64) - 1
        fields = (
            _MAGIC,
            checksum,
            compat,
            BITS,
            0,
            root,
            inodes,
            time,
            nanoseconds,
            blocks,
            meta,
            0,
            _UUID,
            b"",
            features,
        )
        return _SUPER.pack(*fields).ljust(BLOCK - SUPER_AT, b"\0")

    return bytes(SUPER_AT) + packed(crc32c(packed(0)))


def compact_inode(
    layout: int, xattrs: int, mode: int, links: int, size: int, union: int, number: int, uid: int, gid: int
) -> bytes:
    return _INODE_COMPACT.pack(layout << 1, xattrs, mode, links, size, 0, union, number, uid, gid, 0)


def extended_inode(
    layout: int, xattrs: int, mode: int, links: int, size: int, union: int, number: int, uid: int, gid: int,
    seconds: int, nanoseconds: int,
) -> bytes:  # fmt: skip
    format = layout << 1 | 1
    return _INODE_EXTENDED.pack(format, xattrs, mode, 0, size, union, number, uid, gid, seconds, nanoseconds, links)


def xattr_count(body: bytes) -> int:
    """i_xattr_icount: a header of 12 bytes counts as one, then every 4 bytes."""
    return 1 + (len(body) - 12) // 4 if body else 0


def split_names(names: Sequence[bytes]) -> list[tuple[int, int, int]]:
    """A directory's names, in order, by blocks: (first, behind the last, bytes used)."""
    blocks = []
    first = used = 0
    for index, name in enumerate(names):
        size = DIRENT + len(name)
        if used + size > BLOCK:
            blocks.append((first, index, used))
            first, used = index, 0
        used += size
    blocks.append((first, len(names), used))
    return blocks


def dirents(names: Sequence[bytes], numbers: Sequence[int], kinds: Sequence[int]) -> bytes:
    """One block of a directory: fixed-size entries, then their names; not padded."""
    at = DIRENT * len(names)
    parts = []
    pack = _DIRENT.pack
    for name, number, kind in zip(names, numbers, kinds, strict=True):
        parts.append(pack(number, at, kind))
        at += len(name)
    return b"".join((*parts, *names))
