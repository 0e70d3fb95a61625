"""Images out of an archive: Docker's (``docker save``, of any age) and OCI's, which may be one file that is both.

docker-archive: ``manifest.json`` names each image's configuration and layers by their paths in the archive; the layers
are compressed or not, and the configuration has the digests of what they are uncompressed (moby, image/tarexport).
oci-archive: an OCI image layout (image-spec, image-layout.md), ``index.json`` first. An archive that is both has in
``index.json`` the manifests that the images of ``manifest.json`` have had elsewhere: those are kept.

Everything is verified: blobs against their digests, layers against the configuration's, by ``ImageStore.add_manifest``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolat.errors import InvalidImage, NotFound, UsageError
from isolat.images.flatten import inflate
from isolat.images.flatten.bad import Bad
from isolat.images.image import Image
from isolat.images.oci import (
    CONFIG,
    LAYER,
    Descriptor,
    Index,
    Manifest,
    Platform,
    check_together,
    choose,
    hexadecimal,
    own_platform,
    parse_config,
    parse_manifest,
    write_manifest,
)
from isolat.images.opening import invalid, never, opened
from isolat.images.progress import Progress, no_progress
from isolat.images.reference import parse_name
from isolat.images.registries import policy
from isolat.images.spool import WHAT, Member, Spool

if TYPE_CHECKING:
    from isolat.images.store import Build, ImageStore

REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"
IMAGES_MAX = 1000
_TYPES = {"tar": LAYER, "gzip": f"{LAYER}+gzip", "zstd": f"{LAYER}+zstd"}

Told = Callable[[Image, Sequence[str]], None]  # an image is there, under the names that it has in the archive
Moved = Callable[[str, str], None]  # this name meant another image until now: the one of this digest


_DOCKER = "manifest.json"  # what only an archive of that kind has


@dataclass(frozen=True)
class Found:
    """One image of an archive: its manifest, as it came or as we put it together."""

    raw: bytes
    names: tuple[str, ...]


def load(
    store: ImageStore,
    descriptor: int,
    told: Told,
    *,
    platform: Platform | None = None,
    only: str | None = None,
    gone: Callable[[], bool] = never,
    progress: Progress = no_progress,
    moved: Moved = lambda name, digest: None,
) -> list[Image]:
    """Take in every image of an archive, which is read once, so it may be a pipe. ``told`` hears of each.

    ``moved`` hears of names that have meant other images, which stay without them.

    ``only``: the one of this name, or when empty the only one there is.

    Raises InvalidImage; ``stage`` is policy, bad-archive, truncated, too-large, too-many-entries, bad-compression,
    crashed, bad-manifest, bad-config, bad-name, missing-layer, digest-mismatch, or what ``flatten`` says of a layer.
    NotFound where it has nothing for the platform, StoreError where this machine is at fault.
    """
    with store.build() as build:
        spool = Spool(build.path)
        with opened(descriptor, WHAT, gone) as more:
            spool.take(more, progress)
        policy.find(store.root).check_archive("docker-archive" if _DOCKER in spool else "oci-archive")
        loaded = []
        there = images(spool, platform or own_platform())
        for found in there if only is None else [_chosen(there, only)]:
            before = dict(store.names())
            image = _take_in(store, spool, found, build, progress)
            for name in found.names:
                if before.get(name, image.digest) != image.digest:
                    moved(name, before[name])
            loaded.append(image)
            told(image, found.names)
        return loaded


def _chosen(there: Sequence[Found], only: str) -> Found:
    """The image of that name, as skopeo chooses one; ``@N`` is the one at that place. Raises NotFound, UsageError."""
    if not only and len(there) == 1:
        return there[0]
    place = only.removeprefix("@")
    if place != only and place.isdecimal() and int(place) < len(there):
        return there[int(place)]
    names = [name for one in there for name in one.names]
    hint = f"it has: {', '.join(names) or f'@0 to @{len(there) - 1}'}"
    if not only:
        raise UsageError(f"{WHAT} has {len(there)} images", hint=f"choose one with :NAME, or load all; {hint}")
    with contextlib.suppress(UsageError):
        for one in there:
            if parse_name(only) in one.names:
                return one
    raise NotFound(f"{WHAT} has no image {only!r}", hint=hint)


def _take_in(store: ImageStore, spool: Spool, found: Found, build: Build, progress: Progress) -> Image:
    manifest = parse_manifest(found.raw)
    assert isinstance(manifest, Manifest)
    raw = _known(store, manifest) or found.raw

    def find(digest: str) -> Path:
        return spool.blob(digest).file if spool.has_blob(digest) else store.blobs.path(digest)

    return store.add_manifest(raw, find, found.names, build=build, progress=progress)


def _known(store: ImageStore, manifest: Manifest) -> bytes | None:
    """The manifest of this image where the store has it whole: then its layers are not kept in a second form."""
    image = store.find(hexadecimal(manifest.config.digest))
    if image is None or not image.manifest:
        return None
    with contextlib.suppress(NotFound):
        known = store.manifest(image)
        if all(store.blobs.has(one.digest, one.size_bytes) for one in known.blobs):
            return known.raw
    return None


def images(spool: Spool, platform: Platform) -> list[Found]:
    """What is in an archive, complete: every blob of each is there. Raises InvalidImage, NotFound."""
    if _DOCKER in spool:
        found = _docker(spool, platform)
    elif "index.json" in spool:
        found = _oci(spool, platform)
    else:
        raise InvalidImage(
            f"{WHAT} is none of images: it has neither manifest.json nor index.json",
            stage="bad-archive",
            hint="`isolat import` makes an image of an archive of a root file system",
        )
    if not found:
        raise InvalidImage(f"{WHAT} has no image in it", stage="bad-archive")
    return found


# docker-archive


def _docker(spool: Spool, platform: Platform) -> list[Found]:
    entries = _json(spool, "manifest.json")
    if not isinstance(entries, list) or len(entries) > IMAGES_MAX:
        raise _malformed(f"it is no list of at most {IMAGES_MAX} images")
    kept = _indexed(spool, platform)
    return [_docker_image(spool, entry, kept) for entry in entries]


def _docker_image(spool: Spool, entry: object, kept: dict[str, bytes]) -> Found:
    if not isinstance(entry, dict) or not isinstance(entry.get("Config"), str):
        raise _malformed("an image has no Config")
    layers, names = _texts(entry, "Layers"), _names(_texts(entry, "RepoTags"))
    described = spool.member(entry["Config"])
    config = parse_config(spool.read(described))
    raw = kept.get(described.digest)
    if raw is None:
        raw = write_manifest(
            Descriptor(CONFIG, described.digest, described.size_bytes),
            [_layer(spool.member(name)) for name in layers],
        )
    manifest = parse_manifest(raw)
    assert isinstance(manifest, Manifest)
    check_together(manifest, config)
    return Found(raw, names)


def _layer(member: Member) -> Descriptor:
    try:
        kind = inflate.kind_of(member.head)
    except Bad as bad:
        raise invalid(bad, WHAT) from None
    return Descriptor(_TYPES[kind], member.digest, member.size_bytes)


def _indexed(spool: Spool, platform: Platform) -> dict[str, bytes]:
    """The manifests that the archive has itself, by the digest of their configuration; none that is not whole."""
    found: dict[str, bytes] = {}
    if "index.json" in spool:
        with contextlib.suppress(InvalidImage, NotFound):
            index = _index(spool)
            for one in index.manifests:
                with contextlib.suppress(InvalidImage, NotFound):
                    manifest = _manifest(spool, one, platform)
                    found[manifest.config.digest] = manifest.raw
    return found


# oci-archive


def _oci(spool: Spool, platform: Platform) -> list[Found]:
    groups: dict[tuple[str, int], list[Descriptor]] = {}
    for at, one in enumerate(_index(spool).manifests):
        if one.platform is None or one.platform.os != "unknown":  # those are attestations (buildkit's)
            name = _name(one)
            groups.setdefault((name, 0 if name or one.platform else at + 1), []).append(one)
    if len(groups) > IMAGES_MAX:
        raise _malformed(f"it has more than {IMAGES_MAX} images")
    found: dict[bytes, list[str]] = {}
    for (name, _), group in groups.items():
        for one in _of_platform(group, platform):
            found.setdefault(_manifest(spool, one, platform).raw, []).extend([name] if name else [])
    return [Found(raw, _names(names)) for raw, names in found.items()]


def _of_platform(group: list[Descriptor], platform: Platform) -> list[Descriptor]:
    """Of one name: the forms of one image for several platforms, of which one is taken; else images of their own."""
    if len(group) > 1 and len({str(one.platform) for one in group}) == len(group):
        return [choose(Index(tuple(group), b""), platform)]
    return group


def _index(spool: Spool) -> Index:
    found = parse_manifest(spool.read(spool.member("index.json")))
    if not isinstance(found, Index):
        raise _malformed("index.json is no index")
    return found


def _name(one: Descriptor) -> str:
    notes = dict(one.annotations)
    return notes.get(FULL_NAME) or notes.get(REF_NAME) or ""


def _manifest(spool: Spool, one: Descriptor, platform: Platform) -> Manifest:
    """What a descriptor of the index means, one index further down at most, with every blob there."""
    found = parse_manifest(spool.read(spool.blob(one.digest)))
    if isinstance(found, Index):
        there = tuple(inner for inner in found.manifests if spool.has_blob(inner.digest))
        found = parse_manifest(spool.read(spool.blob(choose(Index(there, b""), platform).digest)))
    if not isinstance(found, Manifest):
        raise InvalidImage("an index that names an index is read nowhere", stage="bad-manifest")
    for blob in found.blobs:
        spool.blob(blob.digest)
    return found


# Fields


def _malformed(problem: str) -> InvalidImage:
    return InvalidImage(f"{WHAT}'s table of images is malformed: {problem}", stage="bad-manifest")


def _json(spool: Spool, name: str) -> Any:
    try:
        return json.loads(spool.read(spool.member(name)))
    except (ValueError, RecursionError) as error:
        raise _malformed(f"{name} is no JSON: {error}") from None


def _texts(entry: dict[str, Any], name: str) -> list[str]:
    found = entry.get(name)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, str) and "\0" not in one for one in found):
        raise _malformed(f"{name} is no list of texts")
    return found


def _names(found: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(parse_name(name) for name in found))
    except UsageError as error:
        raise InvalidImage(f"{WHAT}: {error.message}", stage="bad-name") from None
