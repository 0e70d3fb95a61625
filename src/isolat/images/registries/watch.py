"""When a transfer has to end before its end: nobody waits for it any more, or nothing comes.

There is no limit on the whole time, because nobody knows how long an image takes on somebody's line. There is one on
silence: in every ``stall_s`` seconds something must come, more than a peer would send that only wants to hold us up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from isolat.errors import DeadlineExceeded, IsolatError

STALL_S = float(os.environ.get("ISOLAT_STALL_S", "60"))  # tests shorten it
_LEAST_BYTES = 16384  # in each period, unless something was finished: 273 bytes a second


class Abandoned(IsolatError):
    """Everybody who waited for it has gone."""


class Watch:
    """Of one transfer. Used by the thread that carries it out."""

    def __init__(self, what: str, cancelled: Callable[[], bool] = lambda: False, stall_s: float | None = None) -> None:
        self.what = what
        self._cancelled = cancelled
        self._stall_s = STALL_S if stall_s is None else stall_s
        self._since_s = time.monotonic()
        self._bytes = 0

    def came(self, count: int) -> None:
        """So many bytes have come."""
        self._bytes += count
        if self._bytes >= _LEAST_BYTES:
            self.advanced()

    def advanced(self) -> None:
        """Something is finished."""
        self._since_s, self._bytes = time.monotonic(), 0

    def check(self) -> None:
        """Raises Abandoned and DeadlineExceeded."""
        if self._cancelled():
            raise Abandoned(f"{self.what}: nobody waits for it any more")
        if time.monotonic() - self._since_s > self._stall_s:
            raise DeadlineExceeded(
                f"{self.what}: nothing has come for {self._stall_s:g} s",
                stage="stalled",
                hint="what has come whole is kept: try again to go on from there",
            )
