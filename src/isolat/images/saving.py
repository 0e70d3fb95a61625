"""Images into an archive: an OCI image layout, and for Docker the same with ``manifest.json`` (its form since 25).

The same images give the same bytes: members in order, no times, no owners. Layers go as they are stored, compressed as
they came; ``docker load`` and skopeo open them (moby, image/tarexport/load.go).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import stat
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from isolat.errors import NotFound, StoreError, UsageError
from isolat.images.archives import FULL_NAME, REF_NAME
from isolat.images.image import Image
from isolat.images.oci import INDEX, Manifest, dump, hexadecimal
from isolat.images.opening import never
from isolat.images.progress import Progress, no_progress
from isolat.images.reference import parse_reference
from isolat.images.spool import BLOBS

if TYPE_CHECKING:
    from isolat.images.store import ImageStore

DOCKER, OCI = "docker-archive", "oci-archive"
FORMATS = (DOCKER, OCI)
_CHUNK_BYTES = 1 << 20
_TELL_BYTES = 8 << 20
_POLL_MS = 500
_BLOCK = 512


@dataclass
class _Saved:
    """One image, and the names that it was asked for by."""

    image: Image
    manifest: Manifest
    names: list[str] = field(default_factory=list)


def save(
    store: ImageStore,
    names: Sequence[str],
    descriptor: int,
    *,
    format: str = DOCKER,
    gone: Callable[[], bool] = never,
    progress: Progress = no_progress,
) -> int:
    """Write the images into a file or pipe; how many bytes. An image that is named by its digest has no name in it.

    Raises NotFound, Conflict and Unsupported before anything is written; StoreError when it can't be (no-space, closed)
    or when a blob is damaged; ConnectionResetError once the caller has gone.
    """
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}", hint=f"it is one of {', '.join(FORMATS)}")
    saved = _resolve(store, names)
    documents = {"oci-layout": dump({"imageLayoutVersion": "1.0.0"}), "index.json": _index(saved)}
    if format == DOCKER:
        documents["manifest.json"] = _table(saved)
    blobs = {one.digest: one.size_bytes for each in saved for one in each.manifest.blobs}
    blobs |= {each.manifest.digest: len(each.manifest.raw) for each in saved}
    out = _Output(descriptor, gone)
    with contextlib.ExitStack() as opened:
        streams: dict[str, BinaryIO] = {}
        for each in saved:
            _open(store, each, opened, streams)
        for directory in ("blobs/", BLOBS):
            out.write(_header(directory, 0, tarfile.DIRTYPE))
        _write_blobs(streams, blobs, out, progress)
    for name, data in sorted(documents.items()):
        out.write(_header(name, len(data)) + data + bytes(-len(data) % _BLOCK))
    out.write(bytes(2 * _BLOCK))
    return out.written


def _open(store: ImageStore, each: _Saved, opened: contextlib.ExitStack, streams: dict[str, BinaryIO]) -> None:
    """Its blobs, before anything is written: whoever removes the image from now on takes nothing from the archive."""
    name = each.names[0] if each.names else each.image.digest[:12]
    wanted = {each.manifest.digest, *(one.digest for one in each.manifest.blobs)}
    for digest in wanted - streams.keys():
        try:
            streams[digest] = opened.enter_context(open(store.blobs.path(digest), "rb", buffering=0))  # noqa: SIM115
        except FileNotFoundError:
            raise NotFound(
                f"the image {name} can't be saved: its blob {digest} is not there",
                hint="it was removed in this moment, or is damaged: `isolat system check` tells",
            ) from None
        except OSError as error:
            raise StoreError(
                f"the image {name} can't be saved: its blob {digest} can't be read: {error.strerror}",
                stage="read",
                errno=error.errno or 0,
            ) from error


def _unwritten(error: OSError) -> StoreError:
    if error.errno == errno.EPIPE:
        return StoreError("whoever reads the archive has closed it", stage="closed", errno=errno.EPIPE)
    stage = "no-space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "write"
    return StoreError(f"the archive can't be written: {error.strerror}", stage=stage, errno=error.errno or 0)


def _resolve(store: ImageStore, names: Sequence[str]) -> list[_Saved]:
    found: dict[str, _Saved] = {}
    for name in names:
        image = store.resolve(name)
        each = found.setdefault(image.digest, _Saved(image, store.manifest(image)))
        with contextlib.suppress(UsageError):
            full = parse_reference(name).name
            if full in image.names and full not in each.names:
                each.names.append(full)
    for each in found.values():
        each.names.sort()
    return sorted(found.values(), key=lambda each: each.image.digest)


def _index(saved: Sequence[_Saved]) -> bytes:
    """Without platforms: who reads an index of several takes the one that is for it, and here each is an image."""
    manifests: list[dict[str, Any]] = []
    for each in saved:
        described = {
            "mediaType": each.manifest.media_type,
            "digest": each.manifest.digest,
            "size": len(each.manifest.raw),
        }
        notes = [{REF_NAME: name, FULL_NAME: _full(name)} for name in each.names]
        manifests += [described | {"annotations": one} for one in notes] or [described]
    return dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests})


def _full(name: str) -> str:
    reference = parse_reference(name)
    return f"{reference.registry}/{reference.path}:{reference.tag}"


def _table(saved: Sequence[_Saved]) -> bytes:
    """``manifest.json``, in Docker's words."""
    entries = [
        dump(
            {
                "Config": BLOBS + hexadecimal(each.manifest.config.digest),
                "RepoTags": each.names or None,
                "Layers": [BLOBS + hexadecimal(one.digest) for one in each.manifest.layers],
            }
        )
        for each in saved
    ]
    return b"[" + b",".join(entries) + b"]"


def _write_blobs(streams: Mapping[str, BinaryIO], blobs: dict[str, int], out: _Output, progress: Progress) -> None:
    total, done = sum(blobs.values()), 0
    progress("writing the archive, bytes", 0, total)
    for digest, size in sorted(blobs.items()):
        out.write(_header(BLOBS + hexadecimal(digest), size))
        found, left = hashlib.sha256(), size
        while left and (chunk := streams[digest].read(min(left, _CHUNK_BYTES))):
            found.update(chunk)
            out.write(chunk)
            left -= len(chunk)
            done += len(chunk)
            if done % _TELL_BYTES < len(chunk):
                progress("writing the archive, bytes", done, total)
        if left or found.hexdigest() != hexadecimal(digest):
            raise StoreError(
                f"the blob {digest} is damaged", stage="digest-mismatch", hint="remove the image, and pull it again"
            )
        out.write(bytes(-size % _BLOCK))
    progress("writing the archive, bytes", total, total)


def _header(name: str, size: int, type: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = type, size
    info.mode = 0o755 if type == tarfile.DIRTYPE else 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


class _Output:
    """A descriptor to write to, without ever waiting in a way that outlasts the caller."""

    def __init__(self, descriptor: int, gone: Callable[[], bool]) -> None:
        self._descriptor = descriptor
        self._gone = gone
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise UsageError("the archive can't be written into a directory")
        # A pipe that has room at all has it for so much (pipe(7)): a write doesn't wait then
        self._step = _CHUNK_BYTES if stat.S_ISREG(kind) else select.PIPE_BUF
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self.written = 0

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            while not self._poll.poll(_POLL_MS):
                if self._gone():
                    raise ConnectionResetError("the caller has gone")
            try:
                done = os.write(self._descriptor, rest[: self._step])
            except ConnectionResetError:
                raise
            except OSError as error:
                raise _unwritten(error) from error
            self.written += done
            rest = rest[done:]
