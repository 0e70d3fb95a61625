"""Schema and parser come from one table; these tests hold them together, and docs/spec.md with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.errors import SpecError
from isolat.spec.model import Spec
from isolat.spec.parse import KEYS, parse, to_service
from isolat.spec.schema import schema

from .strategies import specs
from .test_parse import ANYTHING

SCHEMA = schema()
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "object": (dict,), "array": (list,), "boolean": (bool,), "null": (type(None),),
    "number": (int, float), "integer": (int,),
}  # fmt: skip


def has_type(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[name])


def valid(value: Any, rule: dict[str, Any]) -> bool:
    """The part of JSON Schema that the schema uses."""
    names = rule.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(has_type(value, name) for name in names):
        return False
    if "enum" in rule and (value not in rule["enum"] or isinstance(value, bool)):
        return False
    if "anyOf" in rule and not any(valid(value, option) for option in rule["anyOf"]):
        return False
    if isinstance(value, str):
        return len(value) <= rule.get("maxLength", len(value)) and bool(re.search(rule.get("pattern", ""), value))
    if isinstance(value, list):
        return len(value) <= rule.get("maxItems", len(value)) and all(valid(v, rule.get("items", {})) for v in value)
    if isinstance(value, dict):
        return valid_object(value, rule)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(rule.get("minimum", value) <= value <= rule.get("maximum", value))
    return True


def valid_object(value: dict[str, Any], rule: dict[str, Any]) -> bool:
    if any(name not in value for name in rule.get("required", [])):
        return False
    for key, inner in value.items():
        rules = [rule["properties"][key]] if key in rule.get("properties", {}) else []
        rules += [r for pattern, r in rule.get("patternProperties", {}).items() if re.search(pattern, key)]
        other = rule.get("additionalProperties", True)
        if not rules and (other is False or (isinstance(other, dict) and not valid(inner, other))):
            return False
        if not all(valid(inner, one) for one in rules):
            return False
    return True


def parses(service: object) -> bool:
    try:
        parse(service)
    except SpecError:
        return False
    return True


SAMPLES: list[tuple[str, object, bool]] = [
    ("runtime", "microvm/container", True), ("runtime", "A", False), ("runtime", "a/b/c/d/e", False),
    ("container_name", "web-1", True), ("container_name", "-", False),
    ("command", "a b", True), ("command", ["a"], True), ("command", [1], False), ("command", 1, False),
    ("environment", {"A": 1}, True), ("environment", ["A=1"], True), ("environment", ["A"], False),
    ("environment", {"A": None}, False), ("environment", {"A": True}, False), ("labels", {"A": None}, True),
    ("working_dir", "/a", True), ("working_dir", "a", False), ("user", 0, True), ("user", -1, False),
    ("hostname", "a.b", True), ("hostname", ".", False), ("tty", True, True), ("tty", "true", False),
    ("network_mode", "none", True), ("network_mode", "bridge", False),
    ("mem_limit", "64m", True), ("mem_limit", 64 << 20, True), ("mem_limit", 5, False), ("mem_limit", "5x", False),
    ("cpus", 0.5, True), ("cpus", "0.5", True), ("cpus", 0, False), ("cpus", "x", False),
    ("cpu_shares", 2, True), ("cpu_shares", 1, False), ("pids_limit", 10, True), ("pids_limit", 0, False),
    ("volumes", ["/a:/b"], True), ("volumes", ["/a:/b:ro"], True), ("volumes", ["/a:/b:x"], False),
    ("volumes", [{"type": "bind", "source": "/a", "target": "/b"}], True), ("volumes", [{"source": "/a"}], False),
    ("volumes", [{"source": "/a", "target": "/b", "x": 1}], False), ("volumes", "/a:/b", False),
    ("volumes", ["data:/b:ro"], True), ("volumes", ["da?a:/b"], False),
    ("volumes", [{"type": "volume", "source": "data", "target": "/b"}], True),
    ("volumes", [{"type": "volume", "source": "/a", "target": "/b"}], False),
    ("volumes", [{"type": "bind", "source": "data", "target": "/b"}], False),
    ("tmpfs", "/t", True), ("tmpfs", ["/t:size=1m"], True), ("tmpfs", ["/t:mode=1"], False),
    ("stop_grace_period", "1m30s", True), ("stop_grace_period", "x", False), ("stop_grace_period", -1, False),
    ("logging", {"driver": "json-file"}, True), ("logging", {"driver": "x"}, False), ("logging", {"x": 1}, False),
    ("storage_opt", {"size": "1g"}, True), ("storage_opt", {"x": 1}, False),
    ("x-timeout", 1, True), ("x-timeout", 0, False), ("x-remove", True, True), ("x-remove", {}, False),
    ("x-oci-runtime", "runc", True), ("x-oci-runtime", "a b", False),
    ("x-fake", {}, True), ("x-fake", 1, False), ("unknown", 1, False),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "good"), SAMPLES)
def test_schema_and_parser_agree_on_samples(key: str, value: object, good: bool) -> None:
    service = {"image": "debian", key: value}
    assert valid(service, SCHEMA) is good
    assert parses(service) is good


def test_both_require_an_image() -> None:
    assert not valid({}, SCHEMA)
    assert not parses({})


@given(specs())
def test_the_schema_takes_every_written_spec(spec: Spec) -> None:
    assert valid(to_service(spec), SCHEMA)


@given(st.dictionaries(st.sampled_from([key.name for key in KEYS] + ["x-fake", "other"]), ANYTHING, max_size=6))
def test_what_the_schema_refuses_the_parser_refuses(service: dict[str, Any]) -> None:
    service = {"image": "debian", **service}
    if not valid(service, SCHEMA):
        assert not parses(service)


def test_the_page_lists_every_key() -> None:
    page = (Path(__file__).parents[3] / "docs" / "spec.md").read_text()
    listed = re.findall(r"^\| `([a-z_-]+)` \|", page, re.MULTILINE)
    assert listed == [key.name for key in KEYS]
