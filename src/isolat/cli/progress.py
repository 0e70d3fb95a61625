"""Long work on a terminal: a moving bar, and plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from isolat.cli import tables
from isolat.client import connect

_BYTES = ", bytes"  # what a text ends with whose numbers are bytes


def watch(
    request: connect.Call, quiet: bool = False, on_row: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Show progress on standard error until the answer is there; rows go to whoever wants them."""
    with show(quiet=quiet) as shown:
        while True:
            kind, content, _ = request.next()
            if kind == "ok":
                found: dict[str, Any] = content
                return found
            if kind == "row" and on_row is not None:
                on_row(content)
            if kind == "progress":
                shown.put(str(content.get("text", "")), int(content.get("done") or 0), int(content.get("total") or 0))


def show(*, quiet: bool) -> _Lines:
    """What shows progress here, as a context manager."""
    return _Quiet() if quiet else _Bar() if sys.stderr.isatty() and tables.find_rich() else _Lines()


def _share(text: str, done: int, total: int) -> str:
    if not total:
        return ""
    return f" ({tables.size(total)})" if text.endswith(_BYTES) else f" ({done} of {total})"


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
            sys.stderr.write(f"{tables.clean(text.removesuffix(_BYTES))}{_share(text, done, total)}\n")
            sys.stderr.flush()


class _Quiet(_Lines):
    """Nothing."""

    def put(self, text: str, done: int, total: int) -> None:
        pass


class _Bar(_Lines):
    """A moving bar; of bytes with their rate and the time that is left."""

    def __init__(self) -> None:
        super().__init__()
        from rich import progress as rich
        from rich.console import Console

        plain = (rich.TextColumn("{task.description}"), rich.BarColumn())
        sizes = (rich.DownloadColumn(), rich.TransferSpeedColumn(), rich.TimeRemainingColumn(compact=True))
        console = Console(stderr=True)
        self._of_bytes = rich.Progress(*plain, *sizes, console=console, transient=True)
        self._of_steps = rich.Progress(*plain, rich.TaskProgressColumn(), console=console, transient=True)
        self._progress = self._of_steps
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def put(self, text: str, done: int, total: int) -> None:
        wanted = self._of_bytes if text.endswith(_BYTES) else self._of_steps
        if wanted is not self._progress or (text != self._last and wanted is self._of_bytes):
            self._begin(wanted)  # a rate is one of the same thing
        self._last = text
        shown = tables.clean(text.removesuffix(_BYTES))
        self._progress.update(self._task, description=shown, completed=done, total=total or None)

    def _begin(self, wanted: Any) -> None:
        self._progress.stop()
        self._progress.remove_task(self._task)
        self._progress = wanted
        self._task = wanted.add_task("", total=None)
        wanted.start()
