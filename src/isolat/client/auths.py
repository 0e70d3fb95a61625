"""Where the caller's credentials for registries are: read here, as the caller, and only the registry's own are sent.

The files are those of the containers ecosystem and Docker's (containers-auth.json(5)); the first that knows the
registry counts. Credential helpers are not asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isolat.errors import UsageError

_BYTES_MAX = 1 << 20


def files() -> Iterator[Path]:
    """In the order in which skopeo looks."""
    if chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(chosen)
        return
    yield default_file()
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    yield Path(config) / "containers" / "auth.json"
    yield Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"


def default_file() -> Path:
    """Where `login` writes: in memory where the system has such a place, so that it goes with the session."""
    if chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        return Path(chosen)
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/containers/{os.geteuid()}"
    return Path(runtime) / ("containers/auth.json" if "XDG_RUNTIME_DIR" in os.environ else "auth.json")


def of(registry: str) -> dict[str, Any]:
    """What is known of this registry and its repositories, as ``auths`` of an auth.json; empty where nothing is."""
    for path in files():
        found = {key: value for key, value in _read(path).items() if key.partition("/")[0] in _keys(registry)}
        if found:
            return found
    return {}


def _keys(registry: str) -> tuple[str, ...]:
    """Docker keeps its own registry under an address of long ago."""
    return (registry, "index.docker.io", "https:") if registry == "docker.io" else (registry,)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open() as stream:
            data = json.loads(stream.read(_BYTES_MAX))
        auths = data.get("auths") or {}
        return dict(auths)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"the credentials in {path} can't be read: {error}", hint="isolat login writes them") from None
