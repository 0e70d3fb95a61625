"""The numbers of the protocol stand in three places (Python, C, the page): they are the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isolat.wire import kinds as k

ROOT = Path(__file__).resolve().parents[3]
HEADER = re.sub(r"/\*.*?\*/", "", (ROOT / "native" / "wire.h").read_text(), flags=re.DOTALL)
PAGE = (ROOT / "docs" / "protocol.md").read_text()


def enumerated() -> dict[str, int]:
    found: dict[str, int] = {}
    for body in re.findall(r"enum \{(.*?)\}", HEADER, re.DOTALL):
        value = -1
        for item in filter(None, (part.strip() for part in body.split(","))):
            name, _, given = item.partition("=")
            value = shifted(given) if given else value + 1
            found[name.strip()] = value
    return found


def shifted(text: str) -> int:
    number, _, by = text.partition("<<")
    return int(number) << int(by or 0)


IN_C = enumerated()


@pytest.mark.parametrize(("prefix", "python"), [("K_", ""), ("T_", "T_"), ("F_", "F_"), ("SCOPE_", "SCOPE_")])
def test_python_and_c_agree(prefix: str, python: str) -> None:
    there = {name.removeprefix(prefix): n for name, n in IN_C.items() if name.startswith(prefix)}
    if prefix == "K_":
        here = {name: n for n, name in k.KIND_NAMES.items()}
    else:
        here = {name.removeprefix(python): n for name, n in vars(k).items() if name.startswith(python)}
    assert here == there


def test_bounds_agree() -> None:
    assert (IN_C["WIRE_VERSION"], IN_C["HEADER_BYTES"], IN_C["MAX_BODY"], IN_C["MAX_DATA"], IN_C["MAX_FDS"]) == (
        k.VERSION, k.HEADER_BYTES, k.MAX_BODY_BYTES, k.MAX_DATA_BYTES, k.MAX_DESCRIPTORS,
    )  # fmt: skip


def test_the_page_has_every_kind_and_flag() -> None:
    rows = {name: int(n) for n, name in re.findall(r"^\| (\d+) \| ([A-Z]+) \|", PAGE, re.MULTILINE)}
    assert rows == {name: n for n, name in k.KIND_NAMES.items()}
    for name, value in vars(k).items():
        if name.startswith("F_"):
            assert re.search(rf"\b{value}\s+{name.removeprefix('F_')}\b", PAGE), name
