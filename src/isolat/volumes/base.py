"""What a volume was when it was copied in: with it, what a machine has changed is known from what it found."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass

from isolat.volumes.archive import DIRECTORY, Entry

LEFT_OUT = b"?"  # the kind of what could not be copied in: never touched


@dataclass(frozen=True, slots=True)
class Known:
    kind: bytes
    size: int = 0
    mtime_ns: int = 0
    mode: int = 0
    target: bytes = b""


def known(entry: Entry) -> Known:
    """Directories change with what is in them, so their times and sizes say nothing."""
    if entry.kind == DIRECTORY:
        return Known(entry.kind, mode=entry.mode)
    return Known(entry.kind, entry.size, entry.mtime_ns, entry.mode, entry.target)


Sources = dict[str, tuple[int, int]]  # a volume's name to its source's device and inode


def write(fd: int, sources: Sources, rows: Iterable[tuple[bytes, Known]]) -> None:
    with os.fdopen(os.dup(fd), "w", encoding="utf-8") as file:
        json.dump(sources, file)
        file.write("\n")
        for path, one in rows:
            target = os.fsdecode(one.target)
            json.dump([os.fsdecode(path), one.kind.decode(), one.size, one.mtime_ns, one.mode, target], file)
            file.write("\n")


def read(fd: int) -> tuple[Sources, dict[bytes, Known]]:
    found: dict[bytes, Known] = {}
    with os.fdopen(os.dup(fd), encoding="utf-8") as file:
        file.seek(0)
        sources = {name: (device, inode) for name, (device, inode) in json.loads(file.readline()).items()}
        for line in file:
            path, kind, size, mtime_ns, mode, target = json.loads(line)
            found[os.fsencode(path)] = Known(kind.encode(), size, mtime_ns, mode, os.fsencode(target))
    return sources, found
