"""The images that a build stands on, in a form that buildah reads: an OCI layout of links to the store's blobs."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from isolat.errors import Unsupported
from isolat.images.image import Image
from isolat.images.oci import Config, Descriptor, Manifest, Platform, parse_config
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


def export(store: ImageStore, image: Image, directory: Path) -> None:
    """Write the layout. Raises Unsupported for an image without an OCI form, NotFound for a blob that has gone."""
    manifest = store.manifest(image)
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(mode=0o755, parents=True)
    for digest in (manifest.digest, *(one.digest for one in manifest.blobs)):
        source = store.blobs.path(digest)
        os.link(source, blobs / source.name)
    described = Descriptor(manifest.media_type, manifest.digest, len(manifest.raw), None, ((_REF, TAG),))
    index = {"schemaVersion": 2, "manifests": [described.to_json()]}
    (directory / "index.json").write_text(json.dumps(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def known_layers(store: ImageStore) -> dict[str, Descriptor]:
    """Every layer that the store has, by the digest of what it is uncompressed.

    A build's result has the same layers as its base; said in the base's own words they are stored once.
    """
    found: dict[str, Descriptor] = {}
    for image in store.list():
        if image.manifest:
            found |= _layers(store, store.manifest(image))
    return found


def _layers(store: ImageStore, manifest: Manifest) -> dict[str, Descriptor]:
    config = _config(store, manifest)
    return dict(zip(config.diff_ids, manifest.layers, strict=False))


def _config(store: ImageStore, manifest: Manifest) -> Config:
    return parse_config(store.blobs.read(manifest.config.digest, manifest.config.size_bytes))


def empty_layout(directory: Path, diff_ids: Collection[str]) -> None:
    """A layout to write to, in which the layers that are known already seem to be: nobody will copy them."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(mode=0o755, parents=True)
    for one in diff_ids:
        (blobs / one.removeprefix("sha256:")).touch()
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
