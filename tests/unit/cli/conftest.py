"""A daemon in the test and the command in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolat.cli.main import main

from ..client.daemon import Daemon

Command = Callable[..., int]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(tmp_path / "root")
    yield one
    one.close()


@pytest.fixture
def isolat(daemon: Daemon) -> Command:
    """The command line against the daemon of the test: ``isolat("run", "debian")`` is its exit code."""

    def command(*words: str) -> int:
        return main(["--root", daemon.root, *words])

    return command
