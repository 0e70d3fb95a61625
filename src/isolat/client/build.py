"""What a build needs of its caller, opened and read with the caller's rights before the daemon hears of it.

The context is a directory, which is passed as a descriptor and never copied, or an archive, which flows through a pipe.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypedDict

from isolat.errors import UsageError

NAMES = ("Containerfile", "Dockerfile")
CONTAINERFILE_BYTES_MAX = 1 << 20
STANDARD_INPUT = "-"
_PEEK_BYTES = 512
_CHUNK_BYTES = 1 << 20
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))


class BuildOptions(TypedDict, total=False):
    """What ``isolat build`` has options for. ``names``: of the image; ``arguments``: values for ARGs."""

    names: Sequence[str]
    arguments: Mapping[str, str]
    labels: Mapping[str, str]
    target: str
    platform: str
    network: str
    pull: str
    memory: str
    disk: str
    no_cache: bool
    timestamp: int


@dataclass
class Source:
    """What is sent: ``args`` of the request, and ``descriptors``, which ``close`` closes."""

    args: dict[str, Any]
    descriptors: list[int] = field(default_factory=list)

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


def source(context: str, file: str, stdin: BinaryIO) -> Source:
    """``context``: a directory, or ``-``: ``stdin`` is a Containerfile, or an archive with everything in it.

    ``file``: the Containerfile; of an archive, its path inside; ``-``: ``stdin`` is it. Raises UsageError.
    """
    if context == STANDARD_INPUT and file == STANDARD_INPUT:
        raise UsageError("build: standard input can't be both the context and the Containerfile")
    if context == STANDARD_INPUT:
        return _from_stream(file, stdin)
    text = _read(stdin, "standard input") if file == STANDARD_INPUT else _containerfile(context, file)
    try:
        directory = os.open(context, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"the context {context} can't be opened: {error.strerror}",
            hint="it is a directory, or - for standard input",
        ) from error
    return Source({"context": "directory", "containerfile": text}, [directory])


def request(options: BuildOptions) -> dict[str, Any]:
    """The options as the daemon takes them. Raises UsageError for one that there is not."""
    unknown = sorted(set(options) - set(BuildOptions.__annotations__))
    if unknown:
        raise UsageError(f"build: there is no option {unknown[0]}")
    found: dict[str, Any] = dict(options)
    for name in ("arguments", "labels"):
        if name in found:
            found[name] = [f"{key}={value}" for key, value in found[name].items()]
    if "names" in found:
        found["names"] = list(found["names"])
    return found


def arguments(given: list[str]) -> list[str]:
    """NAME=VALUE; of NAME alone the caller's own value, and nothing where there is none."""
    found = []
    for text in given:
        if "=" in text:
            found.append(text)
        elif text in os.environ:
            found.append(f"{text}={os.environ[text]}")
    return found


def timestamp() -> int:
    """SOURCE_DATE_EPOCH (reproducible-builds.org), or -1."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(text) if text.isdecimal() else -1


def _containerfile(context: str, file: str) -> str:
    """The one that is named, from here or else from the context; or the context's own."""
    paths = [file, os.path.join(context, file)] if file else [os.path.join(context, name) for name in NAMES]  # noqa: PTH118
    for path in paths:
        try:
            with open(path, "rb") as stream:
                if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    raise UsageError(f"the Containerfile {path} is no file")
                return _read(stream, path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError(f"the Containerfile {path} can't be read: {error.strerror}") from error
    if file:
        raise UsageError(f"there is no Containerfile {file}")
    raise UsageError(f"there is no {' or '.join(NAMES)} in {context}", hint="name it with --file")


def _read(stream: BinaryIO, what: str) -> str:
    data = stream.read(CONTAINERFILE_BYTES_MAX + 1)
    if len(data) > CONTAINERFILE_BYTES_MAX:
        raise UsageError(f"{what} has more than the {CONTAINERFILE_BYTES_MAX >> 20} MiB that a Containerfile may have")
    return _text(data, what)


def _text(data: bytes, what: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} is no Containerfile: it is not UTF-8") from error
    if "\0" in text:
        raise UsageError(f"{what} is no Containerfile: it has NUL characters")
    if not text.strip():
        raise UsageError(f"{what} is empty")
    return text


def _from_stream(file: str, stdin: BinaryIO) -> Source:
    head = _peek(stdin)
    compression = _compression(head)
    if compression is None:
        rest = stdin.read(CONTAINERFILE_BYTES_MAX + 1 - len(head))
        if len(head) + len(rest) > CONTAINERFILE_BYTES_MAX:
            raise UsageError("standard input is neither a Containerfile nor an archive that is known")
        return Source({"context": "none", "containerfile": _text(head + rest, "standard input")})
    reading, writing = os.pipe2(os.O_CLOEXEC)
    threading.Thread(target=_pour, args=(head, stdin, writing), daemon=True).start()
    return Source({"context": "archive", "compression": compression, "file": file}, [reading])


def _peek(stdin: BinaryIO) -> bytes:
    head = b""
    while len(head) < _PEEK_BYTES and (chunk := stdin.read(_PEEK_BYTES - len(head))):
        head += chunk
    return head


def _compression(head: bytes) -> str | None:
    """How an archive that begins so is compressed; None when it is none."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    return "" if head[257:262] == b"ustar" else None


def _pour(head: bytes, stdin: BinaryIO, writing: int) -> None:
    """All of standard input into the pipe; whoever reads it may have had enough of it."""
    with contextlib.suppress(OSError), open(writing, "wb") as stream:
        stream.write(head)
        while chunk := stdin.read(_CHUNK_BYTES):
            stream.write(chunk)
