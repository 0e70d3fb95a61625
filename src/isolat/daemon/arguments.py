"""The arguments of a request, with their types: the answer is a value or an error that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isolat.errors import UsageError

_MISSING: Any = object()
_MAX_TEXTS = 4096


class Arguments:
    """One request's ``args``. A field that no reader asked for is refused by ``finish``."""

    def __init__(self, verb: str, data: Mapping[str, Any]) -> None:
        self._verb = verb
        self._data = data

    def raw(self, name: str, default: Any = _MISSING) -> Any:
        value = self._data.get(name)
        if value is None:
            if default is _MISSING:
                raise UsageError(f"{self._verb}: {name} is missing")
            return default
        return value

    def _typed(self, name: str, kind: type, word: str, default: Any) -> Any:
        value = self.raw(name, default)
        if value is default:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{self._verb}: {name} must be {word}, not {value!r:.80}")
        return value

    def text(self, name: str, default: Any = _MISSING) -> str:
        value: str = self._typed(name, str, "text", default)
        if isinstance(value, str) and "\0" in value:
            raise UsageError(f"{self._verb}: {name} contains a NUL character")
        return value

    def flag(self, name: str) -> bool:
        return bool(self._typed(name, bool, "true or false", False))

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        value: int = self._typed(name, int, "a whole number", default)
        if not least <= value <= most:
            raise UsageError(f"{self._verb}: {name} must be from {least} to {most}, not {value}")
        return value

    def number(self, name: str, default: float | None, least: float, most: float) -> float | None:
        value: Any = self.raw(name, default)
        if value is None or value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise UsageError(f"{self._verb}: {name} must be a number from {least:g} to {most:g}, not {value!r:.80}")
        return float(value)

    def mapping(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = self._typed(name, dict, "an object", _MISSING)
        return value

    def texts(self, name: str) -> list[str]:
        value = self._typed(name, list, "a list", [])
        if len(value) > _MAX_TEXTS:
            raise UsageError(f"{self._verb}: {name} has more than {_MAX_TEXTS} entries")
        for n, item in enumerate(value):
            if not isinstance(item, str) or "\0" in item:
                raise UsageError(f"{self._verb}: {name}[{n}] must be text without NUL characters, not {item!r:.80}")
        return list(value)
