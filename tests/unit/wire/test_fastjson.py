"""The quick JSON must be the standard library's JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.wire import fastjson

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=30,
)


@given(JSON)
def test_dumps_writes_what_json_writes(value: Any) -> None:
    assert fastjson.dumps(value) == json.dumps(value, separators=(",", ":"))


@given(JSON, st.sampled_from([None, 2]))
def test_loads_reads_what_json_reads(value: Any, indent: int | None) -> None:
    text = f" \n{json.dumps(value, indent=indent)}\t"
    assert fastjson.loads(text) == json.loads(text)


@given(st.text(max_size=40) | st.text(alphabet='{}[]",:0123456789.eE+-truefalsn\\u ', max_size=30))
def test_what_json_refuses_is_refused_with_a_value_error(text: str) -> None:
    try:
        expected = json.loads(text, parse_constant=float)
    except ValueError:
        with pytest.raises(ValueError):
            fastjson.loads(text)
    else:
        if "NaN" not in text and "Infinity" not in text:
            assert fastjson.loads(text) == expected


def test_a_lone_surrogate_from_an_undecodable_argument_survives() -> None:
    argument = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert fastjson.loads(fastjson.dumps([argument])) == [argument]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_json_number_is_refused_both_ways(value: float) -> None:
    with pytest.raises(ValueError):
        fastjson.dumps(value)
    with pytest.raises(ValueError):
        fastjson.loads(json.dumps(value))


def test_what_has_no_json_form_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        fastjson.dumps({"a": object()})


def test_the_plain_fallback_agrees() -> None:
    dumps, loads = fastjson._plain()
    value = {"a": [1, 2.5, None, True, "é\udcff"], "b": {}}
    assert dumps(value) == fastjson.dumps(value)
    assert loads(dumps(value)) == value
