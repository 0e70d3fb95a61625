"""From a registry into the store.

The manifest first (``skopeo inspect --raw``), whose digest is checked here; of an index the platform's instance. Then
skopeo copies that manifest's blobs, by its digest and under the policy, into the staging directory; the store verifies
every one while it makes the file system of them. So nothing is believed that has not been summed up here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from isolat.errors import InvalidImage, NotFound
from isolat.images.blobs import read_blob
from isolat.images.image import Image
from isolat.images.oci import (
    BLOB_BYTES_MAX,
    DOCKER_MANIFEST,
    DOCUMENT_BYTES_MAX,
    Descriptor,
    Index,
    Manifest,
    Platform,
    choose,
    digest_of,
    own_platform,
    parse_config,
    parse_manifest,
)
from isolat.images.reference import Reference
from isolat.images.registries import policy, skopeo
from isolat.images.registries.flights import Flight, Flights, Passenger
from isolat.images.registries.skopeo import Access
from isolat.images.registries.staging import Staging
from isolat.images.registries.watch import Watch
from isolat.images.store import ImageStore

_TOLD_S = 0.1


@dataclass(frozen=True)
class Wanted:
    """One image of a registry, for one platform."""

    reference: Reference
    platform: Platform
    access: Access = Access()
    asked: bool = False  # somebody named the platform


class Puller:
    """Of one store."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self.staging = Staging(store.dir, store.blobs)
        self._flights: Flights[Image] = Flights()

    def pull(self, wanted: Wanted, passenger: Passenger) -> Image:
        """Raises NotFound, Refused, InvalidImage, StoreError, DeadlineExceeded, each with what the registry said."""
        skopeo.check_there()
        key = (wanted.reference, wanted.platform)
        return self._flights.join(key, passenger, lambda flight: self._pull(wanted, flight))

    def _pull(self, wanted: Wanted, flight: Flight[Image]) -> Image:
        name = wanted.reference.name or wanted.reference.by_digest
        watch = Watch(f"pulling {name}", flight.abandoned)
        flight.tell(f"asking for {name}", 0, 0)
        top, manifest = self._manifest(wanted, watch)
        rules = policy.find(self._store.root)
        if not self._is_here(manifest) or not rules.accepts_anything:
            self._fetch(wanted, manifest, rules, flight, watch)
        self._check_platform(wanted, manifest)
        return self._take_in(wanted, top, manifest, flight)

    def _is_here(self, manifest: Manifest) -> bool:
        there = self._store.find(manifest.config.digest.removeprefix("sha256:"))
        return there is not None and all(self._store.blobs.has(one.digest) for one in manifest.blobs)

    # what it is

    def _manifest(self, wanted: Wanted, watch: Watch) -> tuple[str, Manifest]:
        """The digest of what the name means, and the platform's manifest, which may be another document."""
        raw = self._document(wanted, wanted.reference, watch)
        found, top = parse_manifest(raw), digest_of(raw)
        if isinstance(found, Index):
            one = choose(found, wanted.platform)
            found = parse_manifest(self._document(wanted, wanted.reference.with_digest(one.digest), watch))
        if not isinstance(found, Manifest):
            raise InvalidImage("an index that names an index is read nowhere", stage="bad-manifest")
        return top, found

    def _check_platform(self, wanted: Wanted, manifest: Manifest) -> None:
        """Where somebody asked for a platform and the image is for one only. Raises NotFound."""
        raw = self.staging.find(manifest.config.digest)
        config = parse_config(read_blob(raw, manifest.config.digest, DOCUMENT_BYTES_MAX))
        if wanted.asked and not config.platform.serves(wanted.platform):
            raise NotFound(
                f"{wanted.reference.name} is for {config.platform} only, not for {wanted.platform}",
                hint="leave --platform out",
            )

    def _document(self, wanted: Wanted, reference: Reference, watch: Watch) -> bytes:
        with skopeo.auth_file(wanted.access.auths) as auths:
            options = _options("", wanted.access, reference, auths)
            command = skopeo.argv(["inspect", "--raw", *options, f"docker://{reference.remote}"])
            with skopeo.Running(command, watch.what, pass_fds=[auths], stdout=True) as running:
                raw = running.document(watch)
        if reference.digest and digest_of(raw) != reference.digest:
            raise InvalidImage(
                f"{reference.by_digest}: something else came, with the digest {digest_of(raw)}", stage="digest-mismatch"
            )
        return raw

    # its blobs

    def _fetch(
        self, wanted: Wanted, manifest: Manifest, rules: policy.Policy, flight: Flight[Image], watch: Watch
    ) -> None:
        reference = wanted.reference.with_digest(manifest.digest)
        with ExitStack() as stack:
            directory = stack.enter_context(self.staging.pull())
            self.staging.offer(manifest.blobs)
            auths = stack.enter_context(skopeo.auth_file(wanted.access.auths))
            rule = stack.enter_context(rules.descriptor())
            words = [
                *("--policy", skopeo.fd_path(rule), "--tmpdir", str(directory)),
                *(["--registries.d", rules.lookaside] if rules.lookaside else []),
                *("copy", "--remove-signatures", *_options("src-", wanted.access, reference, auths)),
                *_destination(
                    manifest, self.staging.blobs_directory, directory / "layout", f"docker://{reference.remote}"
                ),
            ]
            command = skopeo.argv(
                words,
                read=rules.read,
                write=[str(self.staging.directory)],
                file_bytes=min(BLOB_BYTES_MAX, max((one.size_bytes for one in manifest.blobs), default=0) + (1 << 20)),
            )
            running = stack.enter_context(
                skopeo.Running(command, watch.what, pass_fds=[auths, rule], environment={"TMPDIR": str(directory)})
            )
            _Follower(self.staging, directory, manifest.blobs, flight, watch).follow(running)
            self.staging.collect(directory / "layout", manifest.blobs)
        if manifest.media_type == DOCKER_MANIFEST:
            self._fetch_config(wanted, reference, manifest, watch)
        self.staging.seal(manifest.blobs)

    def _fetch_config(self, wanted: Wanted, reference: Reference, manifest: Manifest, watch: Watch) -> None:
        """skopeo writes a Docker configuration anew when it writes an OCI layout: here are the bytes as they are."""
        with skopeo.auth_file(wanted.access.auths) as auths:
            options = _options("", wanted.access, reference, auths)
            command = skopeo.argv(["inspect", "--config", "--raw", *options, f"docker://{reference.remote}"])
            with skopeo.Running(command, watch.what, pass_fds=[auths], stdout=True) as running:
                self.staging.put(manifest.config, running.document(watch))

    def _take_in(self, wanted: Wanted, top: str, manifest: Manifest, flight: Flight[Image]) -> Image:
        reference = wanted.reference
        try:
            with self._store.build() as build:
                image = self._store.add_manifest(
                    manifest.raw,
                    self.staging.find,
                    [reference.name] if reference.name and not reference.digest else [],
                    build=build,
                    progress=flight.tell,
                    repo_digest=reference.with_digest(top).by_digest,
                )
        except InvalidImage:
            self.staging.forget(manifest.blobs)  # else the same would be found again
            raise
        self.staging.forget(manifest.blobs)
        return image


class _Follower:
    """Tells how many bytes have come, from what lies in the staging directory."""

    def __init__(
        self, staging: Staging, directory: Path, blobs: Sequence[Descriptor], flight: Flight[Image], watch: Watch
    ) -> None:
        self._staging = staging
        self._directory = directory
        self._blobs = blobs
        self._flight = flight
        self._watch = watch
        self._total = sum(one.size_bytes for one in blobs)
        self._came = 0

    def follow(self, running: skopeo.Running) -> None:
        while running.process.poll() is None:
            self._tell()
            self._watch.check()
            time.sleep(_TOLD_S / 4 if self._total < 1 << 20 else _TOLD_S)
        running.finish(self._watch)
        self._flight.tell("fetched, bytes", self._total, self._total)

    def _tell(self) -> None:
        under_way = 0
        for path in self._directory.glob("layout/oci-put-blob*"):
            try:
                under_way += path.stat().st_size
            except FileNotFoundError:  # it has just become whole
                continue
        came = self._staging.arrived(self._blobs) + under_way
        if came > self._came:
            self._watch.came(came - self._came)
            self._came = came
            self._flight.tell("fetching, bytes", min(came, self._total), self._total)


def _destination(manifest: Manifest, blobs: Path, layout: Path, source: str) -> list[str]:
    """Where it goes, so that no blob changes on the way.

    Into a layout skopeo compresses what is not, unless digests are to be preserved, and that it refuses for Docker's
    manifests, which it translates. Docker's with plain layers are rare: they go into a directory, and start anew after
    a kill.
    """
    shared = ["--dest-shared-blob-dir", str(blobs)]
    if manifest.media_type != DOCKER_MANIFEST:
        return ["--preserve-digests", *shared, source, f"oci:{layout}:x"]
    if all(layer.media_type.endswith("gzip") for layer in manifest.layers):
        return [*shared, source, f"oci:{layout}:x"]
    return ["--preserve-digests", source, f"dir:{layout}"]


def _options(side: str, access: Access, reference: Reference, auths: int) -> list[str]:
    verify = "true" if access.verifies(reference.registry) else "false"
    return [f"--{side}tls-verify={verify}", "--authfile", skopeo.fd_path(auths)]


def wanted(reference: Reference, platform: Platform | None, access: Access) -> Wanted:
    return Wanted(reference, platform or own_platform(), access, asked=platform is not None)
