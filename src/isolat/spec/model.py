"""The one spec: what an environment is to be, before any name in it is resolved.

Its outside form is a Compose service (docs/spec.md); ``isolat.spec.parse`` reads and checks it. Units are in the
names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DEFAULT_MEMORY_BYTES = 512 << 20
DEFAULT_PIDS = 1024
DEFAULT_CPUS = 2.0
DEFAULT_DISK_BYTES = 10 << 30
DEFAULT_STOP_GRACE_S = 10.0


@dataclass(frozen=True)
class Volume:
    """A directory or file made visible inside. ``source`` is an absolute path of the host, or a volume's name."""

    source: str
    target: str
    read_only: bool = False

    @property
    def named(self) -> bool:
        return not self.source.startswith("/")


@dataclass(frozen=True)
class Tmpfs:
    target: str
    size_bytes: int = 64 << 20


@dataclass(frozen=True)
class Spec:
    image: str
    layers: tuple[str, ...] = ("container",)  # from the hardware up
    inside: str = ""  # of which environment that runs, by its name or id; empty: of none
    name: str = ""
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None  # None: the image's, whose command then counts
    environment: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    user: str = ""
    hostname: str = ""
    tty: bool = False
    stdin_open: bool = False
    read_only: bool = False
    init: bool = True
    network_mode: str = "none"
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    memory_swap_bytes: int | None = None  # memory and swap together; None: no swap beyond memory
    cpus: float = DEFAULT_CPUS
    cpu_shares: int = 1024
    pids_limit: int = DEFAULT_PIDS
    disk_bytes: int = DEFAULT_DISK_BYTES
    volumes: tuple[Volume, ...] = ()
    tmpfs: tuple[Tmpfs, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    stop_grace_s: float = DEFAULT_STOP_GRACE_S
    stop_signal: str = ""  # what it is asked to end with; empty: the image's, else SIGTERM
    timeout_s: float | None = None  # killed when it has run so long
    remove: bool = False  # --rm
    logging: str = "file"  # or none
    oci_runtime: str = ""
    accel: str = "auto"  # how a machine's processors run: auto, tcg, kvm
    kernel: str = ""  # a machine's kernel; empty: the distribution's
    options: tuple[tuple[str, Any], ...] = field(default=())  # x-LAYER: what only one layer understands

    @property
    def layer(self) -> str:
        """The stack as it is written: ``microvm/container``."""
        return "/".join(self.layers)

    def option(self, layer: str) -> dict[str, Any]:
        found = dict(self.options).get(layer, {})
        return dict(found) if isinstance(found, dict) else {}
