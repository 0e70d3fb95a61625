"""Where blobs arrive: one directory of nobody's, kept after a kill, so that a pull goes on with what came whole.

::

    STATE_ROOT/images/incoming/blobs/sha256/HEX   whole blobs: by skopeo's word, so verified before they are taken in
    STATE_ROOT/images/incoming/ID                 one pull: blobs under way

What the store has already is linked in beforehand, so that it is not fetched again. As soon as nobody writes any more a
blob becomes root's and read-only, and is verified only then.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from isolat.errors import InvalidImage
from isolat.images.blobs import Blobs
from isolat.images.oci import Descriptor, hexadecimal

_NOBODY = 65534
_KEPT_S = 86400.0


class Staging:
    """Of one store. Safe for several pulls at once."""

    def __init__(self, images: Path, blobs: Blobs) -> None:
        self.directory = images / "incoming"
        self.blobs_directory = self.directory / "blobs"
        self._dir = self.blobs_directory / "sha256"
        self._blobs = blobs

    def open(self) -> None:
        for directory in (self.directory, self.blobs_directory, self._dir):
            directory.mkdir(mode=0o700, exist_ok=True)
            os.chown(directory, _NOBODY, _NOBODY)

    def sweep(self, kept_s: float = _KEPT_S) -> int:
        """Remove pulls that were killed, and blobs that nobody has asked for so long. The bytes that this freed."""
        freed = 0
        with contextlib.suppress(FileNotFoundError):
            for path in self.directory.iterdir():
                if path != self.blobs_directory:
                    freed += sum(file.stat().st_size for file in path.glob("oci-put-blob*"))
                    shutil.rmtree(path, ignore_errors=True)
            for path in self._dir.iterdir():
                found = path.lstat()
                if time.time() - found.st_mtime > kept_s:
                    freed += found.st_size if found.st_nlink == 1 else 0
                    path.unlink(missing_ok=True)
        return freed

    @contextlib.contextmanager
    def pull(self) -> Iterator[Path]:
        """A directory for one pull, gone at its end."""
        self.open()
        path = self.directory / secrets.token_hex(8)
        path.mkdir(mode=0o700)
        os.chown(path, _NOBODY, _NOBODY)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def offer(self, wanted: Sequence[Descriptor]) -> None:
        """Link in what the store has."""
        for one in wanted:
            if self._blobs.has(one.digest):
                with contextlib.suppress(FileExistsError):
                    os.link(self._blobs.path(one.digest), self._dir / hexadecimal(one.digest))

    def collect(self, layout: Path, wanted: Sequence[Descriptor]) -> None:
        """Take over what came into a plain directory (skopeo's ``dir:``), under its digits."""
        for one in wanted:
            with contextlib.suppress(FileNotFoundError):
                (layout / hexadecimal(one.digest)).rename(self._dir / hexadecimal(one.digest))

    def put(self, one: Descriptor, data: bytes) -> None:
        """A document that came another way."""
        path = self._dir / hexadecimal(one.digest)
        path.unlink(missing_ok=True)
        with path.open("xb") as stream:
            stream.write(data)

    def arrived(self, wanted: Sequence[Descriptor]) -> int:
        """How many bytes of these have come whole."""
        found = 0
        for one in wanted:
            with contextlib.suppress(FileNotFoundError):
                found += (self._dir / hexadecimal(one.digest)).lstat().st_size
        return found

    def seal(self, wanted: Sequence[Descriptor]) -> None:
        """Nobody may change these any more. Raises InvalidImage for what is no plain file, or did not come."""
        for one in wanted:
            if self._blobs.has(one.digest):
                continue
            path = self._dir / hexadecimal(one.digest)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise InvalidImage(f"the blob {one.digest} did not come", stage="missing-layer") from error
            try:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode) or (found.st_nlink > 1 and found.st_uid == _NOBODY):
                    raise InvalidImage(f"the blob {one.digest} is no plain file", stage="bad-blob")
                os.fchown(descriptor, os.geteuid(), os.getegid())
                os.fchmod(descriptor, 0o444)
            finally:
                os.close(descriptor)

    def find(self, digest: str) -> Path:
        """Where it lies: in the store, else here."""
        return self._blobs.path(digest) if self._blobs.has(digest) else self._dir / hexadecimal(digest)

    def forget(self, wanted: Sequence[Descriptor]) -> None:
        """They are in the store now, or are not what they should be."""
        for one in wanted:
            (self._dir / hexadecimal(one.digest)).unlink(missing_ok=True)
