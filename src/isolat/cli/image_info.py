"""``tag``, ``image inspect``, ``history``, ``image tree``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from isolat.cli import failure, tables
from isolat.cli import options as o
from isolat.client import connect
from isolat.errors import IsolatError

_COMMAND_CHARACTERS = 45
_SHELL = "/bin/sh -c "
_NOT_RUN = "#(nop) "
_NO_TIME = "0001-01-01"  # how Go writes that there is none


def tag(parsed: o.Parsed) -> int:
    image, *names = parsed.words
    connect.ask(connect.find_root(parsed.values.get("root")), "tag", {"image": image, "names": names})
    return 0


def inspect(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    found, code = [], 0
    for image in parsed.words:
        try:
            found += connect.ask(root, "image_inspect", {"images": [image]})["images"]
        except IsolatError as error:
            code = failure.tell(error)
    tables.print_json(found)
    return code


def history(parsed: o.Parsed) -> int:
    root = connect.find_root(parsed.values.get("root"))
    rows = connect.ask(root, "history", {"image": parsed.words[0]})["history"]
    if parsed.flag("json"):
        tables.print_json(rows)
    else:
        whole = parsed.flag("no_trunc")
        tables.print_table(("CREATED", "CREATED BY", "SIZE", "COMMENT"), [_step(row, whole) for row in rows])
    return 0


def _step(row: dict[str, Any], whole: bool) -> list[str]:
    command = " ".join(str(row["created_by"]).split())
    if not whole:
        command = command.removeprefix(_SHELL).removeprefix(_NOT_RUN)
    created = "" if str(row["created"]).startswith(_NO_TIME) else str(row["created"])
    return [
        (created if whole else created[:19].replace("T", " ")) or "-",
        tables.shorten(command, _COMMAND_CHARACTERS, whole),
        tables.size(int(row["size_bytes"])),
        str(row["comment"]),
    ]


def tree(parsed: o.Parsed) -> int:
    found = connect.ask(connect.find_root(parsed.values.get("root")), "image_tree", {})["tree"]
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines(line for node in found for line in _lines(node, "", ""))
    return 0


def _lines(node: dict[str, Any], first: str, rest: str) -> Iterator[str]:
    """A line for the layers that it adds, one for each image that ends there, then those that go on from it."""
    layers, images, below = node["layers"], node["images"], node["children"]
    yield f"{first}{_layers(layers, int(node['size_bytes']))}"
    inner = [_Line(_image(image)) for image in images] + [_Line(node=child) for child in below]
    for at, one in enumerate(inner):
        last = at == len(inner) - 1
        head, tail = (f"{rest}└─ ", f"{rest}   ") if last else (f"{rest}├─ ", f"{rest}│  ")
        if one.node is None:
            yield f"{head}{one.text}"
        else:
            yield from _lines(one.node, head, tail)


class _Line:
    """What hangs at a node: an image's name, or a further node."""

    def __init__(self, text: str = "", node: dict[str, Any] | None = None) -> None:
        self.text = text
        self.node = node


def _layers(layers: list[dict[str, Any]], size_bytes: int) -> str:
    if not layers:
        return "no layers"
    count = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    last = str(layers[-1]["digest"]).removeprefix("sha256:")[: tables.ID_CHARACTERS]
    return f"{last} {count}, {tables.size(size_bytes)}"


def _image(image: dict[str, Any]) -> str:
    identity = str(image["id"]).removeprefix("sha256:")[: tables.ID_CHARACTERS]
    return f"{', '.join(image['names']) or '<none>'} ({identity})"
