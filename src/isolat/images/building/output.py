"""What a build leaves, taken in: read as what a stranger wrote, copied, verified, and given to the store.

The sandbox is gone by now, so nothing changes while it is read. But everything below the directory is the build's: any
name may be a link, a FIFO or a mountain of bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from isolat.errors import InvalidImage
from isolat.images.oci import (
    DOCUMENT_BYTES_MAX,
    Descriptor,
    Manifest,
    check_together,
    digest_of,
    hexadecimal,
    parse_config,
    parse_manifest,
    write_manifest,
)

_CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def _opened(directory: Path, *names: str) -> Iterator[BinaryIO]:
    """A regular file below the directory, with no link on the way to it."""
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = inner
        file = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    except OSError as error:
        raise InvalidImage(
            f"the build left no image: {'/'.join(names)}: {error.strerror}", stage="bad-layout", errno=error.errno or 0
        ) from error
    finally:
        os.close(at)
    with open(file, "rb") as stream:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise InvalidImage(f"the build left no image: {'/'.join(names)} is no file", stage="bad-layout")
        yield stream


def _document(directory: Path, *names: str) -> bytes:
    with _opened(directory, *names) as stream:
        data = stream.read(DOCUMENT_BYTES_MAX + 1)
    if len(data) > DOCUMENT_BYTES_MAX:
        raise InvalidImage(f"the build's {names[-1]} is too large", stage="too-large")
    return data


def _blob(directory: Path, digest: str) -> bytes:
    data = _document(directory, "blobs", "sha256", hexadecimal(digest))
    if digest_of(data) != digest:
        raise InvalidImage(f"the build's blob {digest} is something else: {digest_of(data)}", stage="digest-mismatch")
    return data


def manifest(layout: Path, known: Mapping[str, Descriptor], image: str) -> tuple[bytes, bytes, list[Descriptor]]:
    """The image's manifest as the store is to have it, its configuration, and the layers that have to be copied.

    ``known``: layers that the store has, by their uncompressed digest: those are named as they are there. ``image``:
    the digest that the configuration must have. Raises InvalidImage.
    """
    found = parse_manifest(_blob(layout, _only_manifest(layout)))
    if not isinstance(found, Manifest):
        raise InvalidImage("the build left an index instead of an image", stage="bad-manifest")
    if found.config.digest != image:
        raise InvalidImage(f"the build left {found.config.digest} instead of {image}", stage="bad-manifest")
    raw_config = _blob(layout, found.config.digest)
    config = parse_config(raw_config)
    check_together(found, config)
    layers, copied = [], {}
    for diff_id, layer in zip(config.diff_ids, found.layers, strict=True):
        layers.append(known.get(diff_id, layer))
        if diff_id not in known:
            copied[layer.digest] = layer  # steps that change nothing have the same one
    described = Descriptor(found.config.media_type, found.config.digest, len(raw_config))
    return write_manifest(described, layers), raw_config, list(copied.values())


def _only_manifest(layout: Path) -> str:
    try:
        index = json.loads(_document(layout, "index.json"))
        (one,) = index["manifests"]
        return str(one["digest"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidImage(f"the build's index is malformed: {error}", stage="bad-manifest") from error


def copy(layout: Path, layer: Descriptor, target: Path) -> None:
    """One blob out of the layout, verified on the way. Raises InvalidImage."""
    digest, size = hashlib.sha256(), 0
    with _opened(layout, "blobs", "sha256", hexadecimal(layer.digest)) as source, target.open("xb") as stream:
        while chunk := source.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > layer.size_bytes:
                break
            digest.update(chunk)
            stream.write(chunk)
    if size != layer.size_bytes or digest.hexdigest() != hexadecimal(layer.digest):
        raise InvalidImage(f"the build's layer {layer.digest} is something else", stage="digest-mismatch")
