"""Arguments of a request are a value or an error naming the field, whatever JSON comes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.daemon.arguments import Arguments
from isolat.errors import UsageError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=8,
)


@given(JSON)
def test_no_value_makes_a_reader_fail_otherwise_than_with_a_usage_error(value: Any) -> None:
    args = Arguments("run", {"x": value})
    readers = (
        lambda: args.text("x"),
        lambda: args.flag("x"),
        lambda: args.integer("x", 0, 0, 10),
        lambda: args.number("x", None, 0, 10),
        lambda: args.mapping("x"),
        lambda: args.texts("x"),
    )
    for read in readers:
        try:
            read()
        except UsageError as error:
            assert "run: x" in error.message


def test_true_is_no_number_and_one_is_no_flag() -> None:
    with pytest.raises(UsageError):
        Arguments("v", {"x": True}).integer("x", 0, 0, 10)
    with pytest.raises(UsageError):
        Arguments("v", {"x": 1}).flag("x")
