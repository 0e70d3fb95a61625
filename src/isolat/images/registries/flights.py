"""Two who want the same at once: the work is done once, both see how far it is, and both get what comes of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from isolat.images.progress import Progress
from isolat.images.registries.watch import Abandoned

T = TypeVar("T")
_LOOK_S = 0.2


@dataclass(frozen=True)
class Passenger:
    """Who waits: told of progress; ``gone`` when nobody is there any more."""

    progress: Progress
    gone: Callable[[], bool] = lambda: False

    def tell(self, text: str, done: int, total: int) -> None:
        with contextlib.suppress(OSError):  # gone: noticed where it matters
            self.progress(text, done, total)


@dataclass
class Flight(Generic[T]):
    """One piece of work and all who wait for it."""

    passengers: list[Passenger] = field(default_factory=list)
    landed: threading.Event = field(default_factory=threading.Event)
    result: T | None = None
    error: BaseException | None = None

    def tell(self, text: str, done: int, total: int) -> None:
        for passenger in list(self.passengers):
            passenger.tell(text, done, total)

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    def abandoned(self) -> bool:
        """Nobody waits any more."""
        return all(passenger.gone() for passenger in list(self.passengers))


class Flights(Generic[T]):
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flying: dict[object, Flight[T]] = {}

    def join(self, key: object, passenger: Passenger, work: Callable[[Flight[T]], T]) -> T:
        """What ``work`` returns, or raises; done by the first who comes with this key, for all who come meanwhile."""
        while True:
            with self._lock:
                flight = self._flying.get(key)
                first = flight is None
                if flight is None:
                    flight = self._flying[key] = Flight()
                flight.passengers.append(passenger)
            if first:
                return self._fly(key, flight, work)
            while not flight.landed.wait(_LOOK_S):
                if passenger.gone():
                    raise Abandoned("nobody waits for it any more")
            if not isinstance(flight.error, Abandoned):
                return flight.outcome()
            # It was given up just before this one came: begin anew

    def _fly(self, key: object, flight: Flight[T], work: Callable[[Flight[T]], T]) -> T:
        try:
            flight.result = work(flight)
            return flight.result
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flying[key]
            flight.landed.set()
