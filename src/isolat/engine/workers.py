"""The engine's background work: a few threads for ends and removals, one for timers."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable

from isolat.engine.journal import log_defect

Work = Callable[[], None]


class Workers:
    """Runs what is submitted, some at a time. A piece of work that raises is logged and harms no other."""

    def __init__(self, count: int = 4) -> None:
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"worker-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work) -> None:
        self._queue.put(work)

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(10)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception as error:  # the thread must outlive any defect
                log_defect("background work", error)


class Timers:
    """Calls back at a moment of the monotonic clock, from one thread; the call must not block for long."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._heap: list[tuple[float, int, Work]] = []
        self._order = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="timers", daemon=True)
        self._thread.start()

    def after(self, seconds: float, work: Work) -> None:
        with self._condition:
            heapq.heappush(self._heap, (time.monotonic() + seconds, next(self._order), work))
            self._condition.notify()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join(5)

    def _run(self) -> None:
        while True:
            with self._condition:
                if self._closed:
                    return
                wait_s = self._heap[0][0] - time.monotonic() if self._heap else None
                if wait_s is None or wait_s > 0:
                    self._condition.wait(wait_s)
                    continue
                _, _, work = heapq.heappop(self._heap)
            try:
                work()
            except Exception as error:  # as above
                log_defect("a timer", error)
