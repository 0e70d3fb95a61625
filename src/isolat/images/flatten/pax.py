"""PAX records (pax(1), "pax Extended Header"): read strictly, and what they say of attributes and sparse files.

A record is ``LENGTH NAME=VALUE\\n`` with the length of the whole record in decimal. Names and values are bytes here:
nothing is decoded, whatever ``hdrcharset`` says.
"""

from __future__ import annotations

import binascii
import struct

from isolat.images.flatten.bad import Bad
from isolat.images.flatten.numbers import decimal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SEGMENTS_MAX = 100_000
OFFSET_MAX = (1 << 63) - 1
_SCHILY = b"SCHILY.xattr."
_LIBARCHIVE = b"LIBARCHIVE.xattr."
_XATTR_NAME_MAX = 255  # linux/limits.h: XATTR_NAME_MAX
_XATTR_VALUE_MAX = 65535  # erofs_xattr_entry.e_value_size has 16 bits

# fs/erofs/erofs_fs.h: EROFS_XATTR_INDEX_*; the kernel's handlers for access lists have no name of their own
_WHOLE = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
# overlayfs's own marks would steer the overlay that is mounted on the image; labels are the host's policy's to give.
_DROPPED = (b"trusted.overlay.", b"user.overlay.", b"security.selinux")
_HEADER = struct.Struct("<IB7x")
_ENTRY = struct.Struct("<BBH")

Segments = list[tuple[int, int]]


class Records:
    """The records of one extended header, the last of each name; those of old sparse maps in their order."""

    __slots__ = ("map", "values")

    def __init__(self, data: bytes) -> None:
        self.values: dict[bytes, bytes] = {}
        self.map: list[bytes] = []
        at, end = 0, len(data)
        while at < end:
            at = self._one(data, at, end)

    def _one(self, data: bytes, at: int, end: int) -> int:
        space = data.find(b" ", at, at + 20)
        if space < 0 or data[at:space].strip(b"0123456789") or space == at:
            raise Bad("bad-header", "a PAX record without a length")
        after = at + int(data[at:space])
        if not space + 2 < after <= end or data[after - 1] != 0x0A:
            raise Bad("bad-header", "a PAX record of a wrong length")
        name, equals, value = data[space + 1 : after - 1].partition(b"=")
        if not equals or not name or b"\0" in name:
            raise Bad("bad-header", "a PAX record without a name")
        if name in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            self._old_map(name, value)
        self.values[name] = value
        return after

    def _old_map(self, name: bytes, value: bytes) -> None:
        expected = b"GNU.sparse.numbytes" if len(self.map) % 2 else b"GNU.sparse.offset"
        if name != expected:
            raise Bad("bad-header", "a sparse map out of order")
        self.map.append(value)


def segments(numbers: Iterable[bytes], size: int) -> Segments:
    """Pairs of offset and length as they are written, checked against the file's size."""
    values = [decimal(text, OFFSET_MAX) for text in numbers]
    if len(values) % 2:
        raise Bad("bad-header", "a sparse map with half an entry")
    return checked(list(zip(values[::2], values[1::2], strict=True)), size)


def checked(found: Segments, size: int) -> Segments:
    """In order, apart from each other, within the file; empty ones left out. Raises Bad (bad-size)."""
    if len(found) > SEGMENTS_MAX:
        raise Bad("too-large", f"a sparse map of {len(found)} pieces; at most {SEGMENTS_MAX} are read")
    end = 0
    for offset, length in found:
        if offset < end or length < 0 or offset + length > size:
            raise Bad("bad-size", "a sparse map whose pieces overlap or lie outside of the file")
        end = offset + length
    return [piece for piece in found if piece[1]]


def xattrs(values: dict[bytes, bytes], most: int) -> bytes:
    """The extended attributes as EROFS keeps them beside an inode; empty when there are none.

    ``SCHILY.xattr.NAME`` has the value as it is and wins over ``LIBARCHIVE.xattr.NAME`` (URL-encoded name, value in
    base64). Left out, as by umoci on a file system that doesn't know them: names of no namespace of EROFS's.
    Raises Bad (bad-header, too-large).
    """
    found: dict[tuple[int, bytes], bytes] = {}
    for prefix in (_LIBARCHIVE, _SCHILY):
        for record, value in values.items():
            if record.startswith(prefix):
                name = record[len(prefix) :]
                if prefix is _LIBARCHIVE:
                    name, value = _libarchive(name, value)  # noqa: PLW2901 - the same thing, decoded
                place = _place(name)
                if place is not None:
                    found[place] = value
    return _body(found, most) if found else b""


def _libarchive(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    first, *rest = name.split(b"%")
    try:
        decoded = b"".join([first, *(bytes.fromhex(part[:2].decode()) + part[2:] for part in rest)])
        return decoded, binascii.a2b_base64(value + b"=" * (-len(value) % 4), strict_mode=bool(value))
    except (ValueError, binascii.Error):
        raise Bad("bad-header", "an extended attribute whose name or value can't be decoded") from None


def _place(name: bytes) -> tuple[int, bytes] | None:
    if name.startswith(_DROPPED):
        return None
    if name in _WHOLE:
        return _WHOLE[name], b""
    for prefix, index in _PREFIXES:
        if name.startswith(prefix):
            if not len(prefix) < len(name) <= _XATTR_NAME_MAX or b"\0" in name:
                raise Bad("bad-header", "an extended attribute with an impossible name")
            return index, name[len(prefix) :]
    return None


def _body(found: dict[tuple[int, bytes], bytes], most: int) -> bytes:
    parts = [_HEADER.pack(0, 0)]
    size = _HEADER.size
    for (index, name), value in sorted(found.items()):
        if len(value) > _XATTR_VALUE_MAX:
            raise Bad("too-large", f"an extended attribute of {len(value)} bytes; at most {_XATTR_VALUE_MAX} are kept")
        entry = _ENTRY.pack(len(name), index, len(value)) + name + value
        parts.append(entry + bytes(-len(entry) % 4))
        size += len(parts[-1])
    if size > most:
        raise Bad("too-large", f"extended attributes of {size} bytes at one file; at most {most} are kept")
    return b"".join(parts)
