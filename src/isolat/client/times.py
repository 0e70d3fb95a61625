"""Times as people give them (``10m``, ``2026-01-31T12:00:00``, seconds since the epoch) and as they are shown."""

from __future__ import annotations

import re
import time
from datetime import datetime

from isolat.errors import UsageError
from isolat.spec import units

NS = 10**9


def parse_since(text: str, now_ns: int | None = None) -> int:
    """Nanoseconds since the epoch. A duration means so long ago; a time without zone is local. Raises UsageError."""
    if re.fullmatch(r"[0-9]{1,11}(\.[0-9]{1,9})?", text):
        whole, _, fraction = text.partition(".")
        return int(whole) * NS + int(fraction.ljust(9, "0"))
    try:
        return max(0, (time.time_ns() if now_ns is None else now_ns) - units.parse_duration_ns(text))
    except ValueError:
        pass
    try:
        return int(datetime.fromisoformat(text).timestamp() * 10**6) * 1000
    except (ValueError, OverflowError):
        raise UsageError(f"not a time: {text}", hint="10m (ago), 2026-01-31T12:00:00, or seconds since 1970") from None


def parse_seconds(text: str, what: str) -> float:
    """A duration, or a plain number of seconds. Raises UsageError."""
    try:
        return float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", text) else units.parse_duration_ns(text) / NS
    except ValueError as error:
        raise UsageError(f"{what}: {text!r} {error}") from None


def show(time_ns: int) -> str:
    """RFC 3339 in UTC, with nanoseconds."""
    seconds, rest = divmod(time_ns, NS)
    try:
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"
    except (ValueError, OverflowError):
        return f"{seconds}.{rest:09d}"


def age(time_ns: int, now_ns: int | None = None) -> str:
    """``3 min ago``."""
    seconds = ((time.time_ns() if now_ns is None else now_ns) - time_ns) / NS
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"
