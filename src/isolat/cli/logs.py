"""``isolat logs``: what was written to standard output and standard error goes there again, byte for byte."""

from __future__ import annotations

import os

from isolat.cli import options as o
from isolat.client import logs as records
from isolat.client import times
from isolat.client.sdk import Client

_FDS = {"stdout": 1, "stderr": 2}


def logs(parsed: o.Parsed) -> int:
    lines = None
    if (text := parsed.text("tail", "all")) != "all":
        if not text.isdecimal():
            raise o.usage_error(f"--tail takes a number of lines, or all, not {text}")
        lines = int(text)
    since_ns = times.parse_since(parsed.values["since"]) if "since" in parsed.values else 0
    client = Client(parsed.values.get("root"))
    printer = Printer(parsed.flag("timestamps"))
    for record in client._logs(parsed.words[0], parsed.flag("follow"), lines, since_ns):
        printer.put(record)
    return 0


class Printer:
    """Writes records to the descriptor of their stream, with the time before each line where that is wanted."""

    def __init__(self, timestamps: bool, fds: dict[str, int] | None = None) -> None:
        self._timestamps = timestamps
        self._fds = fds or _FDS
        self._at_start = dict.fromkeys(self._fds, True)

    def put(self, record: records.LogRecord) -> None:
        data = record.data
        if self._timestamps:
            stamp = f"{times.show(record.time_ns)} ".encode()
            pieces = _lines(data)
            started = self._at_start[record.stream]
            data = b"".join(stamp + piece if started or n else piece for n, piece in enumerate(pieces))
            self._at_start[record.stream] = record.data.endswith(b"\n") if record.data else started
        view = memoryview(data)
        while view:
            view = view[os.write(self._fds[record.stream], view) :]


def _lines(data: bytes) -> list[bytes]:
    """Lines that end with a newline only: a carriage return belongs to its line."""
    pieces = [piece + b"\n" for piece in data.split(b"\n")]
    pieces[-1] = pieces[-1][:-1]
    return [piece for piece in pieces if piece]
