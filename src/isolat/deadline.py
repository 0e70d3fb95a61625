"""The one type for "until when": monotonic seconds, passed down and never re-made from a rest.

Mixing milliseconds and seconds, or giving each stage its own time-out, makes operations run many times longer
than asked for. A Deadline is made once, at the edge, and every wait below asks it how much is left.
"""

from __future__ import annotations

import time

from isolat.errors import DeadlineExceeded


class Deadline:
    """A moment on the monotonic clock, or never."""

    __slots__ = ("at_s",)

    def __init__(self, seconds: float | None) -> None:
        """``seconds`` from now; None means never."""
        self.at_s = None if seconds is None else time.monotonic() + seconds

    def left_s(self, at_most_s: float | None = None) -> float | None:
        """Seconds left (0 when it has passed), None for never; ``at_most_s`` caps the answer."""
        if self.at_s is None:
            return at_most_s
        left = max(0.0, self.at_s - time.monotonic())
        return left if at_most_s is None else min(left, at_most_s)

    @property
    def passed(self) -> bool:
        return self.at_s is not None and time.monotonic() >= self.at_s

    def check(self, what: str) -> None:
        """Raise DeadlineExceeded, naming ``what`` was under way, when the moment has passed."""
        if self.passed:
            raise DeadlineExceeded(f"{what} did not end in time", stage=what)

    def sooner(self, seconds: float) -> Deadline:
        """This deadline, or ``seconds`` from now where that is earlier."""
        other = Deadline(seconds)
        if self.at_s is None or (other.at_s is not None and other.at_s < self.at_s):
            return other
        return self


NEVER = Deadline(None)
