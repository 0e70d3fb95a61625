"""From a manifest and its blobs to what the store takes in: read strictly, verified, flattened; nothing moved yet."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isolat.deadline import NEVER, Deadline
from isolat.errors import InvalidImage, NotFound
from isolat.images import durable
from isolat.images.blobs import read_blob, verify_file
from isolat.images.image import DEFAULT_PATH, ImageConfig
from isolat.images.oci import (
    DOCUMENT_BYTES_MAX,
    Config,
    Descriptor,
    Manifest,
    check_together,
    hexadecimal,
    parse_config,
    parse_manifest,
)
from isolat.images.progress import Progress, no_progress

if TYPE_CHECKING:
    from isolat.images.store import Build, ImageStore

_OS = "linux"


@dataclass(frozen=True)
class Prepared:
    """``file``: the new EROFS file, or None where the store has it. ``blobs``: those to take in, all verified.

    ``there``: those that the store had, which may have gone when the image is taken in.
    """

    digest: str
    config: ImageConfig
    manifest: str
    file: Path | None
    blobs: tuple[str, ...]
    there: tuple[str, ...]


def prepare(
    store: ImageStore, raw: bytes, find: Callable[[str], Path], build: Build, d: Deadline, progress: Progress
) -> Prepared:
    """Raises InvalidImage for whatever is not what it says it is."""
    manifest = parse_manifest(raw)
    if not isinstance(manifest, Manifest):
        raise InvalidImage("an index is no image: it names one for each platform", stage="bad-manifest")
    config = parse_config(read_blob(find(manifest.config.digest), manifest.config.digest, DOCUMENT_BYTES_MAX))
    check_together(manifest, config)
    if config.platform.os not in ("", _OS):
        raise NotFound(
            f"the image is for {str(config.platform)[:100]}, and what runs here is Linux",
            stage="no-platform",
            hint="choose another with --platform, where there is one",
        )
    digest = hexadecimal(manifest.config.digest)
    missing = [one for one in manifest.blobs if not store.blobs.has(one.digest, one.size_bytes)]
    there = tuple(one.digest for one in manifest.blobs if one not in missing)
    file = None
    if store.find(digest) is None:
        file = build.path / "image.erofs"
        _flatten(manifest, config, find, file, build, d, progress)
    else:
        _verify(missing, find)
    # Here, where nobody has to wait for it who wants the store's lock
    durable.sync([*(find(one.digest) for one in missing), *([file] if file else [])])
    return Prepared(digest, defaults(config), manifest.digest, file, tuple(one.digest for one in missing), there)


def flattened_again(store: ImageStore, manifest: Manifest, file: Path) -> bool:
    """Whether an image's layers still make exactly this file. Raises InvalidImage where they can't be read."""
    config = parse_config(store.blobs.read(manifest.config.digest, DOCUMENT_BYTES_MAX))
    with store.build() as build:
        again = build.path / "image.erofs"
        _flatten(manifest, config, store.blobs.path, again, build, NEVER, no_progress)
        return filecmp.cmp(file, again, shallow=False)


def _flatten(
    manifest: Manifest,
    config: Config,
    find: Callable[[str], Path],
    out: Path,
    build: Build,
    d: Deadline,
    progress: Progress,
) -> None:
    from isolat.images import flatten  # slow to import, and most daemons never flatten anything

    layers = [
        flatten.LayerBlob(find(layer.digest), layer.digest, diff_id, layer.size_bytes)
        for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
    ]
    flatten.flatten(layers, out, d, progress=progress, pass_fds=(build.lock,))


def _verify(blobs: Sequence[Descriptor], find: Callable[[str], Path]) -> None:
    """Another form of an image that is here: its layers are not read for flattening, so they are read for this."""
    for one in blobs:
        verify_file(find(one.digest), one.digest)


def defaults(config: Config) -> ImageConfig:
    """What an environment takes from an OCI configuration."""
    env = dict(config.env)
    env.setdefault("PATH", DEFAULT_PATH)
    return ImageConfig(
        kind="oci",
        env=tuple(env.items()),
        command=config.command,
        entrypoint=config.entrypoint,
        working_dir=config.working_dir,
        user=config.user,
        architecture=config.platform.architecture,
        variant=config.platform.variant,
        labels=config.labels,
        stop_signal=config.stop_signal,
    )
