"""How long work on images tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, how much of how much; the unit is in the words


def no_progress(text: str, done: int, total: int) -> None:
    """The callback for those who don't watch."""
