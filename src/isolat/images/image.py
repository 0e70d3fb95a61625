"""What an image is, as data, and how the names of images are read.

Its digest is that of its OCI configuration, as Docker's image ids are: 64 hexadecimal digits, and any beginning of it
of at least 6 names it too, as long as it is alone. Names are in ``reference``.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from isolat.errors import StoreError

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
VERSION = 2
_READ_VERSIONS = (1, VERSION)

_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{6,64})")


@dataclass(frozen=True)
class ImageConfig:
    """The defaults that an image brings. ``binds``: (directory of this machine, where it appears), read-only."""

    kind: str  # debian, host, tree, oci
    env: tuple[tuple[str, str], ...] = (("PATH", DEFAULT_PATH),)
    command: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    architecture: str = ""
    binds: tuple[tuple[str, str], ...] = ()
    source: str = ""  # what it was made from, for people
    entrypoint: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    stop_signal: str = ""
    variant: str = ""

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
    manifest: str = ""  # the digest of its OCI manifest; empty for what was made from a tree and never sent
    repo_digests: tuple[str, ...] = ()  # NAME@sha256:…, where it was seen

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
    def entrypoint(self) -> tuple[str, ...]:
        return self.config.entrypoint

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
            "manifest": self.manifest,
            "repo_digests": list(self.repo_digests),
            **self.config.to_json(),
        }

    def description(self) -> dict[str, Any]:
        """What is kept beside the EROFS file. Names are kept apart: they move."""
        return {
            "version": VERSION,
            "digest": self.digest,
            "size_bytes": self.size_bytes,
            "created_ns": self.created_ns,
            "manifest": self.manifest,
            "repo_digests": list(self.repo_digests),
            "config": self.config.to_json(),
        }


def image_from_json(text: str, names: tuple[str, ...] = ()) -> Image:
    """The image that ``description`` wrote. Raises StoreError for anything else."""
    try:
        data = json.loads(text)
        if data["version"] not in _READ_VERSIONS:
            raise ValueError(f"version {data['version']}")
        values = {name: _frozen(value) for name, value in data["config"].items()}
        return Image(
            digest=str(data["digest"]),
            config=ImageConfig(**values),
            size_bytes=int(data["size_bytes"]),
            created_ns=int(data["created_ns"]),
            names=names,
            manifest=str(data.get("manifest", "")),
            repo_digests=tuple(str(one) for one in data.get("repo_digests", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"an image's description is damaged: {error}", hint="remove the image and make it anew"
        ) from error


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def digest_prefix(text: str) -> str:
    """The hexadecimal digits when ``text`` may name a digest, else nothing."""
    match = _DIGEST.fullmatch(text)
    return match.group(1) if match else ""
