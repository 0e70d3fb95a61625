"""``images``, ``rmi``, ``image bootstrap``."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from isolat.cli import manage, progress, tables
from isolat.cli import options as o
from isolat.client import connect, times
from isolat.errors import NotFound

_FILTERS = ("reference", "dangling", "label")


def images(parsed: o.Parsed) -> int:
    wanted = _Wanted(parsed.words, parsed.texts("filter"))
    found = connect.ask(connect.find_root(parsed.values.get("root")), "images", {})["images"]
    found = [image for image in found if wanted.names(image)]
    if parsed.flag("json"):
        tables.print_json(found)
    elif parsed.flag("quiet"):
        tables.print_lines(name for image in found for name in wanted.names(image))
    else:
        titles = ["NAME", "DIGEST", "SIZE", "CREATED", "KIND"]
        rows = [_row(image, name, parsed.flag("no_trunc")) for image in found for name in wanted.names(image)]
        if parsed.flag("digests"):
            titles.append("MANIFEST")
            manifests = [str(image.get("manifest") or "<none>") for image in found for _ in wanted.names(image)]
            rows = [[*row, manifest] for row, manifest in zip(rows, manifests, strict=True)]
        tables.print_table(titles, rows)
    return 0


class _Wanted:
    """Which images are listed, and under which of their names; as Docker's filters, all kinds of which must match."""

    def __init__(self, words: Sequence[str], filters: Sequence[str]) -> None:
        pairs = [_filter(text) for text in filters]
        references = [*words, *(value for key, value in pairs if key == "reference")]
        self._patterns = [word.removeprefix("docker.io/").removeprefix("library/") for word in references]
        self._dangling = {value == "true" for key, value in pairs if key == "dangling"}
        self._labels = [value.partition("=") for key, value in pairs if key == "label"]

    def names(self, image: dict[str, Any]) -> list[str]:
        """Nothing for an image that is not wanted."""
        labels = dict(image.get("labels") or ())
        if self._dangling and (not image.get("names")) not in self._dangling:
            return []
        if not all(name in labels and (not equals or labels[name] == value) for name, equals, value in self._labels):
            return []
        names = _names(image)
        if not self._patterns:
            return names
        return [name for name in names if image.get("names") and any(_means(one, name) for one in self._patterns)]


def _filter(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or key not in _FILTERS or (key == "dangling" and value not in ("true", "false")):
        raise o.usage_error(f"not a filter: {text}", "reference=PATTERN, dangling=true, label=NAME[=VALUE]")
    return key, value


def _means(pattern: str, name: str) -> bool:
    """Whether it is this name, or its repository; ``*`` stands for anything but a slash."""
    repository = name.rpartition(":")[0]
    return any(_alike(pattern.split("/"), text.split("/")) for text in (name, repository))


def _alike(patterns: list[str], parts: list[str]) -> bool:
    return len(patterns) == len(parts) and all(map(fnmatch.fnmatchcase, parts, patterns))


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
    force = parsed.flag("force")

    def act(root: str, image: str) -> str:
        try:
            connect.ask(root, "rmi", {"image": image, "force": force})
        except NotFound:
            if not force:
                raise
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
