"""Paths of the inside, and names, as they go to the program that copies."""

from __future__ import annotations

import socket
import time

import pytest

from isolat.engine import changes
from isolat.engine.files import _clean, _name
from isolat.errors import Lost, UsageError


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("/etc", "/etc"),
        ("etc", "/etc"),
        ("/etc/", "/etc/"),
        ("//etc//x", "/etc/x"),
        ("/etc/.", "/etc/"),
        ("/etc/..", "/"),
        ("/a/../../../b", "/b"),
        ("../../b/..", "/"),
        ("a/b/..", "/a/"),
        ("/", "/"),
        (".", "/"),
    ],
)
def test_a_path_begins_at_the_root_and_has_no_dots(path: str, clean: str) -> None:
    assert _clean(path) == clean


@pytest.mark.parametrize("name", ["", "..", "a/b", "/", "x" * 256])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        _name(name)
    if not name:
        with pytest.raises(UsageError):
            _clean(name)


def test_who_says_nothing_more_is_not_waited_for_when_nobody_waits_for_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        began = time.monotonic()
        with pytest.raises(Lost), changes._cut_off(ours, lambda: True):
            changes.listen(ours, lambda _: None)
        assert time.monotonic() - began < 10
