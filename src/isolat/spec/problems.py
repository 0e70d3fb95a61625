"""Everything that is wrong with a spec, gathered, so that a user mends a file once and not ten times."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from isolat.errors import SpecError

_SHOWN = 40
_QUOTED_CHARACTERS = 60


class Problems:
    """Collects ``path: reason`` lines; ``check`` raises them all at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, path: str, reason: str) -> None:
        self.lines.append(f"{path or '.'}: {reason}")

    def check(self) -> None:
        """Raise SpecError when anything was added."""
        if not self.lines:
            return
        shown = self.lines[:_SHOWN]
        if len(self.lines) > _SHOWN:
            shown.append(f"… and {len(self.lines) - _SHOWN} more")
        count = "an error" if len(self.lines) == 1 else f"{len(self.lines)} errors"
        raise SpecError(f"the spec has {count}", details=tuple(shown))


def quote(value: object) -> str:
    """A value as a message shows it: never long, never a control character."""
    text = value if isinstance(value, str) else type(value).__name__
    shown = ascii(text[:_QUOTED_CHARACTERS]) if not text.isprintable() else f"{text[:_QUOTED_CHARACTERS]!r}"
    return shown + ("…" if len(text) > _QUOTED_CHARACTERS else "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean …?``, or nothing."""
    near = get_close_matches(word[:_QUOTED_CHARACTERS], list(known), 1, 0.7)
    return f"; did you mean {near[0]}?" if near else ""


def child(path: str, key: object) -> str:
    text = key if isinstance(key, str) else repr(key)
    plain = text.isprintable() and 0 < len(text) <= _QUOTED_CHARACTERS and not set(text) & set(" .[]:")
    return f"{path}.{text}" if plain else f"{path}[{quote(text)}]"
