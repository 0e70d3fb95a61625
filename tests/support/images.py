"""The one image that the booting tests share: made once into the machine's own state root, linked into private ones."""

from __future__ import annotations

import os
from pathlib import Path

from isolat.engine.paths import DEFAULT_ROOT
from isolat.errors import NotFound
from isolat.images.bootstrap import bootstrap
from isolat.images.store import ImageStore

IMAGE = "debian"


def source_root() -> Path:
    """``ISOLAT_TEST_IMAGES`` names another root to take the image from."""
    return Path(os.environ.get("ISOLAT_TEST_IMAGES", DEFAULT_ROOT))


def share(root: Path, name: str = IMAGE) -> str:
    """Put the image into this root too, without copying it where the file system can link. Answers its digest."""
    store = ImageStore(source_root())
    try:
        image = store.resolve(name)
    except NotFound:
        image = bootstrap(store, name)
    into = ImageStore(root)
    with into.build() as build:
        copy = build.path / "image.erofs"
        try:
            os.link(store.file(image.digest), copy)
        except OSError:
            copy.write_bytes(store.file(image.digest).read_bytes())
        return into.adopt(copy, image.config, [name]).digest
