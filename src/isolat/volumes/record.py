"""The description of a named volume: one small file each, which is there before its data and after it.

Written beside and renamed, and on the disk before anything else happens: a volume is kept for longer than the daemon,
and than this boot of the host.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path

from isolat.errors import StoreError, UsageError

VERSION = 1
SUFFIX = ".json"
NAME = re.compile("[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")  # Docker's pattern
DEFAULT_BYTES = 10 << 30
MIN_BYTES = 16 << 20


class State(StrEnum):
    NEW = "new"  # nothing of anybody is in it yet: it may be made again
    READY = "ready"
    GONE = "gone"  # nobody has it any more: what is left of it goes


@dataclass(frozen=True)
class Volume:
    name: str
    size_bytes: int  # what may be in it
    created_ns: int
    labels: tuple[tuple[str, str], ...] = ()
    state: State = State.NEW


def check_name(name: str) -> None:
    """Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r:.140} is no name for a volume",
            hint="letters and digits, then also _ . and -; at most 128 of them",
        )


def file_of(directory: Path, name: str) -> Path:
    return directory / f"{name}{SUFFIX}"


def read(directory: Path, name: str) -> Volume | None:
    """None where there is none. Raises StoreError where it can't be read."""
    path = file_of(directory, name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ValueError(f"it is of version {data['version']!r}, not {VERSION}")
        values = {field.name: data[field.name] for field in fields(Volume)}
        values["labels"] = tuple((str(key), str(value)) for key, value in values["labels"])
        values["state"] = State(values["state"])
        if values["name"] != name or not isinstance(values["size_bytes"], int):
            raise ValueError("it says what can't be")
        return Volume(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the description of the volume {name} can't be read: {path}: {error}",
            hint=f"mend it, or remove the volume with all that is in it: isolat volume rm {name}",
        ) from error


def write(directory: Path, volume: Volume) -> None:
    path = file_of(directory, volume.name)
    beside = path.with_name(f".{path.name}.new")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        json.dump({"version": VERSION, **asdict(volume)}, file)
        file.flush()
        os.fsync(fd)
    beside.replace(path)
    _sync(directory)


def forget(directory: Path, name: str) -> None:
    file_of(directory, name).unlink(missing_ok=True)


def names(directory: Path) -> list[str]:
    """Of all that have a description, readable or not."""
    try:
        found = [entry.name.removesuffix(SUFFIX) for entry in os.scandir(directory) if entry.name.endswith(SUFFIX)]
    except FileNotFoundError:
        return []
    return sorted(name for name in found if NAME.fullmatch(name))


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
