"""Which stacks there can be."""

from __future__ import annotations

import pytest

from isolat.errors import NotFound, Unsupported
from isolat.layers.base import CanEnter
from isolat.layers.registry import LAYERS, resolve


@pytest.mark.parametrize("stack", ["host", "container", "fake", "fake/fake", "container/fake", "fake/fake/fake"])
def test_possible_stacks(stack: str) -> None:
    names = tuple(stack.split("/"))
    assert tuple(layer.name for layer in resolve(names)) == names


@pytest.mark.parametrize(
    ("stack", "word"),
    [
        ("container/host", "host can't be part of a stack"),
        ("host/fake", "host can't be part of a stack"),
        ("container/container", "mounts and namespaces"),
        ("fake/container", "mounts and namespaces"),
        ("fake/fake/container", "mounts and namespaces"),
    ],
)
def test_impossible_stacks_say_why_and_what_to_do(stack: str, word: str) -> None:
    with pytest.raises(Unsupported, match=word) as caught:
        resolve(tuple(stack.split("/")))
    assert stack in caught.value.message
    assert caught.value.hint


def test_an_unknown_layer_names_the_nearest() -> None:
    with pytest.raises(NotFound, match="contaner") as caught:
        resolve(("contaner",))
    assert "did you mean container?" in caught.value.hint


def test_an_empty_stack_is_no_stack() -> None:
    with pytest.raises(NotFound):
        resolve(())


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_declared_is_implemented(name: str) -> None:
    layer = LAYERS[name]
    assert layer.capabilities.enter == isinstance(layer, CanEnter)
    for ability, methods in (("pause", ("pause", "resume")), ("snapshot", ("snapshot",)), ("resize", ("resize",))):
        implemented = all(hasattr(layer, method) for method in methods)
        assert getattr(layer.capabilities, ability) == implemented, ability
