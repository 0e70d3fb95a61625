"""The one image that the booting tests share: made once into the machine's own state root, linked into private ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from isolat.deadline import Deadline
from isolat.engine.paths import DEFAULT_ROOT, native_dir
from isolat.errors import NotFound
from isolat.guest import files
from isolat.images import disks
from isolat.images.bootstrap import SYSTEMD, bootstrap
from isolat.images.image import ImageConfig
from isolat.images.store import ImageStore

IMAGE = "debian"


def source_root() -> Path:
    """``ISOLAT_TEST_IMAGES`` names another root to take the image from."""
    return Path(os.environ.get("ISOLAT_TEST_IMAGES", DEFAULT_ROOT))


def share_guest(root: Path) -> None:
    """What machines boot from, made once into the machine's own state root and linked."""
    source = source_root() / "guest"
    files.ensure(source, native_dir())
    target = root / "guest"
    target.mkdir(mode=0o711, exist_ok=True)
    for path in sorted(source.rglob("*")):
        if "blanks" in path.parts or path.name == "lock":
            continue  # an empty disk is sparse: it is made anew, not copied
        if path.is_dir():
            (target / path.relative_to(source)).mkdir(mode=0o711, parents=True, exist_ok=True)
        else:
            _link(path, target / path.relative_to(source))


def _link(source: Path, target: Path) -> None:
    """The same file where the file system can, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def share(root: Path, name: str = IMAGE) -> str:
    """Put the image into this root too, without copying it where the file system can link. Answers its digest."""
    store = ImageStore(source_root())
    try:
        image = store.resolve(name)
    except NotFound:
        image = bootstrap(store, name)
    return ImageStore(root).copy_from(store, image, [name]).digest


def share_bootable(root: Path) -> None:
    """The image that a whole PC boots, and the kernel that its disk gets, which is fetched once for this machine."""
    if not (root / "disks").exists():
        share(root, SYSTEMD)
        source = source_root() / "disks"
        disks.kernel(source)
        (root / "disks").mkdir(mode=0o711)
        (root / "disks" / "kernel").symlink_to(source / "kernel")


SHOW = r"""
#include <stdio.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    char line[64];
    FILE *marker = fopen("/etc/marker", "r");
    (void)argv;
    if (!marker || !fgets(line, sizeof line, marker))
        return 1;
    fputs(line, stdout);
    fflush(stdout);
    return argc > 1 ? (int)sleep(600) : 3;
}
"""


def add_small(root: Path, name: str) -> str:
    """An image of a few KiB, like no other: its command shows its own name and ends with 3. Answers its digest."""
    store = ImageStore(root)
    with store.build() as build:
        tree = build.path / "tree"
        for directory in ("bin", "etc", "dev", "proc", "sys"):
            (tree / directory).mkdir(parents=True)
        (build.path / "show.c").write_text(SHOW)
        compiler = shutil.which("musl-gcc") or "gcc"
        subprocess.run([compiler, "-static", "-O1", "-o", tree / "bin/show", build.path / "show.c"], check=True)
        (tree / "etc/marker").write_text(f"{name}\n")
        config = ImageConfig(kind="tree", command=("/bin/show",))
        return build.finish(tree, config, [name], Deadline(60)).digest
