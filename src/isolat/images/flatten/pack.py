"""A directory tree as the tar archive of an OCI layer: the same bytes for the same tree.

The other way of ``flatten``: of a mounted image, or of a tree that was just made. (What an environment has changed is
written by native/layer.c, which knows an overlay's marks.)

The tree may be of somebody who would like to be somewhere else: every name is looked up in its directory's descriptor
and never followed. Entries are in the order of their bytes, a directory before what is in it, a second name of a file
as a hard link to the first. The format is ustar with PAX headers (pax(1), "pax Extended Header") where ustar has no
room; a file with holes is GNU's sparse format 1.0 in PAX, which Go's and Python's readers know, too.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from isolat.errors import StoreError

BLOCK = 512
_CHUNK = 1 << 20
_HOLES_FROM = 8 << 20  # smaller holes are written as zeros: Docker 20 loads sparse files, but can't save them again
_OCTAL_7, _OCTAL_11 = 8**7 - 1, 8**11 - 1
_OVERLAY = (b"trusted.overlay.", b"user.overlay.")  # overlayfs's own marks: Documentation/filesystems/overlayfs.rst


class Writer(Protocol):
    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True)
class _Entry:
    """One name: where it is, and what it is."""

    directory: int  # descriptor of what it is in
    name: bytes
    path: bytes  # below the tree
    found: os.stat_result
    xattrs: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def here(self) -> bytes:
        """A path whose last part only is looked up, and not followed."""
        return b"/proc/self/fd/%d/%s" % (self.directory, self.name)


class _Open:
    """A directory that is gone through.

    It is closed while what is in it is gone through: a tree may be deeper than a process may have descriptors. Then it
    is found again as its child's ``..``, and must be the same.
    """

    def __init__(self, descriptor: int, prefix: bytes) -> None:
        self.descriptor = descriptor
        self.prefix = prefix
        found = os.fstat(descriptor)
        self._is = (found.st_dev, found.st_ino)
        try:
            self.names = iter(_names(descriptor))
        except OSError:
            self.leave()
            raise

    def leave(self) -> None:
        os.close(self.descriptor)
        self.descriptor = -1

    def come_back(self, child: int) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor = os.open("..", flags, dir_fd=child)
        found = os.fstat(self.descriptor)
        if (found.st_dev, found.st_ino) != self._is:
            raise StoreError(f"{os.fsdecode(self.prefix)} was moved while it was read", stage="packing a layer")

    def close(self) -> None:
        if self.descriptor >= 0:
            self.leave()


def pack(tree: Path, out: Writer, *, skip: Collection[str] = ()) -> str:
    """Write the archive and return its digest, which is the layer's diff id.

    ``skip``: paths below ``tree`` that are left out with all that is in them. Sockets are left out: an archive has no
    place for them. Raises OSError for what can't be read, StoreError for what is exchanged meanwhile.
    """
    packer = _Packer(out, frozenset(os.fsencode(name) for name in skip))
    packer.tree(tree)
    return packer.finish()


class _Packer:
    def __init__(self, out: Writer, skip: frozenset[bytes]) -> None:
        self._out = out
        self._skip = skip
        self._sha = hashlib.sha256()
        self._first: dict[tuple[int, int], bytes] = {}  # of a file with several names

    def finish(self) -> str:
        self._put(bytes(2 * BLOCK))
        return f"sha256:{self._sha.hexdigest()}"

    def tree(self, tree: Path) -> None:
        top = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack = [_Open(top, b"")]
        try:
            self._header(_Entry(top, b".", b"./", os.fstat(top), _xattrs(b"/proc/self/fd/%d/." % top)))
            while stack:
                here = stack[-1]
                name = next(here.names, None)
                if name is None:
                    if len(stack) > 1:
                        stack[-2].come_back(here.descriptor)
                    stack.pop().close()
                elif here.prefix + name not in self._skip:
                    inner = self._entry(here.descriptor, name, here.prefix + name)
                    if inner >= 0:
                        stack.append(_Open(inner, here.prefix + name + b"/"))
                        here.leave()
        finally:
            for directory in stack:
                directory.close()

    def _entry(self, directory: int, name: bytes, path: bytes) -> int:
        """Write one. Returns the descriptor of a directory, which is to be gone through next, else -1."""
        found = os.lstat(name, dir_fd=directory)
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFSOCK:
            return -1
        entry = _Entry(directory, name, path, found)
        entry = _Entry(directory, name, path, found, _xattrs(entry.here))
        if kind == stat.S_IFDIR:
            return self._directory(entry)
        if found.st_nlink > 1 and not self._is_first(entry):
            return -1
        if kind == stat.S_IFREG:
            self._file(entry)
        else:
            self._header(entry, link=os.readlink(name, dir_fd=directory) if kind == stat.S_IFLNK else b"")
        return -1

    def _directory(self, entry: _Entry) -> int:
        self._header(_Entry(entry.directory, entry.name, entry.path + b"/", entry.found, entry.xattrs))
        return os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=entry.directory)

    def _is_first(self, entry: _Entry) -> bool:
        """Whether this is the file's first name; a further one is written as a link to that."""
        key = (entry.found.st_dev, entry.found.st_ino)
        first = self._first.setdefault(key, entry.path)
        if first == entry.path:
            return True
        self._write_header(entry, b"1", 0, first, {})
        return False

    # contents

    def _file(self, entry: _Entry) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(entry.name, flags, dir_fd=entry.directory)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise StoreError(f"{os.fsdecode(entry.path)} was replaced while it was read", stage="packing a layer")
            parts = _parts(descriptor, found)
            if parts is None:
                self._write_header(entry, b"0", found.st_size, b"", {})
                self._data(descriptor, 0, found.st_size)
                self._pad(found.st_size)
            else:
                self._sparse(entry, descriptor, found.st_size, parts)
        finally:
            os.close(descriptor)

    def _sparse(self, entry: _Entry, descriptor: int, size: int, parts: list[tuple[int, int]]) -> None:
        """GNU tar's manual, "Storing Sparse Files", PAX format 1.0: the map stands before the data."""
        table = b"%d\n" % len(parts) + b"".join(b"%d\n%d\n" % part for part in parts)
        table += bytes(-len(table) % BLOCK)
        stored = len(table) + sum(length for _, length in parts)
        more = {
            b"GNU.sparse.major": b"1",
            b"GNU.sparse.minor": b"0",
            b"GNU.sparse.name": entry.path,
            b"GNU.sparse.realsize": b"%d" % size,
        }
        directory, slash, name = entry.path.rpartition(b"/")
        self._write_header(entry, b"0", stored, b"", more, name=directory + slash + b"GNUSparseFile.0/" + name)
        self._put(table)
        for start, length in parts:
            self._data(descriptor, start, length)
        self._pad(stored)

    def _data(self, descriptor: int, at: int, size: int) -> None:
        """Exactly so many bytes: what is cut off meanwhile is zero, what is appended is not taken."""
        while size:
            data = os.pread(descriptor, min(_CHUNK, size), at) or bytes(min(_CHUNK, size))
            self._put(data)
            at += len(data)
            size -= len(data)

    def _pad(self, size: int) -> None:
        self._put(bytes(-size % BLOCK))

    def _put(self, data: bytes) -> None:
        self._sha.update(data)
        self._out.write(data)

    # headers

    def _header(self, entry: _Entry, link: bytes = b"") -> None:
        self._write_header(entry, _TYPES[stat.S_IFMT(entry.found.st_mode)], 0, link, {})

    def _write_header(
        self, entry: _Entry, kind: bytes, size: int, link: bytes, more: dict[bytes, bytes], name: bytes = b""
    ) -> None:
        found = entry.found
        uid, gid = found.st_uid, found.st_gid
        name = name or entry.path
        records = dict(more)
        if len(name) > 100 or not name.isascii():
            records[b"path"] = name
        if len(link) > 100 or not link.isascii():
            records[b"linkpath"] = link
        records |= {key: b"%d" % value for key, value in ((b"uid", uid), (b"gid", gid)) if value > _OCTAL_7}
        if size > _OCTAL_11:
            records[b"size"] = b"%d" % size
        seconds, rest = divmod(found.st_mtime_ns, 10**9)
        if rest or not 0 <= seconds <= _OCTAL_11:
            records[b"mtime"] = _decimal(found.st_mtime_ns)
        if kind != b"1":
            records |= {b"SCHILY.xattr." + key: value for key, value in sorted(entry.xattrs.items())}
        if records:
            self._records(records)
        device = found.st_rdev if kind in (b"3", b"4") else 0
        self._put(
            _ustar(
                name[:100],
                found.st_mode & 0o7777,
                min(uid, _OCTAL_7),
                min(gid, _OCTAL_7),
                min(size, _OCTAL_11),
                min(max(seconds, 0), _OCTAL_11),
                kind,
                link[:100],
                device,
            )
        )

    def _records(self, records: dict[bytes, bytes]) -> None:
        data = b"".join(_record(key, value) for key, value in records.items())
        self._put(_ustar(b"PaxHeaders.0", 0o644, 0, 0, len(data), 0, b"x", b"", 0))
        self._put(data + bytes(-len(data) % BLOCK))


_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}


def _names(directory: int) -> list[bytes]:
    return sorted(os.fsencode(name) for name in os.listdir(directory))


def _parts(descriptor: int, found: os.stat_result) -> list[tuple[int, int]] | None:
    """Where a file with holes has data, as (start, length); None for one that is to be written whole."""
    if found.st_size - found.st_blocks * 512 < _HOLES_FROM:
        return None
    return list(_data_parts(descriptor, found.st_size))


def _data_parts(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """lseek(2): SEEK_DATA gives ENXIO after the last of it."""
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        at = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        yield start, at - start
    if at < size or not size:
        yield size, 0  # a last empty part says how far the hole goes, for readers that look at parts only


def _xattrs(path: bytes) -> dict[bytes, bytes]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENODATA):
            return {}
        raise
    found = {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names}
    return {key: value for key, value in found.items() if not key.startswith(_OVERLAY)}


def _record(key: bytes, value: bytes) -> bytes:
    """``LENGTH KEY=VALUE\\n``, where the length counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _decimal(ns: int) -> bytes:
    sign, ns = ("-" if ns < 0 else ""), abs(ns)
    return f"{sign}{ns // 10**9}.{ns % 10**9:09}".rstrip("0").rstrip(".").encode()


def _ustar(
    name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, kind: bytes, link: bytes, device: int
) -> bytes:
    major, minor = (os.major(device), os.minor(device)) if device else (0, 0)
    header = bytearray(
        struct.pack(
            "100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x",
            *(name, b"%07o" % mode, b"%07o" % uid, b"%07o" % gid, b"%011o" % size, b"%011o" % mtime),
            *(b" " * 8, kind, link, b"ustar\0", b"00", b"", b"", b"%07o" % major, b"%07o" % minor, b""),
        )
    )
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
