"""Long work on a terminal: a moving bar, and plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from isolat.cli import tables
from isolat.client import connect


def watch(request: connect.Call) -> dict[str, Any]:
    """Show progress on standard error until the answer is there."""
    show = _Bar() if sys.stderr.isatty() and tables.find_rich() else _Lines()
    with show:
        while True:
            kind, content, _ = request.next()
            if kind == "ok":
                found: dict[str, Any] = content
                return found
            if kind == "progress":
                show.put(str(content.get("text", "")), int(content.get("done") or 0), int(content.get("total") or 0))


class _Lines:
    """A line for each new text."""

    def __init__(self) -> None:
        self._last = ""

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def put(self, text: str, done: int, total: int) -> None:
        if text != self._last:
            self._last = text
            share = f" ({done} of {total})" if total else ""
            sys.stderr.write(f"{tables.clean(text)}{share}\n")
            sys.stderr.flush()


class _Bar(_Lines):
    """A moving bar."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def put(self, text: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=tables.clean(text), completed=done, total=total or None)
