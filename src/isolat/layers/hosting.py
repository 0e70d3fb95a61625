"""What is brought into a microVM that runs, for other environments in it: the tools and their images, as disks.

The machine type has no hot-plug, so each machine has a few empty disks from its beginning (``SLOTS``; a quarter of a
millisecond of its start each), behind which a file is put while it runs. Inside, an image is mounted once for all that
stand on it. It stays when the last of them has ended, for the next, until the slot is needed for another one.

What is where is asked of QEMU each time: a daemon that is killed between any two steps leaves what the next one finds.
All steps are idempotent, and everything is gone with the machine.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from isolat.deadline import Deadline
from isolat.errors import StoreError, Unsupported
from isolat.layers import machines
from isolat.layers.base import GUEST, TOOLS, Frame, Wanted
from isolat.places.base import Identity, Place
from isolat.places.steps import MS_NODEV, MS_RDONLY, Mount, Step
from isolat.qemu import dialogue, machine
from isolat.qemu.argv import placeholder
from isolat.qemu.qmp import Qmp

TOOLS_DEVICE = "vdc"
SLOTS = ("vde", "vdf", "vdg", "vdh")
_NODE = "image-"
_DIGITS = 16  # of a digest: a node's name has 31 characters at most


def check(frame: Frame) -> None:
    if not _slots(frame):
        raise Unsupported(
            "it was made by an older version, whose machines have no room for others' images",
            hint="make it anew",
        )


def image_at(digest: str, below: str) -> str:
    return f"{below}/images/{digest[:_DIGITS]}"


def bring_in(
    frame: Frame, place: Place, wanted: Wanted, in_use: Collection[str], tools_at: str, below: str, d: Deadline
) -> str:
    """See CanHost. ``tools_at``, ``below``: where things are inside."""
    inside, evicted = place.inside(GUEST, place.facts), ""
    with machine.monitor(place, d) as qmp:
        mounts = {TOOLS_DEVICE: tools_at}
        _put(qmp, TOOLS_DEVICE, TOOLS, wanted.tools, d)
        if wanted.digest:
            drives = {slot: dialogue.drive(qmp, slot, d) for slot in _slots(frame)}
            slot, node = _slot(drives, wanted.digest, in_use), _node(wanted.digest)
            if drives[slot] not in (placeholder(slot), node):
                evicted = drives[slot].removeprefix(_NODE)
                inside.revert((_mount(slot, image_at(evicted, below)),), d)
            _put(qmp, slot, node, wanted.image, d)
            mounts[slot] = image_at(wanted.digest, below)
    # What it remembers of the placeholder's blocks goes first.
    inside.resume(Identity(os.urandom(machines.ENTROPY_BYTES), devices=tuple(f"/dev/{name}" for name in mounts)), d)
    inside.carry_out([_mount(device, at) for device, at in mounts.items()], d)
    return evicted


def leave_bare(frame: Frame, place: Place, tools_at: str, below: str, d: Deadline) -> None:
    """See CanHost."""
    inside = place.inside(GUEST, place.facts)
    with machine.monitor(place, d) as qmp:
        if dialogue.drive(qmp, TOOLS_DEVICE, d) == placeholder(TOOLS_DEVICE):
            return  # they are the first that come and the last that go
        drives = {slot: dialogue.drive(qmp, slot, d) for slot in _slots(frame)}
        for slot, node in drives.items():
            if node != placeholder(slot):
                inside.revert((_mount(slot, image_at(node.removeprefix(_NODE), below)),), d)
                dialogue.unplug_disk(qmp, slot, d)
        inside.revert((_mount(TOOLS_DEVICE, tools_at),), d)
        dialogue.unplug_disk(qmp, TOOLS_DEVICE, d)


def _slots(frame: Frame) -> tuple[str, ...]:
    """The slots that this machine was made with."""
    words = " ".join(frame.guest.argv) if frame.guest else ""
    return tuple(slot for slot in SLOTS if placeholder(slot) in words)


def _node(digest: str) -> str:
    return f"{_NODE}{digest[:_DIGITS]}"


def _slot(drives: Mapping[str, str], digest: str, in_use: Collection[str]) -> str:
    """Where it is already, else an empty one, else one whose image nobody stands on."""
    used = {_node(other) for other in in_use if other != digest}
    for slot, node in drives.items():
        if node == _node(digest):
            return slot
    for slot, node in drives.items():
        if node == placeholder(slot):
            return slot
    for slot, node in drives.items():
        if node not in used:
            return slot
    raise Unsupported(
        f"there is room for {len(drives)} images in it beside its own, and all are in use",
        hint="put it into another machine, or end what stands on one of them",
    )


def _put(qmp: Qmp, device: str, node: str, path: str, d: Deadline) -> None:
    if dialogue.drive(qmp, device, d) == node:
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise StoreError(f"{path} can't be opened: {error.strerror}") from error
    try:
        dialogue.forget_node(qmp, node, d)
        dialogue.swap_disk(qmp, device, node, fd, read_only=True, d=d)
    finally:
        os.close(fd)


def _mount(device: str, at: str) -> Step:
    """It makes the directory, too, and is nothing where that is mounted."""
    return Mount(f"/dev/{device}", at, "erofs", "", MS_RDONLY | MS_NODEV)
