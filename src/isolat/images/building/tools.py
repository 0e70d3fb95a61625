"""What of this machine a build needs, and where it is seen in the sandbox."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isolat.errors import Unsupported
from isolat.linux import child

_USR = "/usr/"
_LOCAL_HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


@dataclass(frozen=True)
class Tools:
    """Paths that are the same outside and inside, because the sandbox has this machine's /usr."""

    crun: str
    python: str


def find_tools() -> Tools:
    """Raises Unsupported for what is missing, with the remedy."""
    _program("buildah")
    return Tools(crun=_program("crun"), python=_python())


def _program(name: str) -> str:
    found = shutil.which(name, path=child.SAFE_PATH)
    if found is None:
        raise Unsupported(f"could not find {name}, which is required to build an image", hint=f"apt-get install {name}")
    real = os.path.realpath(found)
    if not real.startswith(_USR):
        raise Unsupported(f"{real} is not below /usr, which is all of this machine that a build sees")
    return real


def _python() -> str:
    """This interpreter where it is below /usr, else the system's."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        if path.startswith(_USR) and os.access(path, os.X_OK):
            return path
    raise Unsupported("could not find a python3 below /usr, which is required to build an image")


def network_files(*, host_network: bool) -> dict[str, str]:
    """/etc/hosts and /etc/resolv.conf: this machine's for its network, and for none next to nothing."""
    if not host_network:
        return {"/etc/hosts": _LOCAL_HOSTS, "/etc/resolv.conf": ""}
    return {path: _read(path) for path in ("/etc/hosts", "/etc/resolv.conf")}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def proxies(environment: Mapping[str, str], *, host_network: bool) -> dict[str, str]:
    """The way out of this machine, for those who may go out."""
    return {name: value for name, value in environment.items() if host_network and name.lower().endswith("_proxy")}
