"""The JSON Schema of a service, made from the parser's own table, for editors and other programs.

It is the parser's shape without what a schema cannot say (sums, keys that depend on each other): what the
schema refuses the parser refuses.
"""

from __future__ import annotations

from typing import Any

from isolat.spec.parse import KEYS


def schema() -> dict[str, Any]:
    """The schema of one service."""
    properties = {}
    for key in KEYS:
        nullable = {"anyOf": [key.kind.schema, {"type": "null"}]}
        properties[key.name] = {"description": key.summary, **nullable}
    properties["image"] = {"description": "the root filesystem; required", **_kind_of("image")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Isolat environment",
        "description": "A Compose service with the keys that Isolat knows (docs/spec.md).",
        "type": "object",
        "properties": properties,
        "patternProperties": {_other_x_keys(): {"type": "object"}},
        "required": ["image"],
        "additionalProperties": False,
    }


def _kind_of(name: str) -> dict[str, Any]:
    return next(key.kind.schema for key in KEYS if key.name == name)


def _other_x_keys() -> str:
    ours = "|".join(key.name.removeprefix("x-") for key in KEYS if key.name.startswith("x-"))
    return f"^x-(?!(?:{ours})$)[a-z][a-z0-9-]{{0,31}}$"
