"""Where the caller's credentials for registries are: read here, as the caller, and only the registry's own are sent.

The files are those of the containers ecosystem and Docker's (containers-auth.json(5)); the first that knows the
registry counts. Where a file names a credential helper, that is asked (docker-credential-NAME get), as the caller.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from isolat.errors import UsageError

_BYTES_MAX = 1 << 20
_HELPER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HELPER_S = 60
_DOCKER = "https://index.docker.io/v1/"


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
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "containers/auth.json"
    return Path(f"/run/containers/{os.geteuid()}/auth.json")


def of(registry: str) -> dict[str, Any]:
    """What is known of this registry and its repositories, as ``auths`` of an auth.json; empty where nothing is."""
    for path in files():
        data = _read(path)
        auths = _map(data, "auths")
        found = {key: value for key, value in auths.items() if _host(key) == _host(registry) and value}
        helpers = _map(data, "credHelpers")
        helper = next((helpers[key] for key in helpers if _host(key) == _host(registry)), data.get("credsStore"))
        if not found and isinstance(helper, str):
            found = _ask(helper, registry)
        if found:
            return found
    return {}


def _host(key: str) -> str:
    """The registry that a key means: ``HOST[/NAMESPACE…]``, or an address, as Docker writes them.

    Docker keeps its own registry under an address of long ago.
    """
    host = key.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return "docker.io" if host in ("index.docker.io", "registry-1.docker.io") else host


def _map(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = data.get(name)
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open() as stream:
            data = json.loads(stream.read(_BYTES_MAX))
        if not isinstance(data, dict):
            raise ValueError("it is no map")
        return data
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"the credentials in {path} can't be read: {error}", hint="isolat login writes them") from None


def _ask(helper: str, registry: str) -> dict[str, Any]:
    """What a credential helper says (docker-credential-helpers, README); nothing where it knows nothing."""
    if not _HELPER.fullmatch(helper):
        raise UsageError(f"{helper!r} can't be the name of a credential helper")
    server = _DOCKER if registry == "docker.io" else registry
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=server.encode(), capture_output=True, check=False, timeout=_HELPER_S,
        )  # fmt: skip
        found = json.loads(done.stdout) if done.returncode == 0 else {}
        name, secret = str(found.get("Username", "")), str(found.get("Secret", ""))
    except (OSError, ValueError, AttributeError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"the credential helper docker-credential-{helper} failed: {error}") from None
    if not secret:
        return {}
    if name == "<token>":
        return {registry: {"auth": _encoded("<token>:"), "identitytoken": secret}}
    return {registry: {"auth": _encoded(f"{name}:{secret}")}}


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
