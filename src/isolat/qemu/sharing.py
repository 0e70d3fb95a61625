"""Whether machines can share directories with this one: it takes QEMU, the guest's kernel and a server of files.

The server is QEMU 7.2's own virtiofsd (docs/tools/virtiofsd.rst). Debian 12 has it in a directory of QEMU's, in no
PATH. QEMU 8.0 dropped it for another one with other options (docs/about/removed-features.rst), which no machine of ours
has been seen with: it is not taken for this one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from isolat.guest.files import GuestFiles
from isolat.layers.base import MachineKit
from isolat.qemu.features import Qemu

DEVICE = "vhost-user-fs-device"
SERVERS = ("/usr/lib/qemu/virtiofsd",)
_REMEDY = "on Debian 12: apt-get install qemu-system-common"


def lacking(qemu: Qemu, guest: GuestFiles) -> tuple[str, str]:
    """What of a machine's own is missing for it, and the remedy; empty: nothing."""
    if DEVICE not in qemu.devices:
        return f"QEMU {qemu.version} has no {DEVICE}", "use Debian's QEMU"
    if not guest.live:
        remedy = "use a kernel that has it; one of an older Isolat comes anew when STATE_ROOT/guest/kernel is removed"
        return f"the guest's kernel {guest.release} has no virtiofs", remedy
    return "", ""


def with_server(kit: MachineKit, servers: Sequence[str] = SERVERS) -> MachineKit:
    """The kit with the server that there is now: it may come and go while a daemon runs."""
    path = _server(servers)
    if path or kit.live_lacks:
        return replace(kit, virtiofsd=path)
    return replace(kit, live_lacks=_not_found(servers), live_remedy=_REMEDY)


def warnings(servers: Sequence[str] = SERVERS) -> tuple[str, ...]:
    """For ``doctor``: what is said where this machine has no server."""
    return () if _server(servers) else (f"no live volumes: {_not_found(servers)} ({_REMEDY})",)


def _server(servers: Sequence[str]) -> str:
    return next((path for path in servers if os.access(path, os.X_OK)), "")


def _not_found(servers: Sequence[str]) -> str:
    return f"could not find {' or '.join(servers)}, the server of files that QEMU 7.2 comes with"
