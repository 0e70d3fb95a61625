"""What an environment that runs holds for others inside of it: brought in when the first one needs it."""

from __future__ import annotations

from dataclasses import replace

from isolat.checkpoint import checkpoint
from isolat.deadline import Deadline
from isolat.engine import entering
from isolat.engine.environment import Environment
from isolat.engine.kits import FETCH_S, Kits
from isolat.engine.table import Table
from isolat.errors import Unsupported
from isolat.images.store import ImageStore
from isolat.layers import registry
from isolat.layers.base import TOOLS, CanHost, Frame, ImageRef, Layer, Wanted
from isolat.places.base import Facts
from isolat.wire import kinds as k


class Hosting:
    """For outer environments. The caller holds ``Environment.hosting`` where something is changed."""

    def __init__(self, facts: Facts, table: Table, images: ImageStore, kits: Kits) -> None:
        self._facts = facts
        self._table = table
        self._images = images
        self._kits = kits

    def check(self, outer: Environment, stack: tuple[Layer, ...]) -> None:
        """Raises Unsupported, with the reason, where these layers can't be put into it."""
        frame = outer.handle.frames[-1]
        around = registry.LAYERS[frame.layer]
        reason = registry.objection(around, stack[0])
        if reason:
            raise Unsupported(f"{outer.name} can't hold that: {reason[0]}", hint=reason[1])
        if any(layer.capabilities.machine for layer in stack):
            raise Unsupported(
                f"{outer.name} can't hold a machine: it has no QEMU, nor a processor that would make it quick",
                hint="run the machine beside it, without --in",
            )
        if isinstance(around, CanHost):
            around.check_hosting(frame)
        elif around.capabilities.machine or not outer.handle.guest_name:
            raise Unsupported(
                f"nothing can be put into {outer.name} yet: its layer is {around.name}",
                hint="run the outer one with --layer microvm",
            )
        if not outer.live_link(Deadline(0)).flags & k.F_APART:
            raise Unsupported(
                f"{outer.name} was started by an older version of Isolat, whose keepers hold one environment each",
                hint="start it anew",
            )

    def image_inside(self, outer: Environment, image: ImageRef, name: str) -> ImageRef:
        """The image as the inside of this one will have it."""
        host = _host(outer)
        if host is None:
            return image
        if image.binds:
            raise Unsupported(
                f"the image {name} shows directories of this machine, which {outer.name} does not have",
                hint="choose an image with files of its own",
            )
        return replace(image, mount=host[0].image_inside(image.digest, outer.handle.digest), file="")

    def wanted(self, outer: Environment, digest: str) -> Wanted:
        """What an environment on the image of this digest (empty: on none) needs of this machine's files."""
        if _host(outer) is None:
            return Wanted()
        kit = self._kits.get(Deadline(FETCH_S), accelerator=outer.spec.accel, kernel=outer.spec.kernel)
        if digest in ("", outer.handle.digest):
            return Wanted(kit.tools)
        return Wanted(kit.tools, digest, str(self._images.file(digest)))

    def bring_in(self, env: Environment, outer: Environment, d: Deadline) -> None:
        """Have inside what it needs, unless this daemon has brought that in before."""
        host, digest = _host(outer), env.handle.digest
        needed = {TOOLS} if digest in ("", outer.handle.digest) else {TOOLS, digest}
        if host is None or needed <= outer.brought:
            return
        layer, frame = host
        _, place = entering.last(outer, self._facts)
        in_use = {other.handle.digest for other in self._table.inside(outer) if other.state.alive}
        evicted = layer.bring_in(frame, place, self.wanted(outer, digest), in_use, d)
        outer.brought = {one for one in outer.brought if not evicted or not one.startswith(evicted)} | needed
        checkpoint()

    def leave_bare(self, outer: Environment, d: Deadline) -> None:
        """Undo all that has been brought in, by whichever daemon: nobody is in it."""
        host = _host(outer)
        if host is not None:
            _, place = entering.last(outer, self._facts)
            outer.brought.clear()
            host[0].leave_bare(host[1], place, d)


def _host(outer: Environment) -> tuple[CanHost, Frame] | None:
    frame = outer.handle.frames[-1]
    layer = registry.LAYERS[frame.layer]
    return (layer, frame) if isinstance(layer, CanHost) else None
