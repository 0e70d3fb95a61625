"""``images``, ``rmi``, ``image bootstrap``."""

from __future__ import annotations

from typing import Any

from isolat.cli import manage, progress, tables
from isolat.cli import options as o
from isolat.client import connect, times


def images(parsed: o.Parsed) -> int:
    found = connect.ask(connect.find_root(parsed.values.get("root")), "images", {})["images"]
    if parsed.flag("json"):
        tables.print_json(found)
    elif parsed.flag("quiet"):
        tables.print_lines(name for image in found for name in _names(image))
    else:
        titles = ["NAME", "DIGEST", "SIZE", "CREATED", "KIND"]
        rows = [_row(image, name, parsed.flag("no_trunc")) for image in found for name in _names(image)]
        if parsed.flag("digests"):
            titles.append("MANIFEST")
            manifests = [str(image.get("manifest") or "<none>") for image in found for _ in _names(image)]
            rows = [[*row, manifest] for row, manifest in zip(rows, manifests, strict=True)]
        tables.print_table(titles, rows)
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
        found = progress.watch(request)
    if parsed.flag("json"):
        tables.print_json(found)
    else:
        tables.print_lines([_names(found)[0]])
    return 0
