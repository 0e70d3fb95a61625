"""The daemon's verbs on images and archives of them, and on what is known of an image (docs/api.md).

Archives are written into, and read from, a descriptor of the caller's: no path of a request is ever opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isolat.daemon.arguments import Arguments
from isolat.daemon.call import Answer, Call
from isolat.errors import UsageError
from isolat.images import describe
from isolat.images.image import Image
from isolat.images.oci import Platform, parse_platform
from isolat.images.reference import parse_name


def save(call: Call) -> Answer:
    from isolat.images import saving  # most daemons save nothing

    images = _images(call)
    written = saving.save(
        call.engine.images,
        images,
        _descriptor(call),
        format=call.args.text("format", saving.DOCKER),
        gone=call.gone,
        progress=_progress(call),
    )
    return {"bytes": written}


def load(call: Call) -> Answer:
    """A row for each image as it is there, with the names that it has taken from others; then all of them."""
    from isolat.images import archives

    taken: dict[str, str] = {}

    def moved(name: str, digest: str) -> None:
        taken[name] = f"sha256:{digest}"

    def told(image: Image, names: Sequence[str]) -> None:
        call.send({"row": {"id": f"sha256:{image.digest}", "names": list(names), "moved": dict(taken)}}, [])
        taken.clear()

    loaded = archives.load(
        call.engine.images,
        _descriptor(call),
        told,
        platform=platform(call.args),
        only=call.args.text("only", None),
        gone=call.gone,
        progress=_progress(call),
        moved=moved,
    )
    return {"images": [image.to_json() for image in loaded]}


def import_(call: Call) -> Answer:
    from isolat.images.importing import import_archive

    args = call.args
    name = args.text("name", "")
    image = import_archive(
        call.engine.images,
        _descriptor(call),
        [parse_name(name)] if name else [],
        change=args.texts("changes"),
        message=args.text("message", ""),
        platform=platform(args),
        gone=call.gone,
        progress=_progress(call),
    )
    return image.to_json()


def tag(call: Call) -> Answer:
    names = call.args.texts("names")
    if not names:
        raise UsageError("tag: names is missing")
    store = call.engine.images
    image = store.resolve(call.args.text("image"))
    store.tag(image.digest, names)
    return store.resolve(image.digest).to_json()


def inspect(call: Call) -> Answer:
    store = call.engine.images
    return {"images": [describe.inspect(store, store.resolve(name)) for name in _images(call)]}


def history(call: Call) -> Answer:
    store = call.engine.images
    return {"history": describe.history(store, store.resolve(call.args.text("image")))}


def tree(call: Call) -> Answer:
    return {"tree": describe.tree(call.engine.images, call.engine.images.list())}


def _images(call: Call) -> list[str]:
    found = call.args.texts("images")
    if not found:
        raise UsageError("images is missing")
    return found


def _descriptor(call: Call) -> int:
    if len(call.descriptors) != 1:
        raise UsageError(f"an archive is one descriptor, and {len(call.descriptors)} came")
    return call.descriptors[0]


def platform(args: Arguments) -> Platform | None:
    """``platform``, where it is given. Raises UsageError."""
    text = args.text("platform", "")
    found = parse_platform(text) if text else None
    if text and found is None:
        raise UsageError(f"{text!r} is no platform", hint="OS/ARCHITECTURE, as linux/arm64")
    return found


def _progress(call: Call) -> Callable[[str, int, int], None]:
    def progress(text: str, done: int, total: int) -> None:
        call.send({"progress": {"text": text, "done": done, "total": total}}, [])

    return progress
