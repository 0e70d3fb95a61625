"""Sizes and durations mean what they mean in Compose, and survive a file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.spec import units


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("2b", 2), ("1024kb", 1 << 20), ("2048k", 2 << 20), ("300m", 300 << 20), ("1gb", 1 << 30),
        ("1G", 1 << 30), ("1GiB", 1 << 30), ("1.5g", 3 << 29), ("0.5k", 512), (" 10 MB ", 10 << 20), ("1t", 1 << 40),
    ],
)  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    assert units.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "m", "-1m", "1x", "1mm", "1.m", "1e3", "1m\n", "0x10", "1,5g", "9" * 50])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        units.parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("10s", 10 * 10**9), ("1m30s", 90 * 10**9), ("500ms", 5 * 10**8), ("1h5m30s20ms", 3930 * 10**9 + 20 * 10**6),
        ("0s", 0), ("1us", 1000), ("1µs", 1000), ("7ns", 7), ("1.5h", 5400 * 10**9),
    ],
)  # fmt: skip
def test_durations(text: str, ns: int) -> None:
    assert units.parse_duration_ns(text) == ns


@pytest.mark.parametrize("text", ["", "10", "s", "1d", "-1s", "1s ", "1m 30s", "1e3s", "1s" * 200])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="must be a duration"):
        units.parse_duration_ns(text)


@given(st.integers(0, 1 << 60))
def test_a_written_size_reads_back(count: int) -> None:
    assert units.parse_bytes(str(units.format_bytes(count))) == count


@given(st.integers(0, 10**18))
def test_a_written_duration_reads_back(count: int) -> None:
    assert units.parse_duration_ns(units.format_duration_ns(count)) == count
