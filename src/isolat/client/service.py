"""The SDK's options as a Compose service: what ``Client.run`` and ``Client.plan`` send."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from isolat.client import volumes as sources


class Options(TypedDict, total=False):
    """What an environment may be given (docs/spec.md). ``volumes`` maps a source, which is a volume's name or a path
    with a slash, to ``TARGET`` or ``TARGET:ro``; ``options`` maps a layer to what only that layer understands."""

    name: str
    layer: str
    inside: str
    environment: Mapping[str, str]
    working_dir: str
    user: str | int
    hostname: str
    read_only: bool
    init: bool
    network: str
    memory: int | str
    memory_swap: int | str
    cpus: float
    cpu_shares: int
    pids: int
    disk: int | str
    volumes: Mapping[str, str]
    tmpfs: Sequence[str]
    labels: Mapping[str, str]
    stop_grace_s: float
    timeout_s: float
    remove: bool
    log_driver: str
    oci_runtime: str
    accel: str
    kernel: str
    options: Mapping[str, Mapping[str, Any]]


# option → key of the spec, where the value is passed on as it was given
_KEYS = {
    "name": "container_name", "layer": "runtime", "inside": "x-in",
    "environment": "environment", "working_dir": "working_dir",
    "user": "user", "hostname": "hostname", "read_only": "read_only", "init": "init", "network": "network_mode",
    "memory": "mem_limit", "memory_swap": "memswap_limit", "cpus": "cpus", "cpu_shares": "cpu_shares",
    "pids": "pids_limit", "tmpfs": "tmpfs", "labels": "labels", "stop_grace_s": "stop_grace_period",
    "timeout_s": "x-timeout", "remove": "x-remove", "oci_runtime": "x-oci-runtime",
    "accel": "x-accel", "kernel": "x-kernel",
}  # fmt: skip
_OTHERS = {"disk", "log_driver", "volumes", "options"}


def service(
    image: str, command: Sequence[str] | str = (), *, stdin: bool = False, **options: Unpack[Options]
) -> tuple[dict[str, Any], list[int]]:
    """The service, and a descriptor for each volume that is a directory or file, which the caller closes.

    Raises TypeError as a call does.
    """
    for name in options:
        if name not in _KEYS and name not in _OTHERS:
            raise TypeError(f"there is no option {name!r}")
    data: dict[str, Any] = {"image": image}
    if command:
        data["command"] = command if isinstance(command, str) else list(command)
    if stdin:
        data["stdin_open"] = True
    for name, value in options.items():
        if name in _KEYS and value is not None:
            data[_KEYS[name]] = _plain(value)
    if options.get("disk") is not None:
        data["storage_opt"] = {"size": options["disk"]}
    if options.get("log_driver") is not None:
        data["logging"] = {"driver": options["log_driver"]}
    for layer, own in (options.get("options") or {}).items():
        data[f"x-{layer}"] = dict(own)
    mounted, fds = _open(options.get("volumes") or {})
    return ({**data, "volumes": mounted} if mounted else data), fds


def _plain(value: object) -> object:
    """Any mapping or sequence as the one that has a JSON form."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _open(volumes: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[int]]:
    mounted: list[dict[str, Any]] = []
    fds: list[int] = []
    try:
        for source, target in volumes.items():
            volume, fd = sources.open_source(source, target.removesuffix(":ro"), target.endswith(":ro"))
            mounted.append(volume)
            if fd >= 0:
                fds.append(fd)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return mounted, fds
