"""Templates: booted, saved machines that others are cloned from. Their memory is held by a keeper of their own.

::

    STATE_ROOT/templates/KEY/template.json   what it is; written last, so a template is there whole or not at all
    STATE_ROOT/templates/KEY/disk.img        its writable disk, as it was when it was saved: clones get copies
    STATE_ROOT/templates/KEY/keeper.*        the keeper that holds its sealed memory and its state

One of an image goes on from one that knows none, and is made behind the back of whoever asked for it (``Behind``);
until it is there, the other one is lent. It takes as much memory as that one again, and holds what its clones would
read of the image first.

A few of either kind are kept: each goes when nobody has used it for ten minutes, or sooner where memory is scarce,
unless somebody asked for the template itself. What is lent are descriptors: who is cloning it loses nothing by that.

A daemon that is killed leaves them as they are, and the next one fetches them again. A keeper without a daemon lets go
after ``KEPT_S``. A template's memory is never on disk. It holds no more than a kernel that has just booted, but it is
shared by every clone, and only sealed memory can't be changed by any of them (fcntl(2), F_SEAL_WRITE).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from isolat.deadline import Deadline
from isolat.engine.behind import DEFAULT_MOST, Behind
from isolat.engine.handle import write_atomically
from isolat.engine.holding import Holding, Lent
from isolat.engine.journal import log
from isolat.engine.keepers import Keepers, quit_keeper
from isolat.engine.paths import StateRoot
from isolat.engine.warm import lowest_priority
from isolat.errors import InternalError, IsolatError, NotFound, StoreError
from isolat.layers.base import Descriptor, Source, TemplatePlan
from isolat.linux import cgroup
from isolat.places.base import Command, Facts
from isolat.places.link import Link
from isolat.places.steps import Cgroup, Step
from isolat.places.wired import WiredPlace
from isolat.qemu import machine
from isolat.trace import mark

RECORD = "template.json"
DISK = "disk.img"
KEPT_S = 3600
BASES_MOST = 4  # of those that know no image and that nobody asked for: each takes about 90 MiB
_REF_LEAST = 4
BOOT_S = 60.0
_FIND_S = 5.0
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_DISKS = (Source.DISK, Source.TEMPLATE_DISK)
_OVERHEAD_BYTES = 160 << 20  # of the QEMU that boots one: it loads kernel and initramfs and translates a whole boot


@dataclass(frozen=True)
class Template:
    """One template, as it is listed."""

    key: str
    memory_bytes: int
    cpus: int
    accel: str
    release: str
    created_ns: int
    used_bytes: int  # what its memory takes of this machine's
    disk_bytes: int = 0
    image: str = ""  # the digest, of one that has an image
    file: str = ""  # which file that is: what was read of another one must not be taken for it
    wanted: bool = False  # by somebody who asked for it: it goes only when somebody says so

    @property
    def id(self) -> str:
        return self.key[:16]


@dataclass
class _Open:
    template: Template
    link: Link
    memory: int
    state: int
    disk: Path

    def lent(self) -> Lent:
        """With the lock held: whoever removes it closes its descriptors, whose numbers are then somebody else's."""
        disk = os.open(self.disk, os.O_RDONLY | os.O_CLOEXEC)
        return os.dup(self.memory), os.dup(self.state), disk

    def close(self) -> None:
        os.close(self.memory)
        os.close(self.state)
        self.link.close()


class Templates:
    """All templates of one state root."""

    def __init__(
        self,
        paths: StateRoot,
        keepers: Keepers,
        facts: Facts,
        blanks: Path,
        uids: Callable[[], AbstractContextManager[int]],
        images_most: int = DEFAULT_MOST,
    ) -> None:
        """``uids``: the first uid of a range that nobody else has; ``images_most``: how many templates of images are
        kept."""
        self._dir = paths.root / "templates"
        self._cgroup = paths.cgroup
        self._keepers = keepers
        self._facts = facts
        self._holding = Holding(blanks, self.lend, _no_disk)
        self._uids = uids
        self._behind = Behind(self._remove_unused, images_most)
        self._bases = Behind(self._remove_unused, BASES_MOST, "bases")
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}
        self._open: dict[str, _Open] = {}

    def start(self) -> None:
        """Find those again that their keepers still hold; remove what is left of the others."""
        with contextlib.suppress(FileNotFoundError):
            for directory in sorted(self._dir.iterdir()):
                try:
                    found = self._find(directory)
                except (IsolatError, OSError, ValueError, KeyError, TypeError) as error:
                    log(f"the template {directory.name} is gone: {error}")
                    found = None
                if found is None:
                    self._discard(directory)
                else:
                    self._open[found.template.key] = found
                    self._used(found)

    def close(self) -> None:
        """Let go of them; their keepers go on for a while."""
        self._behind.close()
        self._bases.close()
        with self._lock:
            for one in self._open.values():
                one.close()
            self._open.clear()

    def all(self) -> list[Template]:
        with self._lock:
            return sorted((one.template for one in self._open.values()), key=lambda found: found.created_ns)

    def lend(self, plan: TemplatePlan, d: Deadline) -> Lent:
        """Its memory, its state and its disk, as duplicates that are the caller's. Makes it where there is none.

        Where there is none of the image yet, the one is lent that it is made from.
        """
        if plan.base is not None:
            lent = self._of_image(plan)
            if lent is not None:
                return lent
            plan = plan.base
        with self._lock:
            making = self._making.setdefault(plan.key, threading.Lock())
        with making:
            with self._lock:
                found = self._open.get(plan.key)
                if found is not None and not found.link.closed:
                    self._used(found)
                    return found.lent()
            if found is not None:
                self._lose(found)
            made = self._make(plan, d.sooner(BOOT_S))
            with self._lock:
                self._open[plan.key] = made
                self._used(made)
                return made.lent()

    def want(self, plan: TemplatePlan, d: Deadline) -> Template:
        """The same, and it stays until somebody removes it."""
        for fd in self.lend(plan, d):
            os.close(fd)
        with self._lock:
            found = self._open.get(plan.key)
            if found is None:
                raise NotFound("the template was removed while it was made")
            found.template = replace(found.template, wanted=True)
            write_atomically(found.disk.parent / RECORD, json.dumps(asdict(found.template)))
            return found.template

    def _used(self, found: _Open) -> None:
        """Somebody needs it now."""
        if found.template.image:
            self._behind.used(found.template.key)
        elif not found.template.wanted:
            self._bases.used(found.template.key)

    def _of_image(self, plan: TemplatePlan) -> Lent | None:
        with self._lock:
            found = self._open.get(plan.key)
            fit = found is not None and not found.link.closed and found.template.file == _file(plan)
            if found is not None and fit:
                base = self._open.get(plan.base.key) if plan.base else None
                for one in (found, *([base] if base else [])):  # it is made again from that one
                    self._used(one)
                return found.lent()
        if found is not None:
            self._remove_unused(plan.key)
        self._behind.want(plan.key, lambda: self._make_of_image(plan))
        return None

    def _make_of_image(self, plan: TemplatePlan) -> None:
        made = self._make(plan, Deadline(BOOT_S))
        with self._lock:
            self._open[plan.key] = made

    def _remove_unused(self, key: str) -> None:
        with self._lock:
            found = self._open.get(key)
            if found is None or found.template.wanted:
                return
            del self._open[key]
        log(f"a template that nobody has used for a while goes: {found.template.id}")
        self._end(found)

    def remove(self, ref: str) -> Template:
        """Remove the one whose key begins like this; clones of it go on. Raises NotFound."""
        with self._lock:
            keys = [key for key in self._open if len(ref) >= _REF_LEAST and key.startswith(ref)]
            if len(keys) != 1:
                raise NotFound(f"no template {ref}", hint="`isolat template ls` lists them")
            found = self._open.pop(keys[0])
        self._end(found)
        return found.template

    def prune(self) -> list[Template]:
        """Remove all. Machines that were cloned from them keep the memory that they use."""
        removed = []
        for template in self.all():
            with contextlib.suppress(NotFound):
                removed.append(self.remove(template.key))
        return removed

    # one template

    def _make(self, plan: TemplatePlan, d: Deadline) -> _Open:
        """Under a uid of its own: whoever has broken out of a machine could signal and trace what has the same one."""
        with self._uids() as uid:
            return self._make_as(uid, plan, d)

    def _make_as(self, uid: int, plan: TemplatePlan, d: Deadline) -> _Open:
        directory = self._dir / plan.key[:32]
        self._discard(directory)
        directory.mkdir(parents=True, mode=0o700)
        log(f"{'cloning' if plan.base else 'booting'} a template: {_described(plan)}")
        link = self._keepers.start(directory, f"template {plan.key[:16]}", d, idle_s=KEPT_S)
        if plan.base is not None:
            lowest_priority(link.pid)
        place = WiredPlace(lambda _: link, self._facts)
        steps = self._steps(plan)
        try:
            place.carry_out(steps, d)
            self._holding.provide(_placed(plan.descriptors, directory), plan.base, place, d)
            disks = {device: (name, read_only) for device, name, read_only in plan.disks}
            cloned = plan.base is not None
            machine.save(place, self._command(plan, uid), disks, plan.inside, d, exercise=plan.exercise, cloned=cloned)
            opened = self._opened(plan, place, link, directory, d)
            place.hold({machine.STATE: opened.state}, d)
            place.drop(
                (machine.MONITOR, f"{machine.MONITOR}-peer", machine.SAVED, *(name for name, _ in disks.values())), d
            )
            place.revert(steps, d)
            write_atomically(directory / RECORD, json.dumps(asdict(opened.template)))
        except BaseException:
            with contextlib.suppress(IsolatError):
                place.revert(steps, Deadline(_FIND_S))
            with contextlib.suppress(IsolatError):
                quit_keeper(link, Deadline(_FIND_S))
            shutil.rmtree(directory, ignore_errors=True)
            raise
        mark("template-made")
        return opened

    def _opened(self, plan: TemplatePlan, place: WiredPlace, link: Link, directory: Path, d: Deadline) -> _Open:
        """Its descriptors, sealed: from now on nobody can change what they hold, not even we."""
        memory, state = place.fetch("ram", d), place.fetch(machine.SAVED, d)
        try:
            for fd in (memory, state):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(memory)
            os.close(state)
            raise StoreError(f"a template's memory can't be sealed: {error.strerror}", stage="seal") from error
        used = os.fstat(memory).st_blocks * 512
        about = (
            plan.key,
            plan.memory_bytes,
            plan.cpus,
            plan.accel,
            plan.release,
            time.time_ns(),
            used,
            plan.disk_bytes,
            plan.image.digest if plan.image else "",
            _file(plan),
        )
        (directory / DISK).chmod(0o400)
        return _Open(Template(*about), link, memory, state, directory / DISK)

    def _group(self, plan: TemplatePlan) -> str:
        return f"{self._cgroup}/template-{plan.key[:16]}"

    def _steps(self, plan: TemplatePlan) -> tuple[Step, ...]:
        """A control group of its own: the pages that a boot touches first are charged to whoever boots."""
        facts = self._facts.cgroups
        paths = cgroup.directories(facts, self._group(plan), cgroup.PLAIN_V1)
        limit = plan.memory_bytes + _OVERHEAD_BYTES
        limits = cgroup.Limits(memory_bytes=limit, memory_swap_bytes=limit, pids=128)
        return (Cgroup(paths, cgroup.writes(facts, self._group(plan), limits)),) if paths else ()

    def _command(self, plan: TemplatePlan, uid: int) -> Command:
        facts = self._facts.cgroups
        return replace(plan.guest, user=f"{uid}:{uid}", cgroup_files=cgroup.join_files(facts, self._group(plan)))

    def _find(self, directory: Path) -> _Open | None:
        record = directory / RECORD
        if not record.exists() or not (directory / DISK).exists():
            return None
        template = Template(**json.loads(record.read_text(encoding="utf-8")))
        link = self._keepers.find(directory, f"template {template.id}", Deadline(_FIND_S))
        if link is None:
            return None
        place = WiredPlace(lambda _: link, self._facts)
        memory = place.fetch("ram", Deadline(_FIND_S))
        return _Open(template, link, memory, place.fetch("state", Deadline(_FIND_S)), directory / DISK)

    def _lose(self, found: _Open) -> None:
        log(f"the template {found.template.id} is lost: its keeper is gone")
        with self._lock:
            self._open.pop(found.template.key, None)
        found.close()

    def _end(self, found: _Open) -> None:
        with contextlib.suppress(IsolatError):
            quit_keeper(found.link, Deadline(_FIND_S))
        found.close()
        shutil.rmtree(self._dir / found.template.key[:32], ignore_errors=True)

    def _discard(self, directory: Path) -> None:
        """What is left of one: its keeper, if it lives, and its directory."""
        with contextlib.suppress(IsolatError, OSError):
            link = self._keepers.find(directory, directory.name, Deadline(_FIND_S))
            if link is not None:
                quit_keeper(link, Deadline(_FIND_S))
        shutil.rmtree(directory, ignore_errors=True)


def _placed(descriptors: tuple[Descriptor, ...], directory: Path) -> tuple[Descriptor, ...]:
    """A template's disk lies in its own directory, which its plan can't know."""
    return tuple(
        replace(descriptor, path=str(directory / DISK)) if descriptor.source in _DISKS else descriptor
        for descriptor in descriptors
    )


def _described(plan: TemplatePlan) -> str:
    of = f", image {plan.image.digest[:16]}" if plan.image else ""
    return f"{plan.memory_bytes >> 20} MiB, {plan.cpus} CPUs, {plan.accel}, Linux {plan.release}{of}"


def _file(plan: TemplatePlan) -> str:
    """Which file its image is now; empty without one."""
    if plan.image is None:
        return ""
    with contextlib.suppress(OSError):
        found = Path(plan.image.file).stat()
        return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"
    return "gone"


def _no_disk(wanted: Descriptor, _: Deadline) -> Path:
    raise InternalError(f"a template has the disk {wanted.path}")
