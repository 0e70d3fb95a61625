"""An archive of a root file system as the one layer of a new image.

It is compressed anew, whatever compressed it, so that the same archive is the same image, and its layer one that every
registry takes. Without a time in it, too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, BinaryIO

from isolat.errors import InvalidImage, StoreError
from isolat.images import authoring, changes
from isolat.images.flatten.flattening import Limits
from isolat.images.image import Image, ImageConfig
from isolat.images.oci import Platform, own_platform
from isolat.images.opening import More, never, opened
from isolat.images.progress import Progress, no_progress

if TYPE_CHECKING:
    from isolat.images.store import ImageStore

_WHAT = "the archive"
_TELL_BYTES = 8 << 20
_MARK = bytes(512)  # the end of an archive, of which there should be two


def import_archive(
    store: ImageStore,
    descriptor: int,
    names: Collection[str] = (),
    *,
    change: Sequence[str] = (),
    message: str = "",
    platform: Platform | None = None,
    gone: Callable[[], bool] = never,
    progress: Progress = no_progress,
    limits: Limits | None = None,
) -> Image:
    """``descriptor``: a tar archive, plain or compressed with gzip, zstd, bzip2 or xz; a file or a pipe.

    Raises UsageError for a change that is none, before anything is read; InvalidImage as ``flatten`` does; StoreError.
    """
    changes.apply({}, change)
    most = (limits or Limits()).total_bytes
    wanted = platform or own_platform()
    config = ImageConfig("oci", architecture=wanted.architecture, variant=wanted.variant)
    with store.build() as build:
        with opened(descriptor, _WHAT, gone) as more:
            layer = authoring.make_layer(build, lambda out: _pour(more, out, most, progress))
        step = authoring.Step("isolat import", comment=message)
        return authoring.derive(store, build, None, layer, step, names, change=change, config=config, progress=progress)


def _pour(more: More, out: BinaryIO, most: int, progress: Progress) -> None:
    came, tail = 0, b""
    try:
        while found := more():
            if (came + len(found)) // _TELL_BYTES > came // _TELL_BYTES:
                progress("reading the archive, bytes", came, 0)
            came += len(found)
            if came > most:
                raise InvalidImage(f"{_WHAT} has more than {most} bytes", stage="too-large")
            out.write(found)
            tail = found[-len(_MARK) :] if len(found) >= len(_MARK) else (tail + found)[-len(_MARK) :]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            "there is no room for the archive", stage="no-space", errno=error.errno or 0,
            hint="free some space on the disk of the state root",
        ) from error  # fmt: skip
    if not came:
        raise InvalidImage(f"{_WHAT} is empty", stage="bad-archive")
    if tail != _MARK:
        # Between two files nothing else tells that the rest is missing
        raise InvalidImage(
            f"{_WHAT} ends without the mark that ends one: it is no tar archive, or its end is missing",
            stage="truncated",
            hint="make or fetch it again",
        )
