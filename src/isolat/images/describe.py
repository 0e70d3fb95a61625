"""What is told of images beyond a listing: everything of one, how it was made, and which layers images share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isolat.errors import NotFound, Unsupported
from isolat.images.image import Image
from isolat.images.oci import DOCUMENT_BYTES_MAX, Config, Descriptor, parse_config

if TYPE_CHECKING:
    from isolat.images.store import ImageStore

Row = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """``size_bytes``: as it is stored, compressed or not; ``diff_id``: what it is uncompressed."""

    digest: str
    diff_id: str
    size_bytes: int
    media_type: str

    def to_json(self) -> Row:
        return {
            "digest": self.digest,
            "diff_id": self.diff_id,
            "size_bytes": self.size_bytes,
            "media_type": self.media_type,
        }


def _read(store: ImageStore, image: Image) -> tuple[Config | None, tuple[Layer, ...]]:
    """Its OCI form; nothing of an image that has none."""
    try:
        manifest = store.manifest(image)
        config = parse_config(store.blobs.read(manifest.config.digest, DOCUMENT_BYTES_MAX))
    except Unsupported:
        return None, ()
    return config, tuple(_layer(*both) for both in zip(manifest.layers, config.diff_ids, strict=False))


def _layer(one: Descriptor, diff_id: str) -> Layer:
    return Layer(one.digest, diff_id, one.size_bytes, one.media_type)


def inspect(store: ImageStore, image: Image) -> Row:
    """Everything known of it, as JSON. Raises StoreError where its blobs are damaged."""
    config, layers = _read(store, image)
    return {
        "id": f"sha256:{image.digest}",
        "names": list(image.names),
        "repo_digests": list(image.repo_digests),
        "manifest": image.manifest,
        "created": config.created if config else "",
        "created_ns": image.created_ns,
        "author": config.author if config else "",
        "kind": image.kind,
        "source": image.config.source,
        "size_bytes": image.size_bytes,
        "os": config.platform.os if config else "linux",
        "architecture": config.platform.architecture if config else image.config.architecture,
        "variant": config.platform.variant if config else image.config.variant,
        "config": {
            "env": [f"{name}={value}" for name, value in image.env],
            "entrypoint": list(image.entrypoint),
            "command": list(image.command),
            "working_dir": image.working_dir,
            "user": image.user,
            "labels": dict(image.config.labels),
            "volumes": list(config.volumes) if config else [],
            "exposed_ports": list(config.exposed_ports) if config else [],
            "stop_signal": image.config.stop_signal,
        },
        "layers": [layer.to_json() for layer in layers],
    }


def history(store: ImageStore, image: Image) -> list[Row]:
    """How it was made, the newest step first. A layer that no step tells of has a row without words."""
    config, layers = _read(store, image)
    steps = config.history if config else ()
    rows, left = [], list(layers)
    for step in steps:
        layer = left.pop(0) if left and not step.empty_layer else None
        rows.append(_step(step.created, step.created_by, step.comment, layer))
    rows += [_step("", "", "", layer) for layer in left]
    return rows[::-1]


def _step(created: str, created_by: str, comment: str, layer: Layer | None) -> Row:
    return {
        "created": created,
        "created_by": created_by,
        "comment": comment,
        "size_bytes": layer.size_bytes if layer else 0,
        "layer": layer.digest if layer else "",
    }


@dataclass
class _Node:
    """A stretch of layers that nothing branches off from, and the images that end with it."""

    layers: list[Layer] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    below: dict[str, _Node] = field(default_factory=dict)

    def to_json(self) -> Row:
        images = sorted(self.images, key=lambda image: (image.names, image.digest))
        return {
            "layers": [layer.to_json() for layer in self.layers],
            "size_bytes": sum(layer.size_bytes for layer in self.layers),
            "images": [{"id": f"sha256:{image.digest}", "names": list(image.names)} for image in images],
            "children": [node.to_json() for node in self.below.values()],
        }


def tree(store: ImageStore, images: Sequence[Image]) -> list[Row]:
    """The images by the layers that they begin with. Images without an OCI form stand alone, without layers."""
    top = _Node()
    alone: list[_Node] = []
    for image in sorted(images, key=lambda image: (not image.names, image.names, image.digest)):
        layers: tuple[Layer, ...] = ()
        with contextlib.suppress(NotFound):
            layers = _read(store, image)[1]
        if layers:
            _place(top, image, layers)
        else:
            alone.append(_Node(images=[image]))
    return [_joined(node).to_json() for node in top.below.values()] + [node.to_json() for node in alone]


def _place(top: _Node, image: Image, layers: Sequence[Layer]) -> None:
    node = top
    for layer in layers:
        node = node.below.setdefault(layer.diff_id, _Node([layer]))
    node.images.append(image)


def _joined(node: _Node) -> _Node:
    """A node with those below it that are its only continuation."""
    while not node.images and len(node.below) == 1:
        (only,) = node.below.values()
        node = _Node([*node.layers, *only.layers], only.images, only.below)
    node.below = {key: _joined(below) for key, below in node.below.items()}
    return node
