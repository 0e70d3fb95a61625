"""What an image is, as data, and how the names of images are read.

Names are Docker's: without a tag it is ``latest``. A digest is 64 hexadecimal digits, and any beginning of it of at
least 6 names it too, as long as it is alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from isolat.errors import StoreError, UsageError

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
VERSION = 1

_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{6,64})")


@dataclass(frozen=True)
class ImageConfig:
    """The defaults that an image brings. ``binds``: (directory of this machine, where it appears), read-only."""

    kind: str  # debian, host, tree
    env: tuple[tuple[str, str], ...] = (("PATH", DEFAULT_PATH),)
    command: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    architecture: str = ""
    binds: tuple[tuple[str, str], ...] = ()
    source: str = ""  # what it was made from, for people

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Image:
    """One image of a store: what it is called, and the defaults that it brings."""

    digest: str
    config: ImageConfig
    size_bytes: int
    created_ns: int
    names: tuple[str, ...] = field(default=())

    @property
    def kind(self) -> str:
        return self.config.kind

    @property
    def env(self) -> tuple[tuple[str, str], ...]:
        return self.config.env

    @property
    def command(self) -> tuple[str, ...]:
        return self.config.command

    @property
    def working_dir(self) -> str:
        return self.config.working_dir

    @property
    def user(self) -> str:
        return self.config.user

    @property
    def binds(self) -> tuple[tuple[str, str], ...]:
        return self.config.binds

    def to_json(self) -> dict[str, Any]:
        """What the daemon's interface tells of it (docs/api.md); ``name`` is the first of its names, or empty."""
        return {
            "name": self.names[0] if self.names else "",
            "names": list(self.names),
            "digest": self.digest,
            "size_bytes": self.size_bytes,
            "created_ns": self.created_ns,
            **self.config.to_json(),
        }

    def description(self) -> dict[str, Any]:
        """What is kept beside the EROFS file. Names are kept apart: they move."""
        return {
            "version": VERSION,
            "digest": self.digest,
            "size_bytes": self.size_bytes,
            "created_ns": self.created_ns,
            "config": self.config.to_json(),
        }


def image_from_json(text: str, names: tuple[str, ...] = ()) -> Image:
    """The image that ``description`` wrote. Raises StoreError for anything else."""
    try:
        data = json.loads(text)
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}")
        values = {name: _frozen(value) for name, value in data["config"].items()}
        return Image(
            digest=str(data["digest"]),
            config=ImageConfig(**values),
            size_bytes=int(data["size_bytes"]),
            created_ns=int(data["created_ns"]),
            names=names,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"an image's description is damaged: {error}", hint="remove the image and make it anew"
        ) from error


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def parse_name(text: str) -> str:
    """The full form ``name:tag``. Raises UsageError for what can't be a name."""
    name, colon, tag = text.rpartition(":")
    if not colon or "/" in tag:
        name, tag = text, "latest"
    if not _NAME.fullmatch(name) or not _TAG.fullmatch(tag):
        raise UsageError(
            f"{text!r} can't be the name of an image",
            hint="a name is made of lower case letters, digits and . _ - /, with an optional :tag",
        )
    return f"{name}:{tag}"


def digest_prefix(text: str) -> str:
    """The hexadecimal digits when ``text`` may name a digest, else nothing."""
    match = _DIGEST.fullmatch(text)
    return match.group(1) if match else ""
