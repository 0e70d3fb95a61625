"""A state root of a bench's own: the user's image and guest files in it, a daemon with settings of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import lib, subject

from isolat.client import connect
from isolat.images.store import ImageStore


@dataclass(frozen=True)
class Own:
    """One that is there. Its daemon was started with the settings, so what is asked of it needs none."""

    path: Path

    def argv(self, *words: str) -> list[str]:
        return [subject.command(), "--root", str(self.path), *words]

    def ask(self, verb: str, args: dict[str, Any] | None = None) -> Any:
        return connect.ask(str(self.path), verb, args or {})


@contextlib.contextmanager
def own(image: str, **settings: str) -> Iterator[Own]:
    """A root whose daemon has these environment variables; afterwards nothing of it is left, or BenchError."""
    root = Own(Path(tempfile.mkdtemp(prefix="isolat-bench-root-")))
    root.path.chmod(0o711)
    try:
        _share_image(image, root.path)
        _share_guest(root.path)
        lib.spend(root.argv("ps"), os.environ | settings)
        yield root
    finally:
        done = subprocess.run(root.argv("system", "reset", "--yes"), capture_output=True, text=True, check=False)
        if not done.returncode:
            shutil.rmtree(root.path, ignore_errors=True)
    if done.returncode:
        raise lib.BenchError(f"{root.path} could not be removed: {done.stderr.strip()[-800:]}")


def _share_image(name: str, path: Path) -> None:
    """The same files, linked where they can be."""
    there = ImageStore(subject.root())
    ImageStore(path).copy_from(there, there.resolve(name), [name])


def _share_guest(path: Path) -> None:
    """What machines boot from. Where nothing was fetched yet, the root's own daemon does it."""
    source, target = subject.root() / "guest", path / "guest"
    for directory, _, names in os.walk(source):
        into = target / Path(directory).relative_to(source)
        into.mkdir(mode=0o711, parents=True, exist_ok=True)
        for name in names:
            if name != "lock" and into.name != "blanks":  # an empty disk is sparse: it is made anew
                _link(Path(directory, name), into / name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
