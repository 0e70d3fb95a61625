"""Named moments at which a test may kill the daemon (tests/conformance, SIGKILL between any two steps).

``ISOLAT_KILL_AT=7`` in the daemon's environment sends it SIGKILL at the seventh checkpoint it passes. Unset, a
checkpoint costs one comparison.
"""

from __future__ import annotations

import os
import signal

_left = int(os.environ.get("ISOLAT_KILL_AT", "0"))


def counting() -> bool:
    """Whether a test counts: every effect must then be over before the next checkpoint."""
    return bool(_left)


def checkpoint() -> None:
    global _left
    if _left:
        _left -= 1
        if not _left:
            os.kill(os.getpid(), signal.SIGKILL)
