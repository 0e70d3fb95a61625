"""Whether a store is what it says: every name, description, file and blob looked at, nothing changed.

What a killed operation may leave (a build directory without a builder, blobs that nobody names) is no damage: the next
opening of the store removes it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from isolat.errors import IsolatError, StoreError
from isolat.images.image import Image
from isolat.images.intake import flattened_again
from isolat.images.oci import Manifest
from isolat.images.progress import Progress, no_progress
from isolat.images.store import ImageStore

_MAGIC_AT, _MAGIC = 1024, 0xE0F5E1E2  # struct erofs_super_block


def check(store: ImageStore, *, deep: bool = False, progress: Progress = no_progress) -> list[str]:
    """What is wrong, a line each; nothing when all is well. ``deep``: also flatten each image again and compare."""
    problems: list[str] = []
    try:
        images = store.list()
    except StoreError as error:
        return [error.message]
    known = {image.digest for image in images}
    lost = [(name, digest) for name, digest in store.names() if digest not in known]
    problems += [f"the name {name} means {digest[:12]}, which is not there" for name, digest in lost]
    for done, image in enumerate(images):
        progress("checking images", done, len(images))
        problems += [f"image {image.digest[:12]}: {problem}" for problem in _problems(store, image, deep)]
    return problems


def _problems(store: ImageStore, image: Image, deep: bool) -> Iterator[str]:
    file = store.file(image.digest)
    yield from _file_problems(file, image)
    if not image.manifest:
        return
    try:
        manifest = store.manifest(image)
    except IsolatError as error:
        yield f"its manifest can't be read: {error.message}"
        return
    if image.digest != manifest.config.digest.removeprefix("sha256:"):
        yield "its manifest is another image's"
    blobs = list(_blob_problems(store, manifest))
    yield from blobs
    if deep and not blobs and file.exists() and not flattened_again(store, manifest, file):
        yield f"{file} is not what its layers make"


def _file_problems(file: Path, image: Image) -> Iterator[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(_MAGIC_AT)
            start = stream.read(4)
            size = stream.seek(0, 2)
    except FileNotFoundError:
        yield f"its file system is not there: {file}"
        return
    if size != image.size_bytes:
        yield f"its file system has {size} bytes instead of {image.size_bytes}"
    elif len(start) < 4 or struct.unpack("<I", start)[0] != _MAGIC:
        yield f"{file} is no EROFS"


def _blob_problems(store: ImageStore, manifest: Manifest) -> Iterator[str]:
    for one in manifest.blobs:
        try:
            store.blobs.verify(one.digest)
        except IsolatError as error:
            yield error.message
