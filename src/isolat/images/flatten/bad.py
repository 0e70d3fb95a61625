"""The one exception of everything that reads layers: what is wrong, as a stable word and a sentence.

It knows nothing of Isolat's error tree, which is not imported in the confined processes; flattening.py turns it into an
InvalidImage, names the layer and says what can be done.
"""

from __future__ import annotations

ESCAPED_MAX = 200


class Bad(Exception):
    """``stage`` is the word, ``entry`` the name in the archive as it came."""

    def __init__(self, stage: str, what: str, entry: bytes = b"") -> None:
        super().__init__(what)
        self.stage = stage
        self.what = what
        self.entry = entry


def escaped(name: bytes) -> str:
    """A stranger's name for a terminal or a log: printable ASCII stays, all else as \\xNN; long ones are cut."""
    text = "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}" for byte in name[:ESCAPED_MAX]
    )
    return text + ("…" if len(name) > ESCAPED_MAX else "")
