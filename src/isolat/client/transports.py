"""Images that are not in a registry, named as skopeo names them: ``oci:DIR[:TAG]``, ``dir:DIR``, and the archives.

The daemon knows archives only, through a descriptor. So a directory is read, and written, here, with the caller's
rights: it goes through a pipe as the archive that it would be (image-spec, image-layout.md; containers-transports(5)).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from isolat.client import archives
from isolat.errors import InvalidImage, UsageError

REGISTRY = "docker"
DIRECTORIES, ARCHIVES = ("oci", "dir"), ("oci-archive", "docker-archive")
OTHERS = ("containers-storage", "docker-daemon", "ostree", "sif", "tarball")
_HEX = re.compile(r"[0-9a-f]{64}")
_DIR_VERSION = "Directory Transport Version: 1.1\n"
_DOCUMENT_BYTES = 4 << 20


@dataclass(frozen=True)
class Location:
    """``transport`` is docker for registries; ``name`` chooses among the images of an archive or layout."""

    transport: str
    where: str
    name: str = ""

    @property
    def remote(self) -> bool:
        return self.transport == REGISTRY


def registry(name: str) -> Location:
    return Location(REGISTRY, name)


def parse(text: str) -> Location:
    """An image's name, or ``TRANSPORT:…``. Raises UsageError for transports that are not spoken."""
    transport, colon, rest = text.partition(":")
    if transport == REGISTRY and rest.startswith("//"):
        return registry(rest.removeprefix("//"))
    if colon and transport in OTHERS:
        raise UsageError(
            f"{transport}: is not spoken here",
            hint="`skopeo copy` makes an oci-archive: of it, for `isolat load`",
        )
    if not colon or transport not in (*DIRECTORIES, *ARCHIVES):
        return registry(text)
    if transport == "dir":
        return Location(transport, rest)
    where, _, name = rest.partition(":")
    return Location(transport, where, name)


# An image from there


@contextlib.contextmanager
def source(location: Location) -> Iterator[int]:
    """A descriptor to read an archive from. Raises UsageError."""
    if location.transport in ARCHIVES:
        with archives.source(location.where) as descriptor:
            yield descriptor
        return
    write = _write_layout if location.transport == "oci" else _write_dir
    directory = Path(location.where)
    if not directory.is_dir():
        raise UsageError(f"{location.where} is no directory")
    reading, writing = os.pipe2(os.O_CLOEXEC)
    worker = _Worker(lambda: _archive(directory, write, writing))
    try:
        yield reading
    except Exception as error:
        os.close(reading)
        raise worker.ended() or error from None  # what is wrong here is the reason for what the daemon says
    else:
        os.close(reading)
        worker.ended()


class _Worker(threading.Thread):
    """The other end of a pipe."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BrokenPipeError:
            pass  # nobody reads on
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            self._error = UsageError(f"{where}{error.strerror or error}")
        except (UsageError, InvalidImage) as error:
            self._error = error

    def ended(self) -> Exception | None:
        """Wait for its end, once our end of the pipe is closed. What went wrong."""
        self.join()
        return self._error


def _archive(directory: Path, write: Callable[[tarfile.TarFile, Path], None], descriptor: int) -> None:
    with open(descriptor, "wb", buffering=1 << 20) as out, tarfile.open(fileobj=out, mode="w|") as tar:
        write(tar, directory)


def _write_layout(tar: tarfile.TarFile, directory: Path) -> None:
    for name in ("oci-layout", "index.json"):
        _add_file(tar, name, directory / name)
    for path in sorted((directory / "blobs" / "sha256").iterdir()):
        if _HEX.fullmatch(path.name):
            _add_file(tar, f"blobs/sha256/{path.name}", path)


def _write_dir(tar: tarfile.TarFile, directory: Path) -> None:
    """As the layout that its manifest and blobs make."""
    with (directory / "manifest.json").open("rb") as stream:
        raw = stream.read(_DOCUMENT_BYTES)
    digest = hashlib.sha256(raw).hexdigest()
    described = {"mediaType": _media_type(raw), "digest": f"sha256:{digest}", "size": len(raw)}
    _add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    _add(tar, "index.json", json.dumps({"schemaVersion": 2, "manifests": [described]}).encode())
    _add(tar, f"blobs/sha256/{digest}", raw)
    for path in sorted(directory.iterdir()):
        if _HEX.fullmatch(path.name) and path.name != digest:
            _add_file(tar, f"blobs/sha256/{path.name}", path)


def _media_type(raw: bytes) -> str:
    try:
        found = json.loads(raw).get("mediaType", "")
    except (ValueError, AttributeError, RecursionError):
        raise InvalidImage("manifest.json is no manifest", stage="bad-manifest") from None
    return found if isinstance(found, str) and found else "application/vnd.oci.image.manifest.v1+json"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _add_file(tar: tarfile.TarFile, name: str, path: Path) -> None:
    """Whatever the caller may read there, links followed, as long as it is a plain file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is no plain file")
        member = tarfile.TarInfo(name)
        member.size = found.st_size
        tar.addfile(member, stream)


# An image to there


@contextlib.contextmanager
def target(location: Location) -> Iterator[int]:
    """A descriptor to write an archive of one image to. Raises UsageError."""
    if location.transport in ARCHIVES:
        with archives.target(location.where) as descriptor:
            yield descriptor
        return
    directory = Path(location.where)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} is there already, and not empty")
    directory.mkdir(exist_ok=True)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    worker = _Worker(lambda: _unpack(reading, directory, location))
    try:
        yield writing
    finally:
        os.close(writing)
        error = worker.ended()
    if error is not None:
        raise error


def _unpack(descriptor: int, directory: Path, location: Location) -> None:
    """What the daemon writes is a layout, and its names are checked all the same."""
    blobs = directory / "blobs" / "sha256" if location.transport == "oci" else directory
    blobs.mkdir(parents=True, exist_ok=True)
    index = b""
    with open(descriptor, "rb", buffering=1 << 20) as source, tarfile.open(fileobj=source, mode="r|") as tar:
        for member in tar:
            name = member.name.removeprefix("blobs/sha256/")
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None and member.name == "index.json":
                index = content.read(_DOCUMENT_BYTES)
            elif content is not None and _HEX.fullmatch(name):
                _copy(content, blobs / name)
    entry = json.loads(index)["manifests"][0]
    if location.transport == "dir":
        (blobs / str(entry["digest"]).removeprefix("sha256:")).rename(directory / "manifest.json")
        (directory / "version").write_text(_DIR_VERSION)
        return
    _write_index(directory, entry, location.name)


def _write_index(directory: Path, entry: dict[str, Any], name: str) -> None:
    entry.pop("annotations", None)
    if name:
        entry["annotations"] = {"org.opencontainers.image.ref.name": name}
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


def _copy(content: IO[bytes], path: Path) -> None:
    with path.open("xb") as out:
        while chunk := content.read(1 << 20):
            out.write(chunk)
