"""Which layers there are, and which may stand on which.

A layer is added by one word in ``_ALL``. What may be stacked follows from the declared capabilities; only what makes
no place of its own is named, in ``ALONE``.
"""

from __future__ import annotations

import difflib
import itertools

from isolat.errors import NotFound, Unsupported
from isolat.layers.base import Boundary, CanEnter, Layer
from isolat.layers.container import ContainerLayer
from isolat.layers.fake import FakeLayer
from isolat.layers.host import HostLayer
from isolat.layers.microvm import MicrovmLayer
from isolat.layers.vm import VmLayer

_ALL = (HostLayer(), ContainerLayer(), MicrovmLayer(), VmLayer(), FakeLayer())
LAYERS: dict[str, Layer] = {layer.name: layer for layer in _ALL}

# Entering host is the same place with another root: nothing there that a layer could be put on.
ALONE = frozenset({"host"})


def find(name: str) -> Layer:
    """The layer of that name. Raises NotFound with the nearest one there is."""
    layer = LAYERS.get(name)
    if layer is not None:
        return layer
    near = difflib.get_close_matches(name, LAYERS, n=1)
    known = ", ".join(sorted(LAYERS))
    hint = f"did you mean {near[0]}? " if near else ""
    raise NotFound(f"there is no layer {name!r}", hint=f"{hint}The layers are: {known}")


def resolve(stack: tuple[str, ...]) -> tuple[Layer, ...]:
    """The layers of a stack, from the hardware up. Raises NotFound, or Unsupported for an impossible stack."""
    if not stack:
        raise NotFound("a stack needs at least one layer", hint=f"the layers are: {', '.join(sorted(LAYERS))}")
    layers = tuple(find(name) for name in stack)
    for outer, inner in itertools.pairwise(layers):
        reason = objection(outer, inner)
        if reason:
            raise Unsupported(f"{'/'.join(stack)}: {reason[0]}", hint=reason[1])
    return layers


def objection(outer: Layer, inner: Layer) -> tuple[str, str] | None:
    """Why ``inner`` can't stand on ``outer``, and what to do about it; None where it can."""
    for layer in (outer, inner):
        if layer.name in ALONE:
            return f"{layer.name} can't be part of a stack: it makes no place of its own", "leave it out"
    if not (outer.capabilities.enter and isinstance(outer, CanEnter)):
        return f"nothing can be put inside {outer.name}: it can't be entered", "put it last"
    if inner.capabilities.boundary is not Boundary.NONE and outer.capabilities.boundary is not Boundary.KERNEL:
        return (
            f"{inner.name} needs mounts and namespaces of its own, which the inside of {outer.name} does not allow",
            f"put it on the machine itself ({inner.name}), or into a layer with its own kernel",
        )
    return None
