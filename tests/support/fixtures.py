"""The fixtures that each folder's conftest.py takes over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.roots import Root, clean_root, private_root


@pytest.fixture(scope="session")
def session_root() -> Iterator[Root]:
    """One root for all tests of a session; its end proves that nothing is left."""
    with private_root() as root:
        root.start_daemon()
        yield root


@pytest.fixture
def root(session_root: Root) -> Iterator[Root]:
    """The shared root, empty before the test and proved empty after it."""
    with clean_root(session_root) as found:
        yield found


@pytest.fixture
def fresh_root() -> Iterator[Root]:
    """A root of the test's own, without a daemon yet: for tests that kill, damage or count."""
    with private_root() as found:
        yield found
