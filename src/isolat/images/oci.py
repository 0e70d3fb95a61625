"""What comes from registries, read strictly: manifests, indexes and configurations, and how ours are written.

Everything here is data from elsewhere until it has been read by these functions: bounded, every field checked for its
type, no digest of an algorithm that is not verified. Docker's media types (schema 2) are the same documents under
other names. Sources: image-spec ``manifest.md``, ``image-index.md``, ``config.md``, ``descriptor.md``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isolat.errors import InvalidImage, NotFound

DOCUMENT_BYTES_MAX = 4 << 20  # distribution-spec: a registry must take manifests of 4 MiB
LAYERS_MAX = 500
BLOB_BYTES_MAX = 1 << 44
_PLATFORMS_TOLD, _PLATFORM_CHARACTERS = 20, 50  # in an error: whoever made the index chose the words

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = f"{LAYER}+gzip"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
_DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
_MANIFESTS, _INDEXES = (MANIFEST, DOCKER_MANIFEST), (INDEX, DOCKER_LIST)
_CONFIGS = (CONFIG, _DOCKER_CONFIG)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm"}  # uname(2) to Go


@dataclass(frozen=True)
class Platform:
    """``os/architecture[/variant]``, in Go's words: linux, amd64, arm64, v8."""

    os: str = "linux"
    architecture: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def serves(self, wanted: Platform) -> bool:
        """Whether what is for this platform is what is wanted; a variant counts only where both name one."""
        same = (self.os, self.architecture) == (wanted.os, wanted.architecture)
        return same and (not self.variant or not wanted.variant or self.variant == wanted.variant)


@dataclass(frozen=True)
class Descriptor:
    media_type: str
    digest: str
    size_bytes: int
    platform: Platform | None = None
    annotations: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes}
        return found | ({"annotations": dict(self.annotations)} if self.annotations else {})


@dataclass(frozen=True)
class Manifest:
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    raw: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        return digest_of(self.raw)

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """The configuration and every layer, each blob once."""
        return tuple({one.digest: one for one in (self.config, *self.layers)}.values())


@dataclass(frozen=True)
class Index:
    manifests: tuple[Descriptor, ...]
    raw: bytes = field(repr=False)


@dataclass(frozen=True)
class History:
    created: str = ""
    created_by: str = ""
    comment: str = ""
    empty_layer: bool = False


@dataclass(frozen=True)
class Config:
    """An image's configuration. ``raw``: as it came, which is what its digest is of."""

    platform: Platform
    diff_ids: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = ""
    created: str = ""
    author: str = ""
    history: tuple[History, ...] = ()
    raw: bytes = field(default=b"", repr=False)


def digest_of(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def hexadecimal(digest: str) -> str:
    """The digits of a digest. Raises InvalidImage for anything but sha256, which is all that is verified."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidImage(f"{digest[:100]!r} is no digest that can be verified (sha256:…)", stage="bad-digest")
    return digest.removeprefix("sha256:")


def own_platform() -> Platform:
    machine = os.uname().machine
    return Platform("linux", _ARCHITECTURES.get(machine, machine))


def parse_platform(text: str) -> Platform | None:
    """``linux/arm64/v8`` or ``arm64``; None for what is neither."""
    parts = text.split("/")
    if not all(re.fullmatch(r"[a-z0-9_.-]{1,32}", part) for part in parts) or len(parts) > 3:
        return None
    return Platform(*parts) if len(parts) > 1 else Platform("linux", parts[0])


def parse_manifest(raw: bytes) -> Manifest | Index:
    """Raises InvalidImage for what is neither, and for what names anything that can't be verified."""
    data = _document(raw, "manifest")
    reader = _Reader("manifest")
    kind = reader.text(data, "mediaType", "")
    if kind in _INDEXES or (not kind and "manifests" in data):
        found = tuple(_descriptor(reader, item) for item in reader.items(data, "manifests"))
        return Index(found, raw)
    if kind not in ("", *_MANIFESTS) or reader.integer(data, "schemaVersion", 0) != 2:
        raise InvalidImage(
            f"a manifest of the type {kind or 'that schema version 1 had'!r} is not read here",
            stage="bad-manifest",
            hint="images of OCI and of Docker's schema 2 are",
        )
    config = _descriptor(reader, reader.mapping(data, "config"))
    layers = tuple(_descriptor(reader, item) for item in reader.items(data, "layers"))
    if config.media_type not in _CONFIGS:
        raise reader.wrong(f"config.mediaType: {config.media_type[:100]!r} is no image's configuration")
    if len(layers) > LAYERS_MAX:
        raise reader.wrong(f"layers: {len(layers)}, and at most {LAYERS_MAX} are taken")
    return Manifest(kind or MANIFEST, config, layers, raw)


def parse_config(raw: bytes) -> Config:
    """Raises InvalidImage with the field that is wrong."""
    data = _document(raw, "configuration")
    reader = _Reader("configuration")
    inner = reader.mapping(data, "config", optional=True)
    rootfs = reader.mapping(data, "rootfs")
    diff_ids = reader.texts(rootfs, "diff_ids")
    for one in diff_ids:
        hexadecimal(one)
    return Config(
        platform=Platform(
            reader.text(data, "os", "linux"), reader.text(data, "architecture", ""), reader.text(data, "variant", "")
        ),
        diff_ids=diff_ids,
        env=tuple(_variable(text) for text in reader.texts(inner, "Env")),
        entrypoint=reader.texts(inner, "Entrypoint"),
        command=reader.texts(inner, "Cmd"),
        working_dir=reader.text(inner, "WorkingDir", ""),
        user=reader.text(inner, "User", ""),
        labels=reader.pairs(inner, "Labels"),
        volumes=tuple(reader.mapping(inner, "Volumes", optional=True)),
        exposed_ports=tuple(reader.mapping(inner, "ExposedPorts", optional=True)),
        stop_signal=reader.text(inner, "StopSignal", ""),
        created=reader.text(data, "created", ""),
        author=reader.text(data, "author", ""),
        history=tuple(_history(reader, item) for item in reader.items(data, "history", optional=True)),
        raw=raw,
    )


def check_together(manifest: Manifest, config: Config) -> None:
    """Raises InvalidImage when a manifest and a configuration can't be of one image."""
    if len(manifest.layers) != len(config.diff_ids):
        raise InvalidImage(
            f"the manifest has {len(manifest.layers)} layers and the configuration {len(config.diff_ids)}",
            stage="bad-manifest",
        )


def choose(index: Index, wanted: Platform) -> Descriptor:
    """The first of an index that serves the platform. Raises NotFound, which lists what is there."""
    for one in index.manifests:
        if one.media_type in _MANIFESTS and one.platform is not None and one.platform.serves(wanted):
            return one
    there = sorted({str(one.platform) for one in index.manifests if one.platform and one.platform.os != "unknown"})
    shown = [name[:_PLATFORM_CHARACTERS] for name in there[:_PLATFORMS_TOLD]]
    if len(there) > len(shown):
        shown.append(f"and {len(there) - len(shown)} more")
    raise NotFound(
        f"there is nothing for {wanted} in this image",
        hint=f"it has: {', '.join(shown) or 'nothing for any platform'}; choose with --platform",
    )


def write_manifest(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """The same bytes for the same content."""
    return dump(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.to_json(),
            "layers": [one.to_json() for one in layers],
        }
    )


def dump(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _document(raw: bytes, what: str) -> dict[str, Any]:
    if len(raw) > DOCUMENT_BYTES_MAX:
        raise InvalidImage(
            f"the {what} has {len(raw)} bytes, and at most {DOCUMENT_BYTES_MAX} are read", stage="too-large"
        )
    try:
        text = raw.decode()  # json itself would take UTF-16, and surrogates
        data = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()  # half a pair can be written nowhere again
    except (ValueError, RecursionError) as error:
        raise InvalidImage(f"the {what} is no JSON: {error}", stage=f"bad-{_slug(what)}") from None
    if not isinstance(data, dict):
        raise InvalidImage(f"the {what} is no map", stage=f"bad-{_slug(what)}")
    return data


def _slug(what: str) -> str:
    return "config" if what == "configuration" else what


def _descriptor(reader: _Reader, data: object) -> Descriptor:
    if not isinstance(data, dict):
        raise reader.wrong("a descriptor is no map")
    digest = reader.text(data, "digest", "")
    hexadecimal(digest)
    size = reader.integer(data, "size", -1)
    if not 0 <= size <= BLOB_BYTES_MAX:
        raise reader.wrong(f"size: {size} bytes can't be")
    platform = None
    if isinstance(data.get("platform"), dict):
        inner = data["platform"]
        platform = Platform(
            reader.text(inner, "os", ""), reader.text(inner, "architecture", ""), reader.text(inner, "variant", "")
        )
    return Descriptor(reader.text(data, "mediaType", ""), digest, size, platform, reader.pairs(data, "annotations"))


def _variable(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _history(reader: _Reader, data: object) -> History:
    if not isinstance(data, dict):
        raise reader.wrong("history: an entry is no map")
    return History(
        reader.text(data, "created", ""),
        reader.text(data, "created_by", ""),
        reader.text(data, "comment", ""),
        data.get("empty_layer") is True,
    )


class _Reader:
    """Fields by their type; null counts as absent, as Go's encoder writes it."""

    def __init__(self, what: str) -> None:
        self._what = what

    def wrong(self, problem: str) -> InvalidImage:
        return InvalidImage(f"the {self._what} is malformed: {problem}", stage=f"bad-{_slug(self._what)}")

    def text(self, data: Mapping[str, Any], name: str, default: str) -> str:
        value = data.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or "\0" in value:
            raise self.wrong(f"{name} must be text")
        return value

    def integer(self, data: Mapping[str, Any], name: str, default: int) -> int:
        value = data.get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(f"{name} must be a whole number")
        return value

    def mapping(self, data: Mapping[str, Any], name: str, optional: bool = False) -> dict[str, Any]:
        value = data.get(name)
        if value is None and optional:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(f"{name} must be a map")
        return value

    def items(self, data: Mapping[str, Any], name: str, optional: bool = False) -> list[Any]:
        value = data.get(name)
        if value is None and optional:
            return []
        if not isinstance(value, list):
            raise self.wrong(f"{name} must be a list")
        return value

    def texts(self, data: Mapping[str, Any], name: str) -> tuple[str, ...]:
        return tuple(self._texts(data, name))

    def _texts(self, data: Mapping[str, Any], name: str) -> Sequence[str]:
        found = self.items(data, name, optional=True)
        for one in found:
            if not isinstance(one, str) or "\0" in one:
                raise self.wrong(f"{name} must be a list of texts")
        return found

    def pairs(self, data: Mapping[str, Any], name: str) -> tuple[tuple[str, str], ...]:
        found = self.mapping(data, name, optional=True)
        for value in found.values():
            if not isinstance(value, str):
                raise self.wrong(f"{name} must be a map of texts")
        return tuple(found.items())
