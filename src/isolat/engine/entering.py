"""From an environment to the places in its stack."""

from __future__ import annotations

from isolat.engine.environment import Environment
from isolat.errors import Unsupported
from isolat.layers import registry
from isolat.layers.base import CanEnter, Frame, Layer
from isolat.places.base import Facts, Place
from isolat.places.wired import WiredPlace


def innermost(env: Environment, facts: Facts) -> Place:
    """The inside of the last layer: where exec starts its processes."""
    place: Place = WiredPlace(env.live_link, facts)
    for frame in env.handle.frames:
        place = _inside(frame, place)
    return place


def last(env: Environment, facts: Facts) -> tuple[Layer, Place]:
    """The last layer and the place it is in."""
    place: Place = WiredPlace(env.live_link, facts)
    for frame in env.handle.frames[:-1]:
        place = _inside(frame, place)
    return registry.LAYERS[env.handle.frames[-1].layer], place


def _inside(frame: Frame, place: Place) -> Place:
    layer = registry.LAYERS[frame.layer]
    if not isinstance(layer, CanEnter):
        raise Unsupported(f"the layer {frame.layer} cannot be entered")
    return layer.inside(frame, place)
