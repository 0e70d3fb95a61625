"""``images``, ``rmi``, ``image bootstrap``."""

from __future__ import annotations

import sys
from typing import Any

from isolat.cli import manage, tables
from isolat.cli import options as o
from isolat.client import connect, times


def images(parsed: o.Parsed) -> int:
    found = connect.ask(connect.find_root(parsed.values.get("root")), "images", {})["images"]
    if parsed.flag("json"):
        tables.print_json(found)
    elif parsed.flag("quiet"):
        tables.print_lines(name for image in found for name in _names(image))
    else:
        rows = [_row(image, name, parsed.flag("no_trunc")) for image in found for name in _names(image)]
        tables.print_table(("NAME", "DIGEST", "SIZE", "CREATED", "KIND"), rows)
    return 0


def _names(image: dict[str, Any]) -> list[str]:
    """Its names; the digest stands for an image that has none."""
    names = image.get("names") or [image.get("name")]
    return [str(name) for name in names if name] or [str(image.get("digest"))]


def _row(image: dict[str, Any], name: str, whole: bool) -> list[str]:
    digest = str(image.get("digest", "")).removeprefix("sha256:")
    return [
        name if whole or name != image.get("digest") else "<none>",
        digest if whole else digest[: tables.ID_CHARACTERS],
        tables.size(int(image.get("size_bytes", 0))),
        times.age(int(image.get("created_ns", 0))),
        str(image.get("kind") or (image.get("config") or {}).get("kind", "")),
    ]


def rmi(parsed: o.Parsed) -> int:
    def act(root: str, image: str) -> str:
        connect.ask(root, "rmi", {"image": image})
        return image

    return manage.each(parsed, act)


def bootstrap(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    include = [name for text in parsed.texts("include") for name in text.split(",") if name]
    args = {"image": parsed.words[0], "include": include, "arch": parsed.text("arch")}
    with connect.call(root, "bootstrap", args) as request:
        found = _watch(request)
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([_names(found)[0]])
    return 0


def _watch(request: connect.Call) -> dict[str, Any]:
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
