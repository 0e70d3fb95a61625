"""An error as a user sees it: what failed, what more is known, what to do. Never a traceback, not even for a defect."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback

from isolat.errors import EXIT_OURS, IsolatError, SpecError

# keys of the spec → options of ``run``, so that an error names what was typed
_OPTIONS = {
    "image": "IMAGE", "command": "COMMAND", "runtime": "--layer", "container_name": "--name", "environment": "--env",
    "working_dir": "--workdir", "user": "--user", "hostname": "--hostname", "mem_limit": "--memory",
    "memswap_limit": "--memory-swap", "cpus": "--cpus", "cpu_shares": "--cpu-shares", "pids_limit": "--pids-limit",
    "storage_opt": "--disk", "volumes": "--volume", "tmpfs": "--tmpfs", "network_mode": "--network",
    "labels": "--label", "x-timeout": "--timeout", "stop_grace_period": "--stop-timeout", "logging": "--log-driver",
    "x-oci-runtime": "--oci-runtime",
    "x-accel": "--accel",
    "x-kernel": "--kernel",
    "x-in": "--in",
}  # fmt: skip


def tell(error: Exception, verb: str = "") -> int:
    """Write the error to standard error and return the exit code it means."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if isinstance(error, IsolatError):
        lines, code = render(error, verb), error.exit_code
    elif isinstance(error, OSError):
        lines, code = [f"isolat: {_os_error(error)}"], EXIT_OURS
    else:
        lines, code = _defect(error), EXIT_OURS
    with contextlib.suppress(OSError):
        sys.stderr.write("".join(f"{_printable(line)}\n" for line in lines))
        sys.stderr.flush()
    return code


def render(error: IsolatError, verb: str = "") -> list[str]:
    """The lines of an error: the message, its details, the hint."""
    stage = f" (while: {error.stage})" if error.stage and error.stage not in error.message else ""
    lines = [f"isolat: {error.message}{stage}"]
    details = error.details
    if isinstance(error, SpecError) and verb == "run":
        details = tuple(_with_option(line) for line in details)
    lines += [f"  {line}" for detail in details for line in detail.splitlines()]
    if error.hint:
        lines.append(f"  hint: {error.hint}")
    return lines


def _with_option(line: str) -> str:
    path, colon, reason = line.partition(": ")
    key = path.removeprefix(".").partition(".")[0].partition("[")[0]
    option = _OPTIONS.get(key)
    return f"{option}{colon}{reason}" if option and path.startswith(".") else line


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _defect(error: Exception) -> list[str]:
    """A defect of ours: the traceback goes into a file for a report, the user gets one line and its name."""
    lines = [f"isolat: a defect of Isolat: {type(error).__name__}: {error}"]
    with contextlib.suppress(OSError):
        fd, path = tempfile.mkstemp(prefix="isolat-defect-", suffix=".txt")
        with os.fdopen(fd, "w", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
        lines.append(f"  hint: please report it with {path}")
    return lines


def _printable(line: str) -> str:
    """Without control characters, which could do things to a terminal, and without what cannot be encoded."""
    text = "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line)
    encoding = sys.stderr.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding, "replace")
