"""What happened, told to whoever listens and kept in the index."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

_LISTENER_EVENTS = 10_000


@dataclass(frozen=True)
class Event:
    event: str  # create, start, exec, die, lost, stop, kill, oom, destroy, timeout
    id: str
    name: str
    time_ns: int = field(default_factory=time.time_ns)
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class EventBus:
    """Delivers every event to every listener. A listener that does not read is cut off, never waited for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[queue.Queue[Event | None]] = []

    def publish(self, event: Event) -> None:
        with self._lock:
            for listener in list(self._listeners):
                try:
                    listener.put_nowait(event)
                except queue.Full:
                    self._listeners.remove(listener)

    def listen(self) -> queue.Queue[Event | None]:
        """A queue of the events from now on; None ends it. Give it back with ``leave``."""
        listener: queue.Queue[Event | None] = queue.Queue(_LISTENER_EVENTS)
        with self._lock:
            self._listeners.append(listener)
        return listener

    def leave(self, listener: queue.Queue[Event | None]) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def close(self) -> None:
        with self._lock:
            for listener in self._listeners:
                try:
                    listener.put_nowait(None)
                except queue.Full:
                    pass
            self._listeners.clear()
