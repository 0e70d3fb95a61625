"""The SDK's options as a Compose service: what ``Client.run`` and ``Client.plan`` send."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from isolat.client import volumes as sources


def service(
    image: str,
    command: Sequence[str] | str = (),
    *,
    name: str | None = None,
    layer: str | None = None,
    environment: Mapping[str, str] | None = None,
    working_dir: str | None = None,
    user: str | int | None = None,
    hostname: str | None = None,
    stdin: bool | None = None,
    read_only: bool | None = None,
    init: bool | None = None,
    network: str | None = None,
    memory: int | str | None = None,
    memory_swap: int | str | None = None,
    cpus: float | None = None,
    cpu_shares: int | None = None,
    pids: int | None = None,
    disk: int | str | None = None,
    volumes: Mapping[str, str] | None = None,
    tmpfs: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    stop_grace_s: float | None = None,
    timeout_s: float | None = None,
    remove: bool | None = None,
    log_driver: str | None = None,
    oci_runtime: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Any], list[int]]:
    """The service (docs/spec.md), and a descriptor for each volume, which the caller closes.

    ``volumes`` maps a source to ``TARGET`` or ``TARGET:ro``; ``options`` a layer to what only it understands.
    """
    given: dict[str, Any] = {
        "image": image,
        "command": command if isinstance(command, str) else list(command),
        "container_name": name,
        "runtime": layer,
        "environment": None if environment is None else dict(environment),
        "working_dir": working_dir,
        "user": user,
        "hostname": hostname,
        "stdin_open": stdin,
        "read_only": read_only,
        "init": init,
        "network_mode": network,
        "mem_limit": memory,
        "memswap_limit": memory_swap,
        "cpus": cpus,
        "cpu_shares": cpu_shares,
        "pids_limit": pids,
        "storage_opt": None if disk is None else {"size": disk},
        "tmpfs": None if tmpfs is None else list(tmpfs),
        "labels": None if labels is None else dict(labels),
        "stop_grace_period": stop_grace_s,
        "x-timeout": timeout_s,
        "x-remove": remove,
        "logging": None if log_driver is None else {"driver": log_driver},
        "x-oci-runtime": oci_runtime,
        **{f"x-{name}": dict(found) for name, found in (options or {}).items()},
    }
    data = {key: value for key, value in given.items() if value is not None}
    if not data["command"]:
        del data["command"]
    mounted, fds = _open(volumes or {})
    return ({**data, "volumes": mounted} if mounted else data), fds


def _open(volumes: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[int]]:
    mounted: list[dict[str, Any]] = []
    fds: list[int] = []
    try:
        for source, target in volumes.items():
            volume, fd = sources.open_source(source, target.removesuffix(":ro"), target.endswith(":ro"))
            mounted.append(volume)
            fds.append(fd)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return mounted, fds
