"""``cp`` on the caller's side: the program that packs, and who listens to it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from isolat.client import copying


def test_nobody_listens_any_more_to_a_packer_that_was_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words come as long as it lives; the descriptor that they come from must not be closed under who reads it."""
    program = tmp_path / "isolat-agent"
    program.write_text("#!/bin/sh\nexec yes a word >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("ISOLAT_LIBEXEC", str(tmp_path))
    before = set(threading.enumerate())
    for _ in range(20):
        with pytest.raises(ZeroDivisionError), copying._packed([]) as (_, packer):
            while not packer.words:
                time.sleep(0.001)
            raise ZeroDivisionError
        assert set(threading.enumerate()) <= before
