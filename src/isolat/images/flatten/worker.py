"""What runs confined: ``inflate`` opens the layers' compression, ``merge`` reads the archives and writes the EROFS.

Each is told everything as one JSON object in its arguments, by descriptor numbers; imports, locks itself
(linux/lockdown.py), works, and tells how it went as lines of JSON on its descriptor ``tell``: ``{"done": bytes}`` on
the way, at most ten times a second; at the end ``{"result": …}`` or ``{"error": …}``. It never leaves a traceback.
"""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import time

from isolat.images.flatten import inflate
from isolat.images.flatten.bad import Bad, escaped
from isolat.images.flatten.blocks import Blocks
from isolat.images.flatten.layout import Layout
from isolat.images.flatten.merge import Merger
from isolat.images.flatten.source import Source
from isolat.images.flatten.tar import Bounds
from isolat.linux import lockdown
from isolat.wire import fastjson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TELL_S = 0.1
_FILE_SIZE_TELLS_TOO_LARGE = 1 << 20  # what the limit on the file's size leaves beyond our own


class _Teller:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._done = 0
        self._next = 0.0

    def tell(self, **values: object) -> None:
        os.write(self._descriptor, fastjson.dumps(values).encode() + b"\n")

    def progress(self, more: int) -> None:
        self._done += more
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _TELL_S
            self.tell(done=self._done)


def main() -> None:
    job = fastjson.loads(sys.argv[2])
    teller = _Teller(int(job["tell"]))
    try:
        {"inflate": _inflate, "merge": _merge}[job["role"]](job, teller)
    except Bad as bad:
        teller.tell(error=bad.stage, what=bad.what, entry=escaped(bad.entry), layer=job.get("layer", -1))
    except MemoryError:
        gc.collect()
        teller.tell(error="too-large", what="the layers need more memory than is allowed", entry="", layer=-1)
    except BrokenPipeError:
        teller.tell(error="unread", what="nobody reads on", entry="", layer=-1)
    except Exception as error:
        teller.tell(error="internal", what=f"{type(error).__name__}: {error}", entry="", layer=job.get("layer", -1))
    os._exit(0)


def _lock(job: dict[str, Any], file_bytes: int) -> None:
    gc.disable()  # a million nodes without a cycle that matters: looking for one takes longer than all the rest
    try:
        lockdown.lock(int(job["parent"]), memory_bytes=int(job["memory"]), file_bytes=file_bytes, cpu_s=int(job["cpu"]))
    except OSError as error:
        raise Bad("not-confined", f"the process that reads the layers could not be confined: {error}") from error


def _inflate(job: dict[str, Any], teller: _Teller) -> None:
    blobs = []
    for index, layer in enumerate(job["layers"]):
        job["layer"] = index
        blobs.append(inflate.Blob(int(layer["blob"]), str(layer["digest"]), teller.progress))
    openers = inflate.Openers({blob.kind for blob in blobs})
    _lock(job, 0)
    allowed = int(job["total"])
    for index, blob in enumerate(blobs):
        job["layer"] = index
        allowed -= inflate.hand_on(blob, openers, int(job["pipe"]), allowed)
    teller.tell(result={})


class _Layer:
    """One layer out of the pipe, its sum taken on the way."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._sum = hashlib.sha256()

    def more(self) -> memoryview:
        head = self._read(inflate.LENGTH.size)
        (size,) = inflate.LENGTH.unpack(head)
        if size > inflate.STRETCH:
            raise Bad("truncated", "the layer did not come through whole")
        stretch = self._read(size)
        self._sum.update(stretch)
        return stretch

    def _read(self, size: int) -> memoryview:
        content = os.read(self._pipe, size) if size else b""
        if len(content) == size:
            return memoryview(content)
        parts = [content]
        while content and (size := size - len(content)):
            content = os.read(self._pipe, size)
            parts.append(content)
        if size:
            raise Bad("truncated", "the layer did not come through whole")
        return memoryview(b"".join(parts))

    @property
    def diff_id(self) -> str:
        return f"sha256:{self._sum.hexdigest()}"


def _merge(job: dict[str, Any], teller: _Teller) -> None:
    most = int(job["total"])
    _lock(job, most + _FILE_SIZE_TELLS_TOO_LARGE)
    blocks = Blocks(int(job["out"]), most, str(job["excess"]))
    merger = Merger(blocks, Bounds(int(job["entries"]), int(job["file"]), int(job["xattr"])))
    diff_ids = []
    for index, expected in enumerate(job["diff_ids"]):
        job["layer"] = index
        layer = _Layer(int(job["pipe"]))
        merger.layer(Source(layer.more))
        if expected and expected != layer.diff_id:
            raise Bad("digest-mismatch", f"the uncompressed layer has the digest {layer.diff_id}")
        diff_ids.append(layer.diff_id)
    job["layer"] = -1
    merger.finish()
    layout = Layout(merger.tree, blocks)
    size = layout.write()
    teller.tell(
        result={
            "size": size, "entries": layout.inodes, "diff_ids": diff_ids, "content": layout.content_bytes,
        }
    )  # fmt: skip
