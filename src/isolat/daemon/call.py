"""One request to the daemon, as the verbs see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from isolat.daemon.arguments import Arguments
from isolat.engine.engine import Engine
from isolat.engine.maker import Caller

Answer = dict[str, Any]


@dataclass
class Call:
    """One request under way: who asks, with which descriptors, and how to answer before the end."""

    engine: Engine
    caller: Caller
    args: Arguments
    descriptors: list[int]
    send: Callable[[dict[str, Any], list[int]], None]
    gone: Callable[[], bool]  # the client has hung up
    shutdown: Callable[[], None]
    closing: list[int] = field(default_factory=list)
