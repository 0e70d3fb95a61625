"""Building in tests: a base image with an OCI form, and ``isolat build`` with its lines and its end."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from isolat.engine.paths import StateRoot
from isolat.errors import Unsupported
from isolat.images import authoring
from isolat.images.authoring import Step
from isolat.images.image import Image, ImageConfig
from isolat.images.store import ImageStore
from tests.support import traces
from tests.support.images import IMAGE
from tests.support.roots import Root, private_root

BASE = "base"  # Debian, with Python
SMALL = "small"  # busybox and nothing else: quick to build on
_shared: list[Root] = []
_users = 0


@contextlib.contextmanager
def shared_root() -> Iterator[Root]:
    """One root with the base for all folders that build: what a base costs to take in is paid once."""
    global _users
    if not _shared:
        _made.enter_context(_new_root())
    _users += 1
    try:
        yield _shared[0]
    finally:
        _users -= 1
        if not _users:
            _made.close()


@contextlib.contextmanager
def _new_root() -> Iterator[Root]:
    with private_root() as root:
        share_base(root)
        share_small(root)
        root.start_daemon()
        _shared.append(root)
        try:
            yield root
        finally:
            _shared.clear()


_made = contextlib.ExitStack()


def left(root: Root) -> list[str]:
    """What is there of builds besides the cache."""
    pool = [str(path) for path in (root.path / "pool").glob("build-*")]
    made = [str(path) for path in (root.path / "images/tmp").iterdir()]
    own = [str(path) for path in (root.path / "builder").glob("build-*")]
    groups = [group for group in traces.group_members(StateRoot(root.path).cgroup) if "/build-" in group]
    running = [f"{pid} {words}" for pid, words in traces.processes("isolat/images/building/inside.py").items()]
    return [*pool, *made, *own, *groups, *running]


def share_base(root: Root) -> None:
    """Give the root the image ``base``: what its ``debian`` is, in a form that can be built on."""
    store = ImageStore(root.path)
    image = store.resolve(IMAGE)
    try:
        store.manifest(image)
        store.tag(image.digest, [BASE])
    except Unsupported:
        _author(store, image)


def _author(store: ImageStore, image: Image) -> None:
    tree = store.mount(image.digest)

    def write(stream: BinaryIO) -> None:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            archive.add(tree, ".")

    try:
        with store.build() as build:
            layer = authoring.make_layer(build, write)
            authoring.derive(store, build, None, layer, Step("a test"), [BASE], config=image.config)
    finally:
        store.unmount_all()


def share_small(root: Root) -> None:
    """Give the root the image ``small``."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "apt-get install busybox-static"
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()

    def write(stream: BinaryIO) -> None:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            archive.add(busybox, "bin/busybox")
            for name in applets:
                entry = tarfile.TarInfo(f"bin/{name}")
                entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
                if name != "busybox":
                    archive.addfile(entry)
            for name in ("etc", "tmp", "mnt", "proc", "sys", "dev", "run", "usr", "root"):
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)

    store = ImageStore(root.path)
    with store.build() as build:
        layer = authoring.make_layer(build, write)
        config = ImageConfig("oci", command=("sh",))
        authoring.derive(store, build, None, layer, Step("a test"), [SMALL], config=config)


@dataclass(frozen=True)
class Built:
    code: int
    digest: str
    lines: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def build(root: Root, containerfile: str, *options: str, context: Path | None = None, **env: str) -> Built:
    """``isolat build`` to its end. Without a context the Containerfile comes on standard input."""
    if context is None:
        words, text = [*options, "-"], containerfile.encode()
    else:
        words, text = [*options, "--file", "-", str(context)], containerfile.encode()
    return finished(root.cli("build", *words, input=text, seconds=110, env=env))


def finished(done: subprocess.CompletedProcess[bytes]) -> Built:
    return Built(done.returncode, done.stdout.decode().strip(), done.stderr.decode(errors="replace").splitlines())


def built(root: Root, containerfile: str, *options: str, context: Path | None = None, **env: str) -> Built:
    """A build that must succeed."""
    found = build(root, containerfile, *options, context=context, **env)
    assert found.code == 0, found.text
    return found
