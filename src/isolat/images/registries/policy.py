"""Which images are accepted: skopeo's policy (containers-policy.json(5)), honoured in every pull and load.

The first that is there: ``STATE_ROOT/policy.json``, ``/etc/containers/policy.json``, else ``policy.json`` beside this
module, which accepts everything, as Docker does. Where signatures are looked for: ``STATE_ROOT/registries.d``, else
``/etc/containers/registries.d`` (containers-registries.d(5)).

skopeo checks the images of registries. Archives are read here, and nothing can be signed in them: they are accepted
where the policy accepts everything of their kind, wherever it lies, and are refused else.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolat.errors import InvalidImage, StoreError

FILE, LOOKASIDE = "policy.json", "registries.d"
_SYSTEM = Path("/etc/containers")
_OURS = Path(__file__).with_name(FILE)
_ANYTHING = [{"type": "insecureAcceptAnything"}]
_BYTES_MAX = 1 << 20
_INLINE = {"keyPath": "keyData", "rekorPublicKeyPath": "rekorPublicKeyData", "caPath": "caData"}
_LOCAL_URL = re.compile(r"file://(/[^\s\"']+)")


@dataclass(frozen=True)
class Policy:
    """``data`` goes to skopeo through a descriptor, keys in it; ``read``: what skopeo has to read besides."""

    path: Path
    data: dict[str, Any]
    read: tuple[str, ...] = ()
    lookaside: str = ""

    @property
    def accepts_anything(self) -> bool:
        """Whether it asks for nothing of any image. What is not understood asks for something."""
        if not set(self.data) <= {"default", "transports"} or self.data.get("default") != _ANYTHING:
            return False
        transports = self.data.get("transports", {})
        return isinstance(transports, dict) and all(
            isinstance(scopes, dict) and all(one == _ANYTHING for one in scopes.values())
            for scopes in transports.values()
        )

    def check_archive(self, transport: str) -> None:
        """Raises InvalidImage (policy) unless archives of this kind are accepted."""
        transports = self.data.get("transports", {})
        scopes = transports.get(transport, {}) if isinstance(transports, dict) else None
        wanted = [{"": self.data.get("default"), **scopes}] if isinstance(scopes, dict) else [{}]
        if not all(one and all(value == _ANYTHING for value in one.values()) for one in wanted):
            raise InvalidImage(
                f"the policy {self.path} does not accept everything of the kind {transport}:, and nothing in an archive"
                " is signed",
                stage="policy",
                hint=f'"transports": {{"{transport}": {{"": [{{"type": "insecureAcceptAnything"}}]}}}} would',
            )

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[int]:
        found = os.memfd_create(FILE, os.MFD_CLOEXEC)
        try:
            with open(found, "wb", closefd=False) as stream:
                stream.write(json.dumps(self.data).encode())
            yield found
        finally:
            os.close(found)


def find(root: Path) -> Policy:
    """The policy of this state root. Raises StoreError for one that can't be read: then nothing is accepted."""
    path = next((one for one in (root / FILE, _SYSTEM / FILE) if one.exists()), _OURS)
    try:
        data = json.loads(_text(path))
        if not isinstance(data, dict):
            raise ValueError("it is no map")
        data = _with_keys(data)
        lookaside = next((one for one in (root / LOOKASIDE, _SYSTEM / LOOKASIDE) if one.is_dir()), None)
        read = () if lookaside is None else (str(lookaside), *_local(lookaside))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"the policy {path} can't be read: {error}", stage="policy", hint="mend it: until then nothing is accepted"
        ) from error
    return Policy(path, data, (*read, *_paths(data)), str(lookaside or ""))


def _text(path: Path) -> str:
    with path.open() as stream:
        return stream.read(_BYTES_MAX)


def _with_keys(data: Any) -> Any:
    """With the keys themselves instead of their files, which nobody but root may be able to read."""
    if isinstance(data, list):
        return [_with_keys(one) for one in data]
    if not isinstance(data, dict):
        return data
    found = {}
    for name, value in data.items():
        if name in _INLINE and isinstance(value, str):
            with Path(value).open("rb") as stream:
                found[_INLINE[name]] = base64.b64encode(stream.read(_BYTES_MAX)).decode()
        else:
            found[name] = _with_keys(value)
    return found


def _paths(data: Any) -> Iterator[str]:
    """The files of those keys that can only be named by their files."""
    if isinstance(data, dict):
        if isinstance(data.get("keyPaths"), list):
            yield from (one for one in data["keyPaths"] if isinstance(one, str))
        for value in data.values():
            yield from _paths(value)
    elif isinstance(data, list):
        for value in data:
            yield from _paths(value)


def _local(directory: Path) -> Iterator[str]:
    """Directories of this machine in which signatures are."""
    for path in sorted(directory.glob("*.yaml")):
        yield from _LOCAL_URL.findall(_text(path))
