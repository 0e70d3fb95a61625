"""The guest's files for tests, made once below build/guest: the kernel is fetched (the network is needed once)."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from isolat.guest import files

TOP = Path(__file__).resolve().parents[2]
CACHE = TOP / "build" / "guest"
NATIVE = TOP / "native" / "build"


@functools.cache
def guest_files() -> files.GuestFiles:
    return files.ensure(CACHE, NATIVE)


@functools.cache
def tsc_khz() -> int:
    said = subprocess.run([NATIVE / files.AGENT, "--tsc-khz"], capture_output=True, text=True, check=True)
    return int(said.stdout)
