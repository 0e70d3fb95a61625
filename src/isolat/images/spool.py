"""An archive from a stranger, taken apart into files of ours: each member's content under a number, its name only data.

No path of the archive is ever opened. Symbolic and hard links, which old ``docker save`` uses for layers that several
images share, are followed as names among the members.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from isolat.errors import InvalidImage, StoreError
from isolat.images.flatten.bad import Bad, escaped
from isolat.images.flatten.flattening import Limits
from isolat.images.flatten.source import Source
from isolat.images.flatten.tar import FILE, LINK, SYMLINK, Bounds, Entry, Reader
from isolat.images.oci import DOCUMENT_BYTES_MAX
from isolat.images.opening import HEAD_BYTES, More, invalid
from isolat.images.progress import Progress, no_progress

WHAT = "the archive"
BLOBS = "blobs/sha256/"
_ENTRIES_MAX = 20_000
_RESERVE_BYTES = 64 << 20  # of the disk, for others
_LINKS_MAX = 40  # as the kernel follows (path_resolution(7))
_TELL_BYTES = 8 << 20


@dataclass(frozen=True)
class Member:
    """One regular file of the archive: where its content lies, and the digest of that."""

    file: Path
    digest: str
    size_bytes: int
    head: bytes


class Spool:
    """The members of one archive, in a directory of its own reader. Raises InvalidImage for whatever is wrong."""

    def __init__(self, directory: Path, limits: Limits | None = None) -> None:
        self._dir = directory
        limits = limits or Limits()
        self._left = limits.total_bytes
        self._xattr_bytes = limits.xattr_bytes  # members may have some, which nobody asks for
        self._members: dict[str, Member] = {}
        self._links: dict[str, str] = {}
        self._digests: dict[str, Member] = {}
        self._count = 0

    def take(self, more: More, progress: Progress = no_progress) -> None:
        """The whole archive, in one pass. Raises InvalidImage, StoreError where there is no room."""
        bounds = Bounds(_ENTRIES_MAX, self._left, self._xattr_bytes)
        came = 0

        def stretch() -> memoryview:
            nonlocal came
            found = more()
            if (came + len(found)) // _TELL_BYTES > came // _TELL_BYTES:
                progress("reading the archive, bytes", came, 0)
            came += len(found)
            return memoryview(found)

        reader = Reader(Source(stretch), bounds)
        try:
            for entry in reader:
                self._entry(reader, entry)
        except Bad as bad:
            raise invalid(bad, WHAT) from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_space(error.errno or 0) from error
            raise
        self._digests = {member.digest: member for member in self._members.values()}
        self._check_names()

    def _entry(self, reader: Reader, entry: Entry) -> None:
        if entry.kind in (FILE, LINK, SYMLINK):
            name = _clean(entry.name)
            self._links.pop(name, None)
            old = self._members.pop(name, None)
            if old is not None:
                old.file.unlink()
                self._left += old.size_bytes
            if entry.kind == FILE:
                self._members[name] = self._content(reader, entry)
            else:
                self._links[name] = _target(name, entry)

    def _content(self, reader: Reader, entry: Entry) -> Member:
        if entry.segments is not None:
            raise Bad("bad-archive", "it has a sparse file, and nothing that belongs into it is one", entry.name)
        if entry.stored > self._left:
            raise Bad("too-large", "it is larger than is allowed", entry.name)
        disk = os.statvfs(self._dir)
        if entry.stored > max(0, disk.f_bavail * disk.f_frsize - _RESERVE_BYTES):
            raise _no_space(errno.ENOSPC)
        self._left -= entry.stored
        file = self._dir / f"blob-{self._count}"
        self._count += 1
        digest, head = hashlib.sha256(), b""
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        with open(descriptor, "wb", buffering=0) as stream:
            for piece in reader.data(entry.stored):
                digest.update(piece)
                head = head or bytes(piece[:HEAD_BYTES])
                rest = piece
                while rest:
                    rest = rest[stream.write(rest) :]
        return Member(file, f"sha256:{digest.hexdigest()}", entry.stored, head)

    def _check_names(self) -> None:
        """What is called by a digest must have it."""
        for name, member in self._members.items():
            if name.startswith(BLOBS) and member.digest != f"sha256:{name.removeprefix(BLOBS)}":
                raise InvalidImage(
                    f"{WHAT}: {escaped(name.encode())} is something else: {member.digest}", stage="digest-mismatch"
                )

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def member(self, name: str) -> Member:
        """Whatever lies under this name, through links. Raises InvalidImage (missing-layer)."""
        found = self._find(posixpath.normpath(name))
        if found is None:
            raise InvalidImage(f"{WHAT} has no {escaped(name.encode(errors='replace'))}", stage="missing-layer")
        return found

    def _find(self, name: str) -> Member | None:
        for _ in range(_LINKS_MAX):
            if name in self._members:
                return self._members[name]
            if name not in self._links:
                return None
            name = self._links[name]
        raise InvalidImage(f"{WHAT} has links that lead in a circle", stage="bad-archive")

    def blob(self, digest: str) -> Member:
        """By its digest, whatever it is called. Raises InvalidImage (missing-layer)."""
        found = self._digests.get(digest)
        if found is None:
            raise InvalidImage(f"{WHAT} has no blob {digest}", stage="missing-layer")
        return found

    def has_blob(self, digest: str) -> bool:
        return digest in self._digests

    def read(self, member: Member) -> bytes:
        """A document. Raises InvalidImage (too-large)."""
        if member.size_bytes > DOCUMENT_BYTES_MAX:
            raise InvalidImage(
                f"{WHAT} has a document of {member.size_bytes} bytes, and at most {DOCUMENT_BYTES_MAX} are read",
                stage="too-large",
            )
        return member.file.read_bytes()


def _no_space(number: int) -> StoreError:
    return StoreError(
        "there is no room for the archive", stage="no-space", errno=number,
        hint="free some space on the disk of the state root",
    )  # fmt: skip


def _clean(raw: bytes) -> str:
    """A name in the archive, without ``./``. Raises Bad for one that leads out of it."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise Bad("bad-archive", f"a name that is no UTF-8: {escaped(raw)}", raw) from None
    name = posixpath.normpath(text)
    if text.startswith("/") or name == ".." or name.startswith("../") or "\0" in name:
        raise Bad("bad-archive", f"a name that leads out of it: {escaped(raw)}", raw)
    return name


def _target(name: str, entry: Entry) -> str:
    """The name that a link means: of a symbolic one beside it, of a hard one from the top."""
    text = entry.link.decode(errors="replace")
    inside = text if entry.kind == LINK else posixpath.join(posixpath.dirname(name), text)
    return posixpath.normpath(inside)
