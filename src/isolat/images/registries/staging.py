"""Blobs on their way in: one directory for each pull, and what came whole before a pull was killed.

::

    STATE_ROOT/images/incoming/blobs/sha256/HEX   whole blobs that no image has yet, root's and read-only
    STATE_ROOT/images/tmp/…/blobs                 of one pull (a build's directory): all that it needs, as links

What the store or an earlier pull has is linked in and not fetched again; what comes whole is linked out at once. So a
pull goes on where a killed one ended, and nothing that a pull stands on can be removed under it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from isolat.images.blobs import Blobs
from isolat.images.oci import Descriptor, hexadecimal

KEPT_S = 86400.0


class Kept:
    """What came whole and is in no image. Safe for several pulls at once."""

    def __init__(self, images: Path) -> None:
        self._dir = images / "incoming" / "blobs" / "sha256"

    def link(self, blob: Descriptor, target: Path) -> bool:
        """Make ``target`` the blob, if it is here."""
        path = self._dir / hexadecimal(blob.digest)
        try:
            if path.lstat().st_size != blob.size_bytes:  # a machine that lost its power
                path.unlink()
                return False
            os.utime(path)
            os.link(path, target)
        except FileNotFoundError:
            return False
        return True

    def keep(self, file: Path, digest: str) -> None:
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(file, self._dir / hexadecimal(digest))

    def forget(self, digests: Iterable[str]) -> None:
        """They are in the store now, or are not what they should be."""
        for digest in digests:
            (self._dir / hexadecimal(digest)).unlink(missing_ok=True)

    def sweep(self, kept_s: float = KEPT_S) -> int:
        """Remove what nobody has asked for so long. The bytes that this freed."""
        freed = 0
        with contextlib.suppress(FileNotFoundError):
            for path in self._dir.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found = path.lstat()
                    if time.time() - found.st_mtime >= kept_s:
                        path.unlink()
                        freed += found.st_size
        return freed

    @property
    def used_bytes(self) -> int:
        try:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(self._dir))
        except FileNotFoundError:
            return 0


class Incoming:
    """The blobs of one pull, by their digests. Nobody but root can write here."""

    def __init__(self, directory: Path, blobs: Blobs, kept: Kept) -> None:
        directory.mkdir(mode=0o711)
        self._dir = directory
        self._blobs = blobs
        self._kept = kept

    def path(self, digest: str) -> Path:
        return self._dir / hexadecimal(digest)

    def missing(self, wanted: Iterable[Descriptor]) -> list[Descriptor]:
        """Those that have to be fetched; the others are linked in."""
        return [one for one in wanted if not self.path(one.digest).exists() and not self._offer(one)]

    def _offer(self, blob: Descriptor) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if self._blobs.has(blob.digest, blob.size_bytes):
                os.link(self._blobs.path(blob.digest), self.path(blob.digest))
                return True
        return self._kept.link(blob, self.path(blob.digest))

    def create(self, digest: str) -> int:
        """The descriptor of a new file for a blob."""
        path = self._dir / f"{hexadecimal(digest)}.part"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)

    def whole(self, digest: str) -> None:
        """All of it has come, and its digest was found right."""
        path = self.path(digest)
        path.with_name(f"{path.name}.part").rename(path)
        self._kept.keep(path, digest)

    def adopt(self, file: Path, digest: str) -> None:
        """A file that somebody else wrote, who is gone: from now on it is root's and read-only."""
        os.chown(file, os.geteuid(), os.getegid(), follow_symlinks=False)
        file.chmod(0o444)
        file.rename(self.path(digest))
