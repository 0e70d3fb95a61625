"""Options of layers on the command line become those of the spec."""

from __future__ import annotations

import pytest

from isolat.cli.layer_options import parse
from isolat.errors import UsageError


def test_each_goes_to_its_layer_with_its_kind() -> None:
    given = ["microvm.volumes=live", "microvm.park_s=0", "microvm.template=false", "fake.a=0.5", "fake.b=x=y"]
    assert parse(given, "microvm/fake") == {
        "x-microvm": {"volumes": "live", "park_s": 0, "template": False},
        "x-fake": {"a": 0.5, "b": "x=y"},
    }


def test_the_last_one_counts() -> None:
    assert parse(["fake.a=1", "fake.a="], "fake") == {"x-fake": {"a": ""}}


@pytest.mark.parametrize("text", ["volumes=live", "microvm.volumes", ".a=1", "microvm.=1", "", "fake.a=1"])
def test_what_is_none_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="--layer-opt"):
        parse([text], "microvm")
