"""Archives that the caller gives, opened on the way to the inside."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from isolat.client import copying
from isolat.errors import CopyFailed

DATA = os.urandom(300_000)
Pack = Callable[[bytes], bytes]


def through(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    with path.open("rb") as stream, copying._opened(stream.fileno()) as opening:
        found = b""
        while piece := os.read(opening.reading, 1 << 16):
            found += piece
        opening.finish()
    return found


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_an_archive_comes_plain(tmp_path: Path, pack: Pack) -> None:
    assert through(tmp_path / "a", pack(DATA)) == DATA


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_damaged_one_is_told(tmp_path: Path, pack: Pack) -> None:
    packed = pack(DATA)
    half = len(packed) // 2
    damaged = packed[:half] + bytes(64) + packed[half + 64 :]
    for data, said in ((packed[:half], "the archive ends too early"), (damaged, "the archive can't be read")):
        with pytest.raises(CopyFailed, match=said):
            through(tmp_path / "a", data)


def test_whoever_wants_no_more_is_not_held_up(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    with (tmp_path / "a").open("rb") as stream, copying._opened(stream.fileno()) as opening:
        opening.finish()
        assert not opening._thread.is_alive()
