"""JSON without ``import json``, whose regular expressions cost a command more than its whole conversation.

The standard library's own C accelerators do the work, so results equal those of ``json`` (a test compares
them); where an interpreter lacks them, ``json`` itself is used. Stricter in one thing: NaN and infinities are
not JSON and are refused both ways.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_WHITESPACE = " \t\n\r"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_object(value: object) -> NoReturn:
    raise TypeError(f"a {type(value).__name__} has no JSON form")


class _Context:
    """What the C scanner asks of a ``json.JSONDecoder``."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(_refuse_constant)


def _accelerated() -> tuple[Callable[[Any], str], Callable[[str], Any]]:
    import _json

    scan = _json.make_scanner(_Context())  # type: ignore[arg-type]
    encode = _json.make_encoder(
        None, _refuse_object, _json.encode_basestring_ascii, None, ":", ",", False, False, False
    )

    def dumps(value: Any) -> str:
        return "".join(encode(value, 0))

    def loads(text: str) -> Any:
        start = len(text) - len(text.lstrip(_WHITESPACE))
        try:
            value, end = scan(text, start)
        except StopIteration as stop:
            raise ValueError(f"no JSON value at character {stop.value}") from None
        if text[end:].strip(_WHITESPACE):
            raise ValueError(f"more than one JSON value, at character {end}")
        return value

    return dumps, loads


def _plain() -> tuple[Callable[[Any], str], Callable[[str], Any]]:
    import json

    def dumps(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), allow_nan=False, check_circular=False)

    def loads(text: str) -> Any:
        return json.loads(text, parse_constant=_refuse_constant)

    return dumps, loads


def _choose() -> tuple[Callable[[Any], str], Callable[[str], Any]]:
    try:
        dumps, loads = _accelerated()
        if loads(dumps({"a": [1, None]})) == {"a": [1, None]}:
            return dumps, loads
    except Exception:  # another interpreter's signature; the plain way is always right
        pass
    return _plain()


_dumps, _loads = _choose()


def dumps(value: Any) -> str:
    """Compact ASCII. Raises ValueError or TypeError on what is not JSON, RecursionError if too deep."""
    return _dumps(value)


def loads(text: str) -> Any:
    """Raises ValueError on what is not JSON, RecursionError on what nests too deeply."""
    return _loads(text)
