"""From a registry into the store.

What the name means is asked for first (``skopeo inspect --raw``), its digest is checked here, and of an index the
platform's instance is chosen here. Then the blobs come, in one of two ways:

- where the policy accepts everything: through skopeo's proxy (proxy.py), as streams that are written here;
- else skopeo copies the image under the policy, into a directory of its own (copying.py), and what it accepted must be
  the very manifest that was chosen.

The store verifies every blob again while it makes the file system of them. So nothing is believed that was not summed
up here.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass

from isolat.errors import InvalidImage, IsolatError, NotFound, StoreError
from isolat.images.blobs import read_blob
from isolat.images.image import Image
from isolat.images.oci import (
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
from isolat.images.registries import copying, policy, skopeo
from isolat.images.registries.flights import Flight, Flights, Passenger
from isolat.images.registries.proxy import Proxy
from isolat.images.registries.skopeo import Access
from isolat.images.registries.staging import Incoming, Kept
from isolat.images.registries.watch import Abandoned, Watch
from isolat.images.store import Build, ImageStore

RESERVE_BYTES = 256 << 20  # of the disk, for others
_TOLD_S = 0.1


@dataclass(frozen=True)
class Wanted:
    """One image of a registry, for one platform."""

    reference: Reference
    platform: Platform
    access: Access = Access()
    asked: bool = False  # somebody named the platform

    @property
    def key(self) -> object:
        """Who wants the same with the same rights."""
        rights = (self.access.tls_verify, json.dumps(dict(self.access.auths), sort_keys=True))
        return (self.reference, self.platform, self.asked, rights)


def wanted(reference: Reference, platform: Platform | None, access: Access) -> Wanted:
    return Wanted(reference, platform or own_platform(), access, asked=platform is not None)


class Puller:
    """Of one store."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self.kept = Kept(store.dir)
        self.kept.sweep()
        self._flights: Flights[Image] = Flights()

    def pull(self, wanted: Wanted, passenger: Passenger) -> Image:
        """Raises NotFound, Refused, InvalidImage, StoreError, DeadlineExceeded, each with what the registry said."""
        skopeo.check_there()
        return self._flights.join(wanted.key, passenger, lambda flight: _Pull(self, self._store, wanted, flight).run())


class _Pull:
    """One of them."""

    def __init__(self, puller: Puller, store: ImageStore, wanted: Wanted, flight: Flight[Image]) -> None:
        self._store = store
        self._kept = puller.kept
        self._wanted = wanted
        self._flight = flight
        self._name = wanted.reference.name or wanted.reference.by_digest
        self._watch = Watch(f"pulling {self._name}", flight.abandoned)
        self._came = self._total = 0
        self._told_s = 0.0

    def run(self) -> Image:
        self._flight.tell(f"asking for {self._name}", 0, 0)
        rules = policy.find(self._store.root)
        with ExitStack() as stack:
            build = stack.enter_context(self._store.build())
            incoming = Incoming(build.path / "blobs", self._store.blobs, self._kept)
            auths = stack.enter_context(skopeo.auth_file(self._wanted.access.auths))
            if rules.accepts_anything:
                top, manifest = self._stream(incoming, auths)
            else:
                top, manifest = self._copy(incoming, build, rules, auths)
            self._check_platform(incoming, manifest)
            return self._take_in(build, incoming, top, manifest)

    # What it is

    def _ask(self, reference: Reference, auths: int) -> skopeo.Running:
        """Begin to ask for the document that a name means."""
        words = ["inspect", "--raw", *self._options("", auths), f"docker://{reference.remote}"]
        return skopeo.Running(skopeo.argv(words), self._watch.what, pass_fds=[auths], stdout=True)

    def _answer(self, running: skopeo.Running, digest: str) -> bytes:
        raw = running.document(self._watch)
        if digest and digest_of(raw) != digest:
            raise InvalidImage(
                f"{self._name}: something else came than {digest}: {digest_of(raw)}", stage="digest-mismatch"
            )
        self._watch.advanced()
        return raw

    def _document(self, digest: str, auths: int) -> bytes:
        with self._ask(self._wanted.reference.with_digest(digest), auths) as running:
            return self._answer(running, digest)

    def _options(self, side: str, auths: int) -> list[str]:
        verify = "true" if self._wanted.access.verifies(self._wanted.reference.registry) else "false"
        return [f"--{side}tls-verify={verify}", "--authfile", skopeo.fd_path(auths)]

    # Through the proxy

    def _stream(self, incoming: Incoming, auths: int) -> tuple[str, Manifest]:
        """The digest of what the name means, and the platform's manifest, all of whose blobs have come.

        The proxy is started at the same time as the question is asked, because each start has its round trips.
        """
        reference = self._wanted.reference
        options = [
            *skopeo.platform_options(self._wanted.platform),
            *("experimental-image-proxy", *self._options("", auths)),
        ]
        with self._ask(reference, auths) as running, Proxy(options, auths, self._watch.what, self._watch) as proxy:
            found = _open(proxy, reference)
            raw = self._answer(running, reference.digest)
            chosen = self._choose(raw)
            image, manifest = self._opened(proxy, found, raw, chosen, auths)
            missing = incoming.missing(manifest.blobs)
            self._begin(missing)
            proxy.fetch(image, missing, incoming.create, incoming.whole, self._more)
        return digest_of(raw), manifest

    def _choose(self, raw: bytes) -> str:
        """The digest of the platform's manifest. Raises NotFound, which lists what there is."""
        found = parse_manifest(raw)
        return choose(found, self._wanted.platform).digest if isinstance(found, Index) else found.digest

    def _opened(
        self, proxy: Proxy, found: _Opened | IsolatError, top: bytes, chosen: str, auths: int
    ) -> tuple[int, Manifest]:
        """The proxy's number of the chosen image, and its manifest as it is in the registry.

        Where skopeo chose otherwise the image is opened again. Docker's manifests the proxy has only converted.
        """
        if isinstance(found, IsolatError) or found.digest != chosen:
            found = _open(proxy, self._wanted.reference.with_digest(chosen))
        document = b"" if isinstance(found, IsolatError) else found.manifest
        raw = next((one for one in (top, document) if digest_of(one) == chosen), None)
        manifest = _one(self._document(chosen, auths) if raw is None else raw)
        if isinstance(found, IsolatError):
            raise found
        return found.image, manifest

    # Under a policy

    def _copy(self, incoming: Incoming, build: Build, rules: policy.Policy, auths: int) -> tuple[str, Manifest]:
        """The same, as far as the policy accepts it. All blobs are fetched, because skopeo is to see them all."""
        reference = self._wanted.reference
        with self._ask(reference, auths) as running:
            raw = self._answer(running, reference.digest)
        chosen = self._choose(raw)
        manifest = _one(raw if digest_of(raw) == chosen else self._document(chosen, auths))
        self._begin(manifest.blobs)
        copying.copy(
            f"docker://{reference.remote}",
            [*skopeo.platform_options(self._wanted.platform)],
            self._options("src-", auths),
            manifest,
            rules,
            incoming,
            build,
            auths,
            self._watch,
            self._more,
        )
        return digest_of(raw), manifest

    # Both

    def _begin(self, missing: list[Descriptor] | tuple[Descriptor, ...]) -> None:
        """Raises StoreError where the disk has no room for what is to come."""
        self._total = sum(one.size_bytes for one in missing)
        found = os.statvfs(self._store.dir)
        free = found.f_bavail * found.f_frsize - RESERVE_BYTES
        if self._total > free:
            raise StoreError(
                f"{self._name} needs {self._total >> 20} MiB, and the disk has {max(0, free) >> 20} MiB to spare",
                stage="disk-full",
                hint="`isolat system df` shows what takes the room, `isolat system prune` makes some",
            )
        self._more(0)

    def _more(self, count: int) -> None:
        self._came += count
        if time.monotonic() < self._told_s + _TOLD_S and self._came < self._total:
            return
        self._told_s = time.monotonic()
        self._flight.tell(f"pulling {self._name}, bytes", self._came, self._total)

    def _check_platform(self, incoming: Incoming, manifest: Manifest) -> None:
        """Where somebody asked for a platform and the image is for one only. Raises NotFound."""
        path = incoming.path(manifest.config.digest)
        config = parse_config(read_blob(path, manifest.config.digest, DOCUMENT_BYTES_MAX))
        if self._wanted.asked and not config.platform.serves(self._wanted.platform):
            raise NotFound(
                f"{self._name} is for {config.platform} only, not for {self._wanted.platform}",
                hint="leave --platform out",
            )

    def _tell(self, text: str, done: int, total: int) -> None:
        """Ends it, too, once nobody waits any more: it is called often enough while layers are flattened."""
        self._flight.tell(text, done, total)
        if self._flight.abandoned():
            raise Abandoned(f"{self._watch.what}: nobody waits for it any more")

    def _take_in(self, build: Build, incoming: Incoming, top: str, manifest: Manifest) -> Image:
        reference = self._wanted.reference
        digests = [one.digest for one in manifest.blobs]
        try:
            image = self._store.add_manifest(
                manifest.raw,
                incoming.path,
                [reference.name] if reference.name and not reference.digest else [],
                build=build,
                progress=self._tell,
                repo_digest=reference.with_digest(top).by_digest,
            )
        except (InvalidImage, NotFound):
            self._kept.forget(digests)  # else the same would be found again
            raise
        self._kept.forget(digests)
        return image


def _one(raw: bytes) -> Manifest:
    """The manifest of one image. Raises InvalidImage."""
    found = parse_manifest(raw)
    if not isinstance(found, Manifest):
        raise InvalidImage("an index that names an index is read nowhere", stage="bad-manifest")
    return found


@dataclass(frozen=True)
class _Opened:
    image: int
    digest: str
    manifest: bytes


def _open(proxy: Proxy, reference: Reference) -> _Opened | IsolatError:
    """An image in the proxy, or why not: what else is known may tell it better."""
    try:
        image = proxy.open(f"docker://{reference.remote}")
        return _Opened(image, *proxy.manifest(image))
    except (NotFound, StoreError) as error:
        return error
