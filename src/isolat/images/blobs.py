"""The content store: every blob under its own digest, as it came, so that it can be pushed again unchanged.

::

    STATE_ROOT/images/blobs/sha256/HEX    root's, 0444

The layout is that of an OCI image layout's ``blobs`` (image-spec, image-layout.md), so skopeo reads it in place
(``--src-shared-blob-dir``). What is in it has been verified by whoever took it in; ``verify`` looks again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from isolat.errors import InvalidImage, NotFound
from isolat.images import durable
from isolat.images.oci import digest_of, hexadecimal


class Blobs:
    """Every operation is whole or not at all. Removing is for those who hold the store's lock."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._dir = directory / "sha256"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)  # an image may be private: other users of this machine are not let in
        self._dir.mkdir(mode=0o755, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be. Raises InvalidImage for what is no sha256 digest."""
        return self._dir / hexadecimal(digest)

    def has(self, digest: str, size_bytes: int = -1) -> bool:
        """``size_bytes``: what it must have; less is what a power cut may have left of it."""
        try:
            return self.path(digest).stat().st_size == size_bytes or size_bytes < 0
        except FileNotFoundError:
            return False

    def take(self, file: Path, digest: str) -> None:
        """Take in a file that somebody has just verified: it becomes root's and read-only, by a link.

        It is on the disk already; that it is here is only after ``sync``.
        """
        target = self.path(digest)
        os.chown(file, os.geteuid(), os.getegid(), follow_symlinks=False)
        file.chmod(0o444)
        try:
            os.link(file, target, follow_symlinks=False)
        except FileExistsError:
            if file.stat().st_size != target.stat().st_size:
                temporary = self._dir / f".{secrets.token_hex(8)}"
                os.link(file, temporary, follow_symlinks=False)
                temporary.rename(target)

    def sync(self) -> None:
        """Have on the disk which blobs there are."""
        durable.sync([self._dir])

    def put(self, data: bytes) -> str:
        """Keep a document. Returns its digest."""
        digest = digest_of(data)
        if not self.has(digest, len(data)):
            temporary = self._dir / f".{secrets.token_hex(8)}"
            try:
                with temporary.open("xb") as stream:
                    stream.write(data)
                durable.sync([temporary])
                self.take(temporary, digest)
            finally:
                temporary.unlink(missing_ok=True)
        return digest

    def read(self, digest: str, most_bytes: int) -> bytes:
        """A document, verified again. Raises NotFound, InvalidImage when it is too large or not what it should be."""
        return read_blob(self.path(digest), digest, most_bytes)

    def verify(self, digest: str) -> None:
        """Read it whole. Raises NotFound, InvalidImage when its bytes are not those of its digest."""
        verify_file(self.path(digest), digest)

    def all(self) -> Iterator[tuple[str, int]]:
        """Digest and bytes of each."""
        for entry in os.scandir(self._dir):
            if not entry.name.startswith("."):
                yield f"sha256:{entry.name}", entry.stat(follow_symlinks=False).st_size

    def remove(self, digest: str) -> int:
        """How many bytes that freed; none when it was not there."""
        path = self.path(digest)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        return size

    def sweep(self) -> None:
        """Remove what a killed ``put`` left."""
        for path in self._dir.glob(".*"):
            path.unlink(missing_ok=True)


def read_blob(path: Path, digest: str, most_bytes: int) -> bytes:
    """A small blob from anywhere, never through a link. Raises NotFound, InvalidImage."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"the blob {digest} is not there", hint="pull the image again") from None
    except OSError as error:
        raise InvalidImage(f"the blob {digest} can't be opened: {error.strerror}", stage="bad-blob") from error
    with open(descriptor, "rb") as stream:
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise InvalidImage(f"the blob {digest} has more than the {most_bytes} bytes it may have", stage="too-large")
    if digest_of(data) != digest:
        raise InvalidImage(f"the blob {digest} is something else: {digest_of(data)}", stage="digest-mismatch")
    return data


def verify_file(path: Path, digest: str) -> None:
    """Read a blob whole. Raises NotFound, InvalidImage when its bytes are not those of its digest."""
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise NotFound(f"the blob {digest} is not there", hint="pull the image again") from None
    if found != hexadecimal(digest):
        raise InvalidImage(
            f"the blob {digest} is damaged: its bytes are those of sha256:{found}",
            stage="digest-mismatch",
            hint="remove the image, and pull it again",
        )
