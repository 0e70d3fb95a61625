"""Pulls and pushes as the command line and the SDK make them: the right request for where the image is or goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from isolat.client import auths, transports
from isolat.client.connect import Call
from isolat.client.transports import Location
from isolat.errors import IsolatError, UsageError
from isolat.images.reference import parse_reference

Ask = Callable[[str, Mapping[str, Any], Sequence[int]], Call]  # verb, arguments, descriptors
Watch = Callable[[Call], Any]  # to the result
OnProgress = Callable[[str, int, int], None]  # what is being done, how much of how much


def pull(ask: Ask, watch: Watch, image: str, platform: str = "", tls_verify: bool | None = None) -> dict[str, Any]:
    """An image of a registry, or the one of an archive or directory. As a row of ``images``."""
    location = transports.parse(image)
    if location.remote:
        args = {"image": location.where, "platform": platform, **_access(location.where, tls_verify)}
        with ask("pull", args, ()) as request:
            found: dict[str, Any] = watch(request)
            return found
    args = {"platform": platform, "only": location.name}
    with transports.source(location) as descriptor, ask("load", args, [descriptor]) as request:
        loaded: dict[str, Any] = watch(request)["images"][0]
        return loaded


def pull_to_run(ask: Ask, watch: Watch, image: str, missing: IsolatError | None) -> None:
    """Of a registry only. ``missing``: the error that would be raised without this, which then says both."""
    if not transports.parse(image).remote:
        raise missing or UsageError(f"{image} is in no registry", hint=f"isolat pull {image}, and run its name")
    try:
        pull(ask, watch, image)
    except IsolatError as error:
        if missing is None:
            raise
        said = f"{missing.message} here, and it could not be pulled: {error.message}"
        hint = error.hint or missing.hint
        raise type(missing)(said, hint=hint, stage=error.stage, details=error.details) from error


def push(ask: Ask, watch: Watch, image: str, target: str = "", tls_verify: bool | None = None) -> dict[str, Any]:
    """To a registry, or into a new archive or directory. ``name``: where it is; ``digest``: that of the manifest."""
    location = transports.parse(target) if target else transports.registry(image)
    if not location.remote:
        return _save(ask, watch, image, location)
    args = {"image": image, "target": location.where, **_access(location.where, tls_verify)}
    with ask("push", args, ()) as request:
        found: dict[str, Any] = watch(request)
        return found


def _save(ask: Ask, watch: Watch, image: str, location: Location) -> dict[str, Any]:
    archive = location.transport in transports.ARCHIVES
    if archive and location.name:
        raise UsageError(
            f"{location.transport}: an image goes into an archive under its own name",
            hint=f"isolat tag {image} {location.name}, then push that",
        )
    with ask("image_inspect", {"images": [image]}, ()) as request:
        (known,) = request.result()["images"]
    args = {"images": [image], "format": location.transport if archive else "oci-archive"}
    with transports.target(location) as descriptor, ask("save", args, [descriptor]) as request:
        watch(request)
    return {"name": f"{location.transport}:{location.where}", "digest": known["manifest"]}


def _access(name: str, tls_verify: bool | None) -> dict[str, Any]:
    found: dict[str, Any] = {"auths": auths.of(parse_reference(name).registry)}
    return found if tls_verify is None else {**found, "tls_verify": tls_verify}
