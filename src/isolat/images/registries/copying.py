"""A registry's image under a policy that asks for signatures: skopeo copies it whole, or refuses it.

The signature is looked for under the name that was asked for, so that one of another tag does not count. skopeo
writes into a directory of its own, in the form ``dir:``, which keeps every byte as it was signed; when it has ended,
that becomes root's and read-only, and the manifest that it accepted must be the one that was chosen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from isolat.errors import InvalidImage, StoreError
from isolat.images.blobs import read_blob
from isolat.images.oci import BLOB_BYTES_MAX, DOCUMENT_BYTES_MAX, Manifest, hexadecimal
from isolat.images.registries import skopeo
from isolat.images.registries.policy import Policy
from isolat.images.registries.staging import Incoming
from isolat.images.registries.watch import Watch
from isolat.images.store import Build

_NOBODY = 65534
_LOOK_S = 0.05
_SLACK_BYTES = 16 << 20  # manifest, signatures, gpg's own files


def copy(
    source: str,
    platform: Sequence[str],
    options: Sequence[str],
    manifest: Manifest,
    rules: Policy,
    incoming: Incoming,
    build: Build,
    auths: int,
    watch: Watch,
    came: Callable[[int], None],
) -> None:
    """Bring all blobs of ``manifest``. Raises InvalidImage (policy) for what the policy does not accept."""
    own = _private(build.path / "copied")
    with ExitStack() as stack:
        rule = stack.enter_context(rules.descriptor())
        words = [
            *("--policy", skopeo.fd_path(rule), "--tmpdir", str(own)),
            *(["--registries.d", rules.lookaside] if rules.lookaside else []),
            *(*platform, "copy", *options, source, f"dir:{own}/image"),
        ]
        largest = max((one.size_bytes for one in manifest.blobs), default=0)
        command = skopeo.argv(
            words,
            read=rules.read,
            write=[str(own)],
            file_bytes=min(BLOB_BYTES_MAX, largest + _SLACK_BYTES),
        )
        environment = {"TMPDIR": str(own), "HOME": str(own)}
        running = stack.enter_context(
            skopeo.Running(command, watch.what, pass_fds=[auths, rule], environment=environment)
        )
        _follow(running, own, sum(one.size_bytes for one in manifest.blobs), watch, came)
    _seal(own)
    _adopt(own / "image", manifest, incoming)


def _private(path: Path) -> Path:
    skopeo.check_reachable(path)
    path.mkdir(mode=0o700)
    os.chown(path, _NOBODY, _NOBODY)
    return path


def _follow(running: skopeo.Running, own: Path, total: int, watch: Watch, came: Callable[[int], None]) -> None:
    """Tell how much lies in its directory, until it ends. Raises InvalidImage when that is more than it may be."""
    seen = 0
    while True:
        ended = running.process.poll() is not None
        size = _size(own)
        if size > total + _SLACK_BYTES:
            raise InvalidImage(f"{watch.what}: more comes than the manifest says", stage="too-large")
        if size > seen:
            watch.came(size - seen)
            came(min(size, total) - min(seen, total))
            seen = size
        if ended:
            running.finish(watch)
            return
        watch.check()
        time.sleep(_LOOK_S)


def _size(directory: Path) -> int:
    found = 0
    for where, _, files in os.walk(directory):
        for name in files:
            try:
                found += os.lstat(f"{where}/{name}").st_size
            except FileNotFoundError:
                continue
    return found


def _seal(own: Path) -> None:
    """Nobody can reach what is below any more."""
    os.chown(own, os.geteuid(), os.getegid())
    if (own / "image").is_symlink() or not (own / "image").is_dir():
        raise StoreError("skopeo has written no image", stage="skopeo")
    os.chown(own / "image", os.geteuid(), os.getegid())


def _adopt(image: Path, manifest: Manifest, incoming: Incoming) -> None:
    try:
        read_blob(image / "manifest.json", manifest.digest, DOCUMENT_BYTES_MAX)
    except InvalidImage as error:
        raise InvalidImage(
            "what the policy accepted is something else than the name meant before",
            stage="moved",
            hint="the name was given to another image meanwhile: try again",
        ) from error
    for blob in manifest.blobs:
        file = image / hexadecimal(blob.digest)
        if file.is_symlink() or not file.is_file():
            raise InvalidImage(f"the blob {blob.digest} did not come", stage="missing-layer")
        incoming.adopt(file, blob.digest)
