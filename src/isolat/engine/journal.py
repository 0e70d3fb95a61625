"""The daemon's own log: one line an occurrence, on its standard error (ROOT/daemon.log)."""

from __future__ import annotations

import sys
import time
import traceback


def log(message: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    print(f"{stamp} {message}", file=sys.stderr, flush=True)


def log_defect(where: str, error: BaseException) -> None:
    """A defect of our own: with its traceback, which only this log ever sees."""
    trace = "".join(traceback.format_exception(error)).rstrip()
    log(f"defect in {where}: {trace}")
