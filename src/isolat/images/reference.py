"""How images are named, by Docker's rules: ``[HOST[:PORT]/]PATH[:TAG][@DIGEST]``.

The first part is a registry when it has a dot or a port or is ``localhost``; else the name is one of docker.io, and a
single word one of its ``library`` (the grammar: github.com/distribution/reference). People see the short form,
registries the long one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from isolat.errors import UsageError

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
_LIBRARY = "library/"
_REPOSITORY_LETTERS_MAX = 255

_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_PART}(?:/{_PART})*")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """``registry`` is never empty; ``tag`` is when a digest is named without one."""

    registry: str
    path: str
    tag: str = DEFAULT_TAG
    digest: str = ""

    @property
    def repository(self) -> str:
        """Without tag and digest, as people write it."""
        if self.registry == DEFAULT_REGISTRY:
            return self.path.removeprefix(_LIBRARY)
        return f"{self.registry}/{self.path}"

    @property
    def name(self) -> str:
        """What a store calls it: ``debian:latest``. A bare digest has the tag ``latest`` nowhere: then empty."""
        return f"{self.repository}:{self.tag}" if self.tag else ""

    @property
    def by_digest(self) -> str:
        """``debian@sha256:…``, or nothing."""
        return f"{self.repository}@{self.digest}" if self.digest else ""

    @property
    def remote(self) -> str:
        """What a registry is asked for, with the digest when one is named (skopeo takes one of both)."""
        where = f"{self.registry}/{self.path}"
        return f"{where}@{self.digest}" if self.digest else f"{where}:{self.tag}"

    def with_digest(self, digest: str) -> Reference:
        return replace(self, digest=digest)


def parse_reference(text: str) -> Reference:
    """Raises UsageError for what can't be the name of an image."""
    rest, at, digest = text.partition("@")
    host, path = _split_host(rest)
    path, colon, tag = path.partition(":")
    if (
        (at and not _DIGEST.fullmatch(digest))
        or not _HOST.fullmatch(host)
        or not _PATH.fullmatch(path)
        or (colon and not _TAG.fullmatch(tag))
        or len(host) + len(path) > _REPOSITORY_LETTERS_MAX
    ):
        raise UsageError(
            f"{text!r} can't be the name of an image",
            hint="[HOST[:PORT]/]NAME[:TAG][@sha256:DIGEST], the name of lower case letters, digits and . _ - /",
        )
    if host == DEFAULT_REGISTRY and "/" not in path:
        path = f"{_LIBRARY}{path}"
    return Reference(host, path, tag or ("" if at else DEFAULT_TAG), digest)


def _split_host(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return ("docker.io" if first == "index.docker.io" else first), rest
    return DEFAULT_REGISTRY, text


def parse_name(text: str) -> str:
    """The full form ``name:tag`` of a store. Raises UsageError for what can't be a name, and for a digest."""
    reference = parse_reference(text)
    if reference.digest:
        raise UsageError(
            f"{text!r} names a digest: a name can be given to an image, a digest is its own", hint="leave @sha256:… out"
        )
    return reference.name
