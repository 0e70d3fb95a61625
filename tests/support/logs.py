"""The keeper's log files, read as docs/protocol.md describes them."""

from __future__ import annotations

from pathlib import Path

HEADER_BYTES = 16


def read_log(directory: Path, stream: int) -> bytes:
    """Everything of one stream that the log still has, oldest first."""
    found = bytearray()
    for path in sorted(directory.iterdir(), key=lambda path: -int(path.name)):
        data, at = path.read_bytes(), 0
        while at + HEADER_BYTES <= len(data):
            length = int.from_bytes(data[at + 8 : at + 12], "little")
            if data[at + 12] == stream:
                found += data[at + HEADER_BYTES : at + HEADER_BYTES + length]
            at += HEADER_BYTES + length
    return bytes(found)
