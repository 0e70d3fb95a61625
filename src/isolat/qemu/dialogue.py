"""What is said to a QEMU: each conversation is a short function on a ``Qmp``.

Descriptors given to these functions stay the caller's: QEMU gets copies. All raise like ``Qmp.execute``; a conversation
that failed in the middle leaves a machine that is good for nothing but its end, which is what the engine gives it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

from isolat.deadline import Deadline
from isolat.errors import StartFailed
from isolat.qemu.argv import placeholder
from isolat.qemu.qmp import Qmp

_STATE = "state"
# Both sides need the same; ``events`` tells the end instead of having us ask again and again.
_CAPABILITIES = {"capabilities": [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]}
_FULL_SPEED = 1 << 40  # bytes a second; QEMU's own default is 128 MiB


# disks


def swap_disk(qmp: Qmp, device_id: str, node: str, fd: int, read_only: bool, d: Deadline) -> None:
    """Put the disk behind ``fd`` under the device, running or not; what was there before goes.

    ``fd`` is open for reading, or for reading and writing, exactly as ``read_only`` says: QEMU looks for a descriptor
    of the very mode it wants (``monitor_fdset_dup_fd_add``). ``drive`` may be set on a living device
    (hw/core/qdev-properties-system.c). The guest is not told: it keeps the placeholder's capacity, reads past the
    disk's end fail, and blocks it has cached are stale until BLKFLSBUF. Doing it again is fine.
    """
    before = drive(qmp, device_id, d)
    if before == node:
        return
    with _descriptor_set(qmp, fd, d) as path:
        file = {"driver": "file", "filename": path, "locking": "off", "read-only": read_only, "discard": "unmap"}
        raw = {"driver": "raw", "node-name": node, "read-only": read_only, "discard": "unmap", "file": file}
        qmp.execute("blockdev-add", raw, d)
    _set_drive(qmp, device_id, node, d)
    _forget(qmp, device_id, before, d)


def forget_node(qmp: Qmp, node: str, d: Deadline) -> None:
    """Let go of a file that is behind no disk, where there is one: who was killed while swapping leaves it."""
    with contextlib.suppress(StartFailed):
        qmp.execute("blockdev-del", {"node-name": node}, d)


def unplug_disk(qmp: Qmp, device_id: str, d: Deadline) -> None:
    """Back to the placeholder. Fine where it is there already."""
    before = drive(qmp, device_id, d)
    if before != placeholder(device_id):
        _set_drive(qmp, device_id, placeholder(device_id), d)
        _forget(qmp, device_id, before, d)


def drive(qmp: Qmp, device_id: str, d: Deadline) -> str:
    """The node behind this disk."""
    return str(qmp.execute("qom-get", {"path": _path(device_id), "property": "drive"}, d))


def _set_drive(qmp: Qmp, device_id: str, node: str, d: Deadline) -> None:
    qmp.execute("qom-set", {"path": _path(device_id), "property": "drive", "value": node}, d)


def _path(device_id: str) -> str:
    return f"/machine/peripheral/{device_id}"


def _forget(qmp: Qmp, device_id: str, node: str, d: Deadline) -> None:
    if node != placeholder(device_id):
        qmp.execute("blockdev-del", {"node-name": node}, d)


@contextlib.contextmanager
def _descriptor_set(qmp: Qmp, fd: int, d: Deadline) -> Iterator[str]:
    """A path that QEMU opens as ``fd`` for as long as the block lasts; what it has opened lives on."""
    number = qmp.execute("add-fd", {}, d, (fd,))["fdset-id"]
    yield f"/dev/fdset/{number}"
    qmp.execute("remove-fd", {"fdset-id": number}, d)


# states


def save(qmp: Qmp, d: Deadline, *, to: int) -> int:
    """Stop the machine and write its state to our descriptor ``to``, from the file's beginning. The length in bytes.

    Memory that it shares with us (a template's) is not in it: ``x-ignore-shared`` (migration/ram.c). The descriptor
    goes along with ``getfd``, because the sending side of 7.2 takes such a name and no number (migration/fd.c).
    """
    _capabilities(qmp, d)
    qmp.execute("migrate-set-parameters", {"max-bandwidth": _FULL_SPEED}, d)
    stop(qmp, d)
    target = os.open(f"/proc/self/fd/{to}", os.O_WRONLY | os.O_CLOEXEC)  # with an offset of its own
    try:
        qmp.execute("getfd", {"fdname": _STATE}, d, (target,))
        qmp.execute("migrate", {"uri": f"fd:{_STATE}"}, d)
        _migrated(qmp, d)
        return os.lseek(target, 0, os.SEEK_CUR)
    finally:
        os.close(target)


def load(qmp: Qmp, number: int, d: Deadline) -> None:
    """Read a saved state from QEMU's own descriptor ``number``. The machine runs then, unless it was told to ``stop``.

    It is read from where its offset is, so each clone needs it opened anew: a duplicate shares the offset with the
    clones that read at the same time. What is no state ends QEMU, whose words say why; a state of a machine with fewer
    processors or other memory is taken without a word, so nothing but the key of a template keeps these apart.
    """
    _capabilities(qmp, d)
    qmp.execute("migrate-incoming", {"uri": f"fd:{number}"}, d)
    _migrated(qmp, d)


def load_ahead(sock: socket.socket, number: int, d: Deadline) -> None:
    """The same, said to a QEMU that may not even have begun, whose answers nobody waits for.

    That its guest greets is the answer. The machine runs as soon as it has its state, which says nothing of how it
    was saved (store-global-state=off, migration/migration.c). The next ``Qmp`` on this socket passes over the answers.
    """
    Qmp.tell(sock, [("migrate-set-capabilities", _CAPABILITIES), ("migrate-incoming", {"uri": f"fd:{number}"})], d)


def _capabilities(qmp: Qmp, d: Deadline) -> None:
    qmp.execute("migrate-set-capabilities", _CAPABILITIES, d)


def _migrated(qmp: Qmp, d: Deadline) -> None:
    end = qmp.wait_event("MIGRATION", lambda data: data.get("status") in ("completed", "failed", "cancelled"), d)
    if end["status"] != "completed":
        why = qmp.execute("query-migrate", {}, d).get("error-desc", "no reason given")
        raise StartFailed(f"QEMU: the state's transfer {end['status']}: {why}", stage="qmp")


# the machine


def cont(qmp: Qmp, d: Deadline) -> None:
    qmp.execute("cont", {}, d)


def stop(qmp: Qmp, d: Deadline) -> None:
    """Stop the processors. A stopped machine uses no CPU time; ``cont`` takes half a millisecond."""
    qmp.execute("stop", {}, d)


def status(qmp: Qmp, d: Deadline) -> str:
    """QEMU's run state: ``prelaunch`` (before the first ``cont``), ``inmigrate``, ``paused``, ``running``, …"""
    return str(qmp.execute("query-status", {}, d)["status"])


def powerdown(qmp: Qmp, d: Deadline) -> None:
    """Press the power button (ACPI). What the guest does then is its own matter."""
    qmp.execute("system_powerdown", {}, d)


def quit_(qmp: Qmp, d: Deadline) -> None:
    """End QEMU. That it ended before it could say so is fine."""
    with contextlib.suppress(StartFailed):
        qmp.execute("quit", {}, d)


def screendump(qmp: Qmp, fd: int, d: Deadline) -> None:
    """Write what the screen shows to ``fd`` as PNG, from its beginning."""
    target = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        with _descriptor_set(qmp, target, d) as path:
            qmp.execute("screendump", {"filename": path, "format": "png"}, d)
    finally:
        os.close(target)


def plug_network(qmp: Qmp, tap_fd: int, d: Deadline) -> None:
    """Plug a tap (without IFF_VNET_HDR: a hub passes bare frames on) into the hub that the network card is at."""
    qmp.execute("getfd", {"fdname": "tap0"}, d, (tap_fd,))
    qmp.execute("netdev_add", {"type": "tap", "id": "tap0", "fd": "tap0"}, d)
    port: dict[str, Any] = {"type": "hubport", "id": "hub1", "hubid": 0, "netdev": "tap0"}
    qmp.execute("netdev_add", port, d)
