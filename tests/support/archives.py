"""Archives of images for tests, in the forms of ``docker save`` and of an OCI layout, right or wrong as a test says."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from isolat.images import archives
from isolat.images.image import Image
from isolat.images.oci import CONFIG, INDEX, LAYER_GZIP, MANIFEST
from isolat.images.store import ImageStore
from tests.support.layers import Archive, digest


def layer(text: str = "hello") -> bytes:
    """A layer with one file."""
    return Archive().add(b"file", data=text.encode()).bytes()


def config(layers: Sequence[bytes], **more: Any) -> bytes:
    """The configuration of an image of these layers, which are uncompressed."""
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/true"], "Env": ["A=b"]},
        "rootfs": {"type": "layers", "diff_ids": [digest(one) for one in layers]},
        "history": [{"created_by": f"step {at}"} for at in range(len(layers))],
    }
    return json.dumps(document | more).encode()


def tar(members: Mapping[str, bytes]) -> bytes:
    archive = Archive()
    for name, data in members.items():
        archive.add(name.encode(), data=data)
    return archive.bytes()


def docker_members(layers: Sequence[bytes], names: Sequence[str] = ("one:1",), **more: Any) -> dict[str, bytes]:
    """What ``docker save`` wrote until 24, without links."""
    raw = config(layers, **more)
    name = f"{digest(raw).partition(':')[2]}.json"
    paths = [f"{at:064x}/layer.tar" for at in range(len(layers))]
    entry = {"Config": name, "RepoTags": list(names), "Layers": paths}
    return {
        **dict(zip(paths, layers, strict=True)),
        name: raw,
        "manifest.json": json.dumps([entry]).encode(),
    }


def blob_name(data: bytes) -> str:
    return f"blobs/sha256/{digest(data).partition(':')[2]}"


def described(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}


def oci_members(
    layers: Sequence[bytes], notes: Mapping[str, str] | None = None, **more: Any
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The blobs of one image, and the descriptor of its manifest."""
    packed = [gzip.compress(one, mtime=0) for one in layers]
    raw = config(layers, **more)
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": described(raw, CONFIG),
        "layers": [described(one, LAYER_GZIP) for one in packed],
    }
    manifest = json.dumps(document).encode()
    return {blob_name(data): data for data in (*packed, raw, manifest)}, described(
        manifest, MANIFEST, annotations=dict(notes or {})
    )


def layout(blobs: Mapping[str, bytes], manifests: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests)}
    return {
        **blobs,
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps(index).encode(),
    }


def load(store: ImageStore, data: bytes, **more: Any) -> list[tuple[Image, tuple[str, ...]]]:
    """Each image with the names that it has in the archive."""
    found: list[tuple[Image, tuple[str, ...]]] = []
    with from_file(store.root, data) as descriptor:
        archives.load(store, descriptor, lambda image, names: found.append((image, tuple(names))), **more)
    return found


@contextlib.contextmanager
def from_file(directory: Path, data: bytes) -> Iterator[int]:
    """A descriptor of a file with these bytes, which has no name any more."""
    path = directory / "archive"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    path.unlink()
    try:
        yield descriptor
    finally:
        os.close(descriptor)
