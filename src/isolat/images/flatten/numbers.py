"""The ways in which tar writes numbers: octal text, base-256, and decimal text in PAX records.

Sources: POSIX pax(1), "ustar Interchange Format" and "pax Header Block"; GNU tar's manual, "Extensions to the archive
format" (base-256: the first bit set, the rest a big-endian number in two's complement).
"""

from __future__ import annotations

from isolat.images.flatten.bad import Bad

_BLANK = b" \0"
_DIGITS_MAX = 20


def number(field: bytes) -> int:
    """A field of a header; empty is 0. Raises ValueError."""
    if field and field[0] & 0x80:
        return _base256(field)
    text = field.strip(_BLANK)
    # What follows the first NUL is no part of the number, as everywhere
    text = text.partition(b"\0")[0].rstrip(b" ")
    if not text:
        return 0
    if text.strip(b"01234567"):
        raise ValueError("no octal number")
    return int(text, 8)


def _base256(field: bytes) -> int:
    value = int.from_bytes(field, "big")
    bits = 8 * len(field) - 1
    value &= (1 << bits) - 1  # the mark
    # The bit after the mark is the sign
    return value - (1 << bits) if value >> (bits - 1) else value


def decimal(text: bytes, most: int) -> int:
    """A decimal number of a PAX record, at least 0, at most ``most``. Raises Bad (bad-header, bad-size)."""
    if not text or len(text) > _DIGITS_MAX or text.strip(b"0123456789"):
        raise Bad("bad-header", f"{text[:40]!r} is no decimal number")
    value = int(text)
    if value > most:
        raise Bad("bad-size", f"{value} is more than {most}")
    return value


def moment(text: bytes) -> tuple[int, int]:
    """Seconds and nanoseconds (0 to 999,999,999) of a PAX time; what is finer is cut off. Raises Bad."""
    negative = text[:1] == b"-"
    whole, dot, fraction = text[negative:].partition(b".")
    if not whole or len(whole) > _DIGITS_MAX or (whole + fraction).strip(b"0123456789"):
        raise Bad("bad-header", f"{text[:40]!r} is no time")
    seconds, nanoseconds = int(whole), int(fraction[:9].ljust(9, b"0")) if dot else 0
    if negative:
        seconds, nanoseconds = (-seconds - 1, 1_000_000_000 - nanoseconds) if nanoseconds else (-seconds, 0)
    if not -(1 << 63) <= seconds < 1 << 63:
        raise Bad("bad-header", f"{text[:40]!r} is no time")
    return seconds, nanoseconds
