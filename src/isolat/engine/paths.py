"""Where everything of one state root is."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ROOT = "/var/lib/isolat"


def native_dir() -> Path:
    """The directory of the C programs: ``ISOLAT_LIBEXEC``, the source tree's build, or the installed place."""
    override = os.environ.get("ISOLAT_LIBEXEC")
    if override:
        return Path(override)
    tree = Path(__file__).resolve().parents[3] / "native" / "build"
    return tree if tree.is_dir() else Path("/usr/libexec/isolat")


@dataclass(frozen=True)
class StateRoot:
    """The paths of a state root. Nothing here touches the disk."""

    root: Path

    @property
    def tag(self) -> str:
        """A short name of this root for what lives outside of it (control groups), so that roots never clash."""
        return hashlib.sha256(os.fsencode(os.path.realpath(self.root))).hexdigest()[:8]

    @property
    def cgroup(self) -> str:
        return f"/isolat/{self.tag}"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def socket(self) -> Path:
        return self.root / "daemon.sock"

    @property
    def log(self) -> Path:
        return self.root / "daemon.log"

    @property
    def index(self) -> Path:
        return self.root / "index.sqlite"

    @property
    def envs(self) -> Path:
        return self.root / "envs"

    @property
    def pool(self) -> Path:
        return self.root / "pool"

    @property
    def volumes(self) -> Path:
        """The descriptions of named volumes; their data is in the pool."""
        return self.root / "volumes"

    @property
    def pool_volumes(self) -> Path:
        return self.pool / "volumes"

    @property
    def runtime(self) -> Path:
        return self.root / "runtime"

    def env(self, id: str) -> Path:
        return self.envs / id
