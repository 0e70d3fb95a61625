"""From an environment to the places in its stack."""

from __future__ import annotations

from dataclasses import replace

from isolat.engine.environment import Environment
from isolat.errors import Lost, Unsupported
from isolat.layers import registry
from isolat.layers.base import CanEnter, Frame, Layer
from isolat.places.base import Facts, Place
from isolat.places.wired import WiredPlace


def outermost(env: Environment, facts: Facts) -> Place:
    """The place that its first layer is in: this machine, or the inside of the environment around it."""
    if env.handle.around is None:
        return WiredPlace(env.live_link, facts)
    if env.outer is None:
        raise Lost(f"{env.handle.around.name}, which {env.name} was in, is gone", hint=f"`isolat rm {env.name}`")
    return ground(env.outer, facts)


def surroundings(env: Environment, facts: Facts) -> list[tuple[Layer, Place]]:
    """Every layer around what is put into it, from the hardware up, each with what a layer on it finds inside."""
    found = surroundings(env.outer, facts) if env.outer else []
    place = outermost(env, facts)
    for frame in env.handle.frames:
        place = _inside(replace(frame, main=None), place)
        found.append((registry.LAYERS[frame.layer], place))
    return found


def ground(env: Environment, facts: Facts) -> Place:
    """Where other environments are put into it: what a layer would find that is stacked on its own."""
    return surroundings(env, facts)[-1][1]


def innermost(env: Environment, facts: Facts) -> Place:
    """The inside of the last layer: where exec starts its processes."""
    place = outermost(env, facts)
    for frame in env.handle.frames:
        place = _inside(frame, place)
    return place


def at(env: Environment, facts: Facts, n: int) -> Place:
    """The place that its layer number ``n``, from the hardware up, is in."""
    place = outermost(env, facts)
    for frame in env.handle.frames[:n]:
        place = _inside(frame, place)
    return place


def last(env: Environment, facts: Facts) -> tuple[Layer, Place]:
    """The last layer and the place it is in."""
    return registry.LAYERS[env.handle.frames[-1].layer], at(env, facts, len(env.handle.frames) - 1)


def _inside(frame: Frame, place: Place) -> Place:
    layer = registry.LAYERS[frame.layer]
    if not isinstance(layer, CanEnter):
        raise Unsupported(f"the layer {frame.layer} cannot be entered")
    return layer.inside(frame, place)
