"""The images that a build stands on, in a form that buildah reads: an OCI layout of links to the store's blobs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from isolat.errors import NotFound, Unsupported
from isolat.images.blobs import read_blob
from isolat.images.image import Image
from isolat.images.oci import (
    DOCUMENT_BYTES_MAX,
    Config,
    Descriptor,
    Manifest,
    Platform,
    hexadecimal,
    parse_config,
)
from isolat.images.store import ImageStore

_REF = "org.opencontainers.image.ref.name"
TAG = "base"


def check(store: ImageStore, image: Image, name: str, platform: Platform) -> None:
    """Raises Unsupported for an image that nothing can be built on, with the reason."""
    if image.binds:
        raise Unsupported(
            f"nothing can be built on the image {name}: its /usr is this machine's own and no part of the image",
            hint="start from an image that is whole: FROM debian, after `isolat image bootstrap debian`",
        )
    found = _config(store, store.manifest(image)).platform
    if not found.serves(platform):
        raise Unsupported(
            f"the image {name} is for {found}, and the build is for {platform}",
            hint=f"build with --platform {found}, or get the image for {platform}",
        )


class Held:
    """Blobs that a build may need at its end, as links of its own: whoever removes an image takes none of them."""

    def __init__(self, store: ImageStore, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self._store = store
        self._dir = directory

    def path(self, digest: str) -> Path:
        """Where it is, or would be."""
        return self._dir / hexadecimal(digest)

    def find(self, digest: str) -> Path:
        """Where it is, here or in the store."""
        own = self.path(digest)
        return own if own.exists() else self._store.blobs.path(digest)

    def hold(self, image: Image) -> Manifest:
        """Raises Unsupported for an image without an OCI form, NotFound for a blob that has gone."""
        manifest = self._store.manifest(image)
        for digest, size in (
            (manifest.digest, len(manifest.raw)),
            *((one.digest, one.size_bytes) for one in manifest.blobs),
        ):
            self._hold(digest, size)
        return manifest

    def _hold(self, digest: str, size_bytes: int) -> None:
        """A blob that a power cut has cut short is none."""
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            if self._store.blobs.has(digest, size_bytes):
                os.link(self._store.blobs.path(digest), self.path(digest))
        if not self.path(digest).exists():
            raise NotFound(f"the blob {digest} is not there", hint="pull the image again")

    def layers(self) -> dict[str, Descriptor]:
        """Every layer that the store has, by the digest of what it is uncompressed; all of them held.

        A build's result has the same layers as its base; said in the base's own words they are stored once.
        """
        found: dict[str, Descriptor] = {}
        for image in self._store.list():
            with contextlib.suppress(NotFound):  # removed in this moment: then they are not known
                if image.manifest:
                    found |= self._layers(self.hold(image))
        return found

    def _layers(self, manifest: Manifest) -> dict[str, Descriptor]:
        config = parse_config(read_blob(self.path(manifest.config.digest), manifest.config.digest, DOCUMENT_BYTES_MAX))
        return dict(zip(config.diff_ids, manifest.layers, strict=False))


def export(manifest: Manifest, held: Held, directory: Path) -> None:
    """Write the layout of an image that is held."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(mode=0o755, parents=True)
    for digest in (manifest.digest, *(one.digest for one in manifest.blobs)):
        source = held.path(digest)
        os.link(source, blobs / source.name)
    described = Descriptor(manifest.media_type, manifest.digest, len(manifest.raw), None, ((_REF, TAG),))
    index = {"schemaVersion": 2, "manifests": [described.to_json()]}
    (directory / "index.json").write_text(json.dumps(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _config(store: ImageStore, manifest: Manifest) -> Config:
    return parse_config(store.blobs.read(manifest.config.digest, manifest.config.size_bytes))


def empty_layout(directory: Path, diff_ids: Collection[str]) -> None:
    """A layout to write to, in which the layers that are known already seem to be: nobody will copy them."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(mode=0o755, parents=True)
    for one in diff_ids:
        (blobs / one.removeprefix("sha256:")).touch()
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
