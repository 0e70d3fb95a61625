"""``--layer-opt LAYER.KEY=VALUE``: what only one layer understands, from words to ``x-LAYER`` (docs/spec.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from isolat.cli import options as o

_WORDS: dict[str, Any] = {"true": True, "false": False}


def parse(given: Iterable[str], stack: str) -> dict[str, dict[str, Any]]:
    """``x-LAYER`` to its options; the last value of a key counts.

    Raises UsageError for what is no option, or one of a layer that ``stack`` does not have.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        layer, _, key = name.partition(".")
        if not (equals and layer and key):
            raise o.usage_error(f"--layer-opt: {text!r} is none", "LAYER.KEY=VALUE, as in microvm.volumes=live")
        if layer not in stack.split("/"):
            raise o.usage_error(f"--layer-opt: {text!r} is for a layer that this has not: {stack}", "see --layer")
        found.setdefault(f"x-{layer}", {})[key] = _value(value)
    return found


def _value(text: str) -> Any:
    """As in a YAML file: truth, a number, or text."""
    if text in _WORDS:
        return _WORDS[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
