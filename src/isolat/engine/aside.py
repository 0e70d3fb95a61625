"""Work that is done aside: by one thread of its own, one thing after the other, while nobody waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from isolat.engine.journal import log_defect

Work = Callable[[], None]
_ENDS_S = 60.0


class Aside:
    """``next`` gives what is to be done now, if anything; ``wait_s`` how long nothing will be. Both are asked with the
    lock of ``condition`` held, which also guards what they look at; the work is done without it.
    """

    def __init__(self, name: str, next: Callable[[], Work | None], wait_s: Callable[[], float]) -> None:
        self.condition = threading.Condition()
        self.closed = False
        self._name = name
        self._next = next
        self._wait_s = wait_s
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There may be something to do; with the lock held."""
        if self._thread is None and not self.closed:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self.condition.notify_all()

    def close(self) -> None:
        """Do no more; what is being done is waited for."""
        with self.condition:
            self.closed = True
            self.condition.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_ENDS_S)

    def _run(self) -> None:
        while True:
            with self.condition:
                work = self._next()
                while work is None and not self.closed:
                    self.condition.wait(self._wait_s())
                    work = self._next()
                if self.closed:
                    return
            if work is not None:
                try:
                    work()
                except Exception as error:
                    log_defect(self._name, error)
