from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3]))  # where pytest is not started with `python -m`

from tests.unit.native.wireside import KEEPER, NATIVE, SANITIZE, Controller, Held, start_keeper


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    subprocess.run(["make", "-s", "-C", str(NATIVE), *(["all", "sanitize"] if SANITIZE else [])], check=True)
    assert KEEPER.exists()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Held]:
    held = start_keeper(tmp_path / "env")
    yield held
    held.stop()


@pytest.fixture
def c(keeper: Held) -> Controller:
    return keeper.c


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every process of a test carries a mark in its environment; none with it may be left."""
    mark = f"ISOLAT_TEST={os.getpid()}-{id(request)}"
    name, _, value = mark.partition("=")
    os.environ[name] = value
    yield
    left = [pid for pid in processes() if marked(pid, mark.encode())]
    for pid in left:
        os.kill(pid, 9)
    assert not left, f"left behind: {left}"


def processes() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and int(p.name) != os.getpid()]


def marked(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
