"""Which images are accepted: skopeo's policy (containers-policy.json(5)), honoured in every pull.

The first that is there: ``STATE_ROOT/policy.json``, ``/etc/containers/policy.json``, else everything is accepted, as
with Docker. Where signatures are looked for: ``STATE_ROOT/registries.d``, else ``/etc/containers/registries.d``
(containers-registries.d(5)).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolat.errors import StoreError

FILE, LOOKASIDE = "policy.json", "registries.d"
_SYSTEM = Path("/etc/containers")
_ANYTHING = {"default": [{"type": "insecureAcceptAnything"}]}
_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class Policy:
    """``text`` goes to skopeo through a descriptor; ``read`` is what it needs besides: keys, and where to look."""

    text: str
    read: tuple[str, ...] = ()
    lookaside: str = ""

    @property
    def accepts_anything(self) -> bool:
        return bool(json.loads(self.text) == _ANYTHING)

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[int]:
        found = os.memfd_create(FILE, os.MFD_CLOEXEC)
        try:
            os.write(found, self.text.encode())
            yield found
        finally:
            os.close(found)


def find(root: Path) -> Policy:
    """The policy of this state root. Raises StoreError for one that can't be read: then nothing is accepted."""
    lookaside = next((path / LOOKASIDE for path in (root, _SYSTEM) if (path / LOOKASIDE).is_dir()), None)
    for path in (root / FILE, _SYSTEM / FILE):
        if path.exists():
            return _read(path, lookaside)
    return Policy(json.dumps(_ANYTHING))


def _read(path: Path, lookaside: Path | None) -> Policy:
    try:
        with path.open() as stream:
            text = stream.read(_BYTES_MAX)
        data = json.loads(text)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"the policy {path} can't be read: {error}", stage="policy", hint="mend it: until then nothing is accepted"
        ) from error
    where = (str(lookaside), *_directories(lookaside)) if lookaside else ()
    return Policy(json.dumps(data), (*_keys(data), *where), str(lookaside or ""))


def _directories(lookaside: Path) -> Iterator[str]:
    """The directories of this machine in which signatures lie."""
    if "site" not in sys.modules:  # the launcher starts Python without it, and it is what finds installed packages
        import site

        site.main()
    import yaml

    for path in sorted(lookaside.glob("*.yaml")):
        try:
            yield from _file_urls(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError) as error:
            raise StoreError(f"{path} can't be read: {error}", stage="policy") from error


def _file_urls(data: Any) -> Iterator[str]:
    if isinstance(data, dict):
        for value in data.values():
            yield from _file_urls(value)
    elif isinstance(data, str) and data.startswith("file://"):
        yield data.removeprefix("file://")


def _keys(data: Any) -> Iterator[str]:
    """The files of keys that are named anywhere in it."""
    if isinstance(data, dict):
        for name, value in data.items():
            if name == "keyPath" and isinstance(value, str):
                yield value
            elif name == "keyPaths" and isinstance(value, list):
                yield from (one for one in value if isinstance(one, str))
            else:
                yield from _keys(value)
    elif isinstance(data, list):
        for value in data:
            yield from _keys(value)
