"""Sources of volumes: directories and files are opened with the caller's own rights before the daemon hears of them.

The daemon mounts what the descriptor is, so it can neither be talked into a path that the caller may not reach nor
be shown another one after the check. A source without a slash is a named volume, which the daemon has.
"""

from __future__ import annotations

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from isolat.errors import UsageError


def _error(message: str, hint: str = "") -> UsageError:
    from isolat.errors import UsageError

    return UsageError(message, hint=hint)


def parse(text: str) -> tuple[str, str, bool]:
    """``SOURCE:TARGET[:ro|:rw]`` to source, target and whether it is read-only."""
    source, _, rest = text.partition(":")
    target, colon, mode = rest.partition(":")
    if not source or not target:
        raise _error(f"not a volume: {text}", "SOURCE:TARGET or SOURCE:TARGET:ro")
    if colon and mode not in {"ro", "rw"}:
        raise _error(f"not a mode of a volume: {mode}, in {text}", "ro or rw")
    return source, target, mode == "ro"


def open_source(source: str, target: str, read_only: bool) -> tuple[dict[str, Any], int]:
    """The volume as the spec has it, with the source's real path, and a descriptor of the source.

    -1 for a named volume.
    """
    if "/" not in source and source not in {".", ".."}:
        return _volume("volume", source, target, read_only), -1
    try:
        fd = posix.open(source, posix.O_PATH | posix.O_CLOEXEC)
        real = posix.readlink(f"/proc/self/fd/{fd}")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise _error(f"the source of a volume cannot be opened: {source}: {why}") from error
    return _volume("bind", real, target, read_only), fd


def _volume(kind: str, source: str, target: str, read_only: bool) -> dict[str, Any]:
    volume: dict[str, Any] = {"type": kind, "source": source, "target": target}
    if read_only:
        volume["read_only"] = True
    return volume
