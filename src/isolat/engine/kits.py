"""What machines are made of on this machine: found, fetched and tried once, then remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Collection
from pathlib import Path

from isolat.deadline import Deadline
from isolat.engine.creation import boot_id
from isolat.engine.handle import write_atomically
from isolat.engine.paths import StateRoot
from isolat.errors import StartFailed, Unsupported
from isolat.guest import files
from isolat.images import disks
from isolat.images.progress import Progress, no_progress
from isolat.layers.base import Descriptor, MachineKit
from isolat.qemu import accel, features, jail, sharing

FETCH_S = 600.0  # a kernel comes over the network
_TSC_S = 10.0


class Kits:
    """The kit of one state root: ``guest``, ``disks`` and, the root that QEMU runs in, ``mounts/jail`` below it."""

    def __init__(self, paths: StateRoot, native: Path) -> None:
        self.dir = paths.root / "guest"
        self.blanks = self.dir / "blanks"
        self.disks = paths.root / "disks"
        self.jail = paths.root / "mounts" / "jail"
        self._native = native
        self._lock = threading.Lock()
        self._kits: dict[tuple[str, str], tuple[files.GuestFiles, MachineKit]] = {}

    def get(
        self, d: Deadline, progress: Progress = no_progress, *, accelerator: str = "auto", kernel: str = ""
    ) -> MachineKit:
        """The kit; what is missing is fetched and made. Raises what guest/files.py and qemu/features.py raise.

        ``accelerator``: see qemu/accel.py. ``kernel``: a file instead of the distribution's.
        """
        with self._lock:
            found = self._guest(kernel, progress, d.sooner(FETCH_S))
            key = (accelerator, kernel)
            if key not in self._kits or self._kits[key][0] != found:
                self._kits[key] = (found, self._make(found, accelerator, progress))
            kit = self._kits[key][1]
            jail.ensure(self.jail, self.dir, kvm=kit.accel == "kvm")
            return sharing.with_server(kit)

    def pc_kernel(self, progress: Progress = no_progress) -> None:
        """Fetch the kernel of whole PCs where it is missing, which may take long. Raises what ``get`` raises."""
        disks.kernel(self.disks, progress, Deadline(FETCH_S))

    def base_disk(self, wanted: Descriptor, d: Deadline) -> Path:
        """The bootable disk that an environment's own is a copy of; made where there is none.

        Raises what images/disk.py raises.
        """
        agent = self._native / files.AGENT
        return disks.ensure(self.disks, wanted.image, Path(wanted.tree), agent, wanted.size_bytes, d=d)

    def prune_disks(self, digests: Collection[str]) -> None:
        """Remove the bootable disks of images other than these."""
        disks.prune(self.disks, digests)

    def _guest(self, kernel: str, progress: Progress, d: Deadline) -> files.GuestFiles:
        """Each kernel of somebody's own has a directory of its own, named by its path."""
        if not kernel:
            return files.ensure(self.dir, self._native, progress, d=d)
        at = self.dir / "kernels" / hashlib.sha256(kernel.encode()).hexdigest()[:16]
        return files.ensure(at, self._native, progress, own_kernel=Path(kernel), d=d)

    def close(self) -> None:
        """Take away what is mounted."""
        jail.remove(self.jail)

    def _make(self, found: files.GuestFiles, accelerator: str, progress: Progress) -> MachineKit:
        progress("looking at what QEMU can do", 0, 0)
        qemu = features.find(Deadline(30), self.dir / "qemu.json")
        lacking = qemu.missing("microvm")
        if lacking:
            raise Unsupported(f"QEMU {qemu.version} lacks {', '.join(lacking)}", hint="use QEMU 7.2 or later")
        asked = os.environ.get("ISOLAT_ACCEL", "auto") if accelerator == "auto" else accelerator
        chosen = accel.choose(qemu, found, self.dir / "accel.json", Deadline(60), asked)
        lacks, remedy = sharing.lacking(chosen.qemu, found)
        return MachineKit(
            qemu=chosen.qemu.binary,
            qemu_version=chosen.qemu.version,
            qemu_identity=chosen.qemu.identity,
            sandbox=chosen.qemu.sandbox,
            accel=chosen.kind,
            accel_reason=chosen.reason,
            tsc_khz=self._tsc_khz(),
            release=found.release,
            kernel=self._in_jail(found.vmlinux),
            initramfs=self._in_jail(found.initramfs),
            tools=str(found.tools),
            guest_key=found.key,
            jail=str(self.jail),
            pc="" if qemu.missing("q35") else qemu.binary,
            live_lacks=lacks,
            live_remedy=remedy,
        )

    def _in_jail(self, path: Path) -> str:
        return f"/guest/{path.relative_to(self.dir)}"

    def _tsc_khz(self) -> int:
        """How fast this machine's time stamp counter runs, measured once in each of its boots."""
        at, boot = self.dir / "tsc.json", boot_id()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(at.read_text())
            if kept["boot"] == boot and kept["khz"] > 0:
                return int(kept["khz"])
        try:
            answer = subprocess.run(
                [str(self._native / files.AGENT), "--tsc-khz"], capture_output=True, check=True, timeout=_TSC_S
            )
            khz = int(answer.stdout)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise StartFailed(f"this machine's time stamp counter can't be measured: {error}", stage="tsc") from error
        write_atomically(at, json.dumps({"boot": boot, "khz": khz, "at": time.time()}))
        return khz
