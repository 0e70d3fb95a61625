"""Isolat as its user has it: the installed command, the image's file, the plan."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import lib

from isolat.engine.paths import DEFAULT_ROOT
from isolat.images.store import ImageStore

IMAGE = "debian"


def root() -> Path:
    return Path(os.environ.get("ISOLAT_ROOT", DEFAULT_ROOT))


def command() -> str:
    """``isolat`` beside the interpreter that runs the bench (a virtual environment's), else the first in PATH."""
    beside = Path(sys.executable).with_name("isolat")
    found = str(beside) if beside.exists() else shutil.which("isolat")
    if found is None:
        raise lib.BenchError("isolat is not installed: `make` leaves it in .venv/bin")
    return found


def argv(*words: str) -> list[str]:
    return [command(), *words]


def call(*words: str) -> str:
    """Run an isolat command that must succeed; what it printed."""
    done = subprocess.run(argv(*words), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise lib.BenchError(f"isolat {' '.join(words)} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout.strip()


def image_file(name: str) -> Path:
    """The EROFS file that the image is, for peers that are to run the same tree."""
    store = ImageStore(root())
    return store.file(store.resolve(name).digest)


def plan(image: str, words: Sequence[str]) -> list[dict[str, Any]]:
    """The frames of ``isolat run --plan``: what Isolat would do, as data."""
    found = json.loads(call("run", "--plan", "--json", "--rm", image, *words))
    frames = found.get("plan", found) if isinstance(found, dict) else found
    if not isinstance(frames, list) or not frames:
        raise lib.BenchError("isolat run --plan --json printed no frames")
    return [dict(frame) for frame in frames]


def versions() -> dict[str, str]:
    return {
        "isolat": lib.version(command(), "--version"),
        "crun": lib.version("crun", "--version"),
        "python": sys.version.split()[0],
    }
