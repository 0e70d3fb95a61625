"""Listings: a table of rich on a terminal, plain columns into a pipe, JSON when asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

ID_CHARACTERS = 12


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(clean(line) + "\n")


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    cells = [[clean(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and find_rich():
        _rich(titles, cells)
    else:
        _plain(titles, cells)


def clean(text: str) -> str:
    """Without control characters: what an environment is called must not move anybody's cursor."""
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding, "replace")


def shorten(text: str, characters: int, whole: bool) -> str:
    return text if whole or len(text) <= characters else text[: characters - 1] + "…"


def size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def find_rich() -> bool:
    """Whether rich can be had. The launcher starts Python without ``site``, which is what finds installed packages."""
    try:
        if "site" not in sys.modules:
            import site

            site.main()
        import rich.table
    except ImportError:
        return False
    return bool(rich.table)


def _plain(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    for row in (titles, *rows):
        sys.stdout.write("   ".join(f"{cell:<{widths[i]}}" for i, cell in enumerate(row)).rstrip() + "\n")


def _rich(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
