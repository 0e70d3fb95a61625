"""Sizes and durations as Compose writes them, to bytes and nanoseconds and back, exactly.

Sizes: ``b``, ``k``/``kb``, ``m``/``mb``, ``g``/``gb``, ``t``/``tb``, ``p``/``pb`` in either case, also
``KiB`` and so on; all are powers of 1024, as in Docker. Durations: ``1h5m30s20ms``, with ``us`` and ``ns``.
Whole numbers are computed as whole numbers, so that nothing is lost on the way through a file and back.
"""

from __future__ import annotations

import re
from decimal import Decimal

SIZE_PATTERN = r"^ *[0-9]{1,19}(\.[0-9]{1,9})? *([kKmMgGtTpP]?[bB]?|[kKmMgGtTpP]i[bB]) *$"
DURATION_PATTERN = r"^([0-9]{1,18}(\.[0-9]{1,9})?(h|m|s|ms|us|µs|ns))+$"

_SIZE = re.compile(r" *([0-9]{1,19}(?:\.[0-9]{1,9})?) *([kmgtp]?)(?:i?b)? *", re.IGNORECASE)
_PART = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)(h|ms|us|µs|ns|m|s)")
_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_NS = {"h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "µs": 10**3, "ns": 1}


def parse_bytes(text: str) -> int:
    """``1.5g`` to bytes. Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if not found or not re.match(SIZE_PATTERN, text):
        raise ValueError("must be a size such as 512m, 2g or 1073741824")
    return int(Decimal(found[1]) * _SIZE_UNITS[found[2].lower()])


def format_bytes(count: int) -> int | str:
    """The shortest form that ``parse_bytes`` reads as the same number."""
    for unit in "ptgmk":
        size = _SIZE_UNITS[unit]
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return count


def parse_duration_ns(text: str) -> int:
    """``1m30s`` to nanoseconds. Raises ValueError."""
    total, at = Decimal(0), 0
    while found := _PART.match(text, at):
        total += Decimal(found[1]) * _NS[found[2]]
        at = found.end()
        if at > 200:
            break
    if not text or at != len(text):
        raise ValueError("must be a duration such as 10s, 1m30s or 500ms")
    return int(total)


def format_duration_ns(count: int) -> str:
    """One number with the largest unit that keeps it whole."""
    for unit in ("s", "ms", "us"):
        if count % _NS[unit] == 0:
            return f"{count // _NS[unit]}{unit}"
    return f"{count}ns"


def seconds(count_ns: int) -> float:
    return count_ns / 10**9


def nanoseconds(count_s: float) -> int:
    return round(count_s * 10**9)
