"""From the layers of an OCI image straight to one EROFS file, without ever unpacking them; and back, into a layer.

::

    flattening.py    flatten(): the two confined processes, their limits, their errors       (in the caller's process)
    worker.py        what they run
    inflate.py       the first one: decompression, digests of blobs                          (confined)
    source.py tar.py pax.py numbers.py   the second one: reading archives                    (confined, pure data)
    tree.py merge.py                     what the layers add up to                           (confined, pure data)
    blocks.py layout.py ondisk.py        the file that is made                               (confined)
    pack.py          pack(): from a directory tree to a layer                                (in the caller's process)

Why: no unpacker that resolves a stranger's paths on the host as root, where this field's holes are; and one pass over
the data instead of three. docs/adr/0012-layers-straight-to-erofs.md has the figures.

Names are loaded when they are first used: the confined processes import from here, too, and need none of them.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isolat.images.flatten.flattening import Flattened, LayerBlob, Limits, flatten

__all__ = ["Flattened", "LayerBlob", "Limits", "flatten"]

_WHERE = dict.fromkeys(__all__, "isolat.images.flatten.flattening")


if not TYPE_CHECKING:  # to a type checker only the names above exist

    def __getattr__(name: str) -> object:
        where = _WHERE.get(name)
        if where is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(__import__(where, fromlist=[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
