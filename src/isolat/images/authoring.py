"""Images made here: a new layer on an image, or on nothing, with its OCI documents.

Trees (bootstrap, import) and the changes of an environment (commit) go this way, so they have the OCI form that push,
save and build need, and the same content is the same image wherever it is made.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from isolat.deadline import NEVER, Deadline
from isolat.images import changes
from isolat.images.image import Image, ImageConfig
from isolat.images.oci import CONFIG, LAYER_GZIP, Descriptor, Platform, digest_of, dump, own_platform, write_manifest
from isolat.images.progress import Progress, no_progress

if TYPE_CHECKING:
    from isolat.images.store import Build, ImageStore

_LEVEL = 1  # a layer is read far more often from the flattened file than sent; 5 times as quick as zlib's default
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_GZIP = 16 + zlib.MAX_WBITS


@dataclass(frozen=True)
class NewLayer:
    """A compressed layer in a build's directory. ``diff_id``: the digest of what it is uncompressed."""

    file: Path
    digest: str
    diff_id: str
    size_bytes: int

    def describe(self) -> Descriptor:
        return Descriptor(LAYER_GZIP, self.digest, self.size_bytes)


@dataclass(frozen=True)
class Step:
    """What stands in the history of the image. Without ``created`` the same content gives the same image."""

    created_by: str
    created: str = ""
    author: str = ""
    comment: str = ""


def now() -> str:
    """RFC 3339, of SOURCE_DATE_EPOCH where that is set (reproducible-builds.org)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    at = (
        datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
        if epoch.isdigit()
        else datetime.datetime.now(datetime.UTC)
    )
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def make_layer(build: Build, write: Callable[[BinaryIO], object]) -> NewLayer:
    """Compress what ``write`` writes (a tar archive) into the build's directory."""
    file = build.path / "layer"
    with file.open("xb") as stream:
        layer = _Gzip(stream)
        write(layer)  # type: ignore[arg-type]  # only write() is used
        layer.close()
    return NewLayer(
        file, f"sha256:{layer.outside.hexdigest()}", f"sha256:{layer.inside.hexdigest()}", file.stat().st_size
    )


def derive(
    store: ImageStore,
    build: Build,
    base: Image | None,
    layer: NewLayer | None,
    step: Step,
    names: Collection[str],
    *,
    change: Sequence[str] = (),
    config: ImageConfig | None = None,
    d: Deadline = NEVER,
    progress: Progress = no_progress,
) -> Image:
    """Make the image that is ``base`` with one more layer and other defaults, and take it in.

    ``config``: for an image without a base, its defaults; what only Isolat knows of them (binds) stays beside them.
    Raises UsageError for a change that is none, Unsupported for a base that has no OCI form.
    """
    layers: list[Descriptor] = []
    document = _from_config(config) if base is None else _of_base(store, base, layers)
    document["config"] = changes.apply(document.get("config") or {}, change)
    _add(document, layers, layer, step)
    raw_config = dump(document)
    described = Descriptor(CONFIG, digest_of(raw_config), len(raw_config))
    staged = build.path / "config.json"
    staged.write_bytes(raw_config)

    def find(digest: str) -> Path:
        if layer is not None and digest == layer.digest:
            return layer.file
        return staged if digest == described.digest else store.blobs.path(digest)

    raw = write_manifest(described, layers)
    # Of kind oci nothing is known but what the document says, which has the changes, too
    own = config if base is None and config is not None and config.kind != "oci" else None
    return store.add_manifest(raw, find, names, build=build, d=d, config=own, progress=progress)


def _of_base(store: ImageStore, base: Image, layers: list[Descriptor]) -> dict[str, Any]:
    manifest = store.manifest(base)
    layers += manifest.layers
    document: dict[str, Any] = json.loads(store.blobs.read(manifest.config.digest, manifest.config.size_bytes))
    return document


def _from_config(config: ImageConfig | None) -> dict[str, Any]:
    config = config or ImageConfig("oci")
    inner: dict[str, Any] = {
        "Env": [f"{name}={value}" for name, value in config.env],
        "Entrypoint": list(config.entrypoint),
        "Cmd": list(config.command),
        "WorkingDir": config.working_dir,
        "User": config.user,
        "Labels": dict(config.labels) | _own_labels(config),
        "StopSignal": config.stop_signal,
    }
    native = own_platform()
    platform = Platform(native.os, config.architecture or native.architecture, config.variant)
    return {
        "os": platform.os,
        "architecture": platform.architecture,
        **({"variant": platform.variant} if platform.variant else {}),
        "config": {name: value for name, value in inner.items() if value},
        "rootfs": {"type": "layers", "diff_ids": []},
    }


def _own_labels(config: ImageConfig) -> dict[str, str]:
    """Whatever makes two images different must be in what their digest is of."""
    found = {"isolat.kind": config.kind, "isolat.source": config.source}
    if config.binds:
        found["isolat.binds"] = json.dumps(config.binds)
    return {name: value for name, value in found.items() if value and value != "oci"}


def _add(document: dict[str, Any], layers: list[Descriptor], layer: NewLayer | None, step: Step) -> None:
    if layer is not None:
        layers.append(layer.describe())
        document["rootfs"]["diff_ids"] = [*document["rootfs"]["diff_ids"], layer.diff_id]
    entry = {
        "created": step.created,
        "created_by": _written(step.created_by),
        "author": _written(step.author),
        "comment": _written(step.comment),
        "empty_layer": layer is None,
    }
    document["history"] = [*(document.get("history") or []), {name: value for name, value in entry.items() if value}]
    if step.created:
        document["created"] = step.created
    if step.author:
        document["author"] = _written(step.author)


def _written(text: str) -> str:
    """What can stand in a document: a command line need not be UTF-8, but its image's history is."""
    return _SURROGATE.sub("\ufffd", text)


class _Gzip:
    """A stream that compresses and knows both digests; no time and no name in it (RFC 1952)."""

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self._packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        self.inside, self.outside = hashlib.sha256(), hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.inside.update(data)
        self._put(self._packer.compress(data))
        return len(data)

    def close(self) -> None:
        self._put(self._packer.flush())

    def _put(self, data: bytes) -> None:
        self.outside.update(data)
        self._target.write(data)
