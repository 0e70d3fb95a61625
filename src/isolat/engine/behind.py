"""What is made behind the back of whoever asked for it, so that the next one finds it: templates of images.

One after the other, a moment after they were asked for. A few are kept: the one that nobody has asked for the
longest makes room, each goes when nobody has for ten minutes, and none is made while memory is scarce. When hardly any
is left, each goes that nobody needs just now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from isolat.checkpoint import counting
from isolat.engine import admission
from isolat.engine.aside import Aside, Work
from isolat.engine.journal import log
from isolat.engine.warm import MEMORY_FREE_BYTES

DEFAULT_MOST = 4
UNUSED_S = 600.0
SCARCE_BYTES = 512 << 20
SCARCE_UNUSED_S = 30.0
_PAUSE_S = 0.3  # after it was asked for first: who asked goes first
_FAILED_S = 30.0

Make = Callable[[], None]
Remove = Callable[[str], None]


@dataclass
class _Kind:
    make: Make | None  # None: it is there
    asked_s: float
    not_before_s: float


class Behind:
    """``remove`` takes away one that is there; it may be gone already."""

    def __init__(self, remove: Remove, most: int, name: str = "behind") -> None:
        self._remove = remove
        self._most = most
        self._kinds: dict[str, _Kind] = {}
        self._aside = Aside(name, self._next, self._wait_s)

    def want(self, key: str, make: Make) -> None:
        """Make it soon, unless it is being made."""
        self._ask(key, make)

    def used(self, key: str) -> None:
        """It is there, and somebody needs it."""
        self._ask(key, None)

    def close(self) -> None:
        """Make no more. What is there stays."""
        self._aside.close()

    def _ask(self, key: str, make: Make | None) -> None:
        if not self._most or counting():
            return
        now = time.monotonic()
        with self._aside.condition:
            kind = self._kinds.setdefault(key, _Kind(make, now, now + _PAUSE_S))
            kind.make, kind.asked_s = make, now
            self._aside.wake()

    def _wait_s(self) -> float:
        now = time.monotonic()
        soon = [kind.not_before_s - now for kind in self._kinds.values() if kind.make is not None]
        return max(0.005, min([*soon, 30.0]))

    def _next(self) -> Work | None:
        """What is to be done next, if anything; with the lock held."""
        now = time.monotonic()
        oldest = min(self._kinds, key=lambda key: self._kinds[key].asked_s, default="")
        if oldest and (len(self._kinds) > self._most or now - self._kinds[oldest].asked_s > _kept_s()):
            del self._kinds[oldest]
            return partial(self._remove, oldest)
        for key, kind in self._kinds.items():
            if kind.make is not None and kind.not_before_s <= now:
                return partial(self._make, key, kind)
        return None

    def _make(self, key: str, kind: _Kind) -> None:
        make = kind.make
        if make is None or admission.memory_available_bytes() < MEMORY_FREE_BYTES:
            kind.not_before_s = time.monotonic() + _FAILED_S
            return
        try:
            make()
        except Exception as error:  # what ends this thread would be the end of all templates
            log(f"a template of an image could not be made: {error}")
            kind.not_before_s = time.monotonic() + _FAILED_S
            return
        with self._aside.condition:
            kind.make = None
            kept = self._kinds.get(key) is kind and not self._aside.closed
        if not kept:
            self._remove(key)


def _kept_s() -> float:
    return SCARCE_UNUSED_S if admission.memory_available_bytes() < SCARCE_BYTES else UNUSED_S
