"""From the store to a registry: the blobs as they came, so the digest is the same there.

skopeo reads an OCI layout of links to the blobs, which nobody but it can enter. It writes no file.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path

from isolat.errors import NotFound, Unsupported
from isolat.images.image import Image
from isolat.images.oci import Manifest, hexadecimal
from isolat.images.reference import Reference
from isolat.images.registries import skopeo
from isolat.images.registries.flights import Passenger
from isolat.images.registries.skopeo import Access
from isolat.images.registries.watch import Watch
from isolat.images.store import Build, ImageStore

_TOLD_S = 0.1
_NOBODY = 65534


def push(store: ImageStore, image: Image, target: Reference, access: Access, passenger: Passenger) -> str:
    """Send it. Returns the digest of its manifest. Raises as a pull does, and Unsupported."""
    skopeo.check_there()
    check_whole(image)
    if target.digest:
        raise Unsupported(f"{target.by_digest}: an image is pushed under a name", hint="leave @sha256:… out")
    manifest = store.manifest(image)
    watch = Watch(f"pushing {target.name}", passenger.gone)
    with ExitStack() as stack:
        build = stack.enter_context(store.build())
        layout = _layout(build, manifest)
        skopeo.check_reachable(layout)
        auths = stack.enter_context(skopeo.auth_file(access.auths))
        words = [
            *("--insecure-policy", "copy", "--preserve-digests", "--authfile", skopeo.fd_path(auths)),
            f"--dest-tls-verify={'true' if access.verifies(target.registry) else 'false'}",
            *(f"oci:{layout}", f"docker://{target.remote}"),
        ]
        command = skopeo.argv(words, read=[str(layout)])
        running = stack.enter_context(skopeo.Running(command, watch.what, pass_fds=[auths]))
        _follow(running, manifest, watch, passenger)
    return manifest.digest


def check_whole(image: Image) -> None:
    """Raises Unsupported for an image that shows this machine's own files."""
    if image.binds:
        shown = ", ".join(source for source, _ in image.binds)
        name = image.names[0] if image.names else image.digest[:12]
        raise Unsupported(
            f"the image {name} is not whole without this machine's {shown}",
            hint="bootstrap one that is: isolat image bootstrap debian",
        )


def _layout(build: Build, manifest: Manifest) -> Path:
    """image-spec, image-layout.md. Raises NotFound where a blob has gone."""
    layout = build.path / "layout"
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for digest in (manifest.digest, *(one.digest for one in manifest.blobs)):
        try:
            os.link(build.store.blobs.path(digest), blobs / hexadecimal(digest))
        except FileNotFoundError:
            raise NotFound(f"the blob {digest} is not there", hint="pull the image again") from None
    described = {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.raw)}
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    for path, mode in (("oci-layout", 0o644), ("index.json", 0o644), ("blobs", 0o755), ("blobs/sha256", 0o755)):
        (layout / path).chmod(mode)
    layout.chmod(0o500)
    os.chown(layout, _NOBODY, _NOBODY)
    return layout


def _follow(running: skopeo.Running, manifest: Manifest, watch: Watch, passenger: Passenger) -> None:
    """What it has read so far stands for what it has sent: proc_pid_io(5), rchar."""
    total = sum(one.size_bytes for one in manifest.blobs)
    before = 0
    while running.process.poll() is None:
        done = _read_bytes(running.process.pid)
        if done > before:
            watch.came(done - before)
            before = done
            passenger.tell("sending, bytes", min(done, total), total)
        watch.check()
        time.sleep(_TOLD_S)
    running.finish(watch)
    passenger.tell("sent, bytes", total, total)


def _read_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("rchar:"):
                return int(line.split()[1])
    return 0
