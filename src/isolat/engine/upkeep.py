"""What a state root takes of the disk, what of it can go, and whether all of it is as it should be."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolat.engine.environment import Environment
from isolat.errors import Conflict, IsolatError, NotFound
from isolat.images import check as image_check
from isolat.images.progress import Progress, no_progress
from isolat.linux import btrfs

if TYPE_CHECKING:
    from isolat.engine.engine import Engine

Told = Callable[[str, str, int], None]  # kind, name, bytes that are free again


@dataclass(frozen=True)
class Usage:
    """One kind of thing: how many there are, how many are in use, and what they take, in bytes."""

    kind: str
    total: int
    active: int
    size_bytes: int
    reclaimable_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def usage(engine: Engine) -> list[Usage]:
    """A row for each kind. Files are counted by their blocks, subvolumes by what the kernel counts for them."""
    return [
        _images(engine),
        _environments(engine),
        _volumes(engine),
        _snapshots(engine),
        _templates(engine),
        _builds(engine),
    ]


def _images(engine: Engine) -> Usage:
    images, used = engine.images.list(), engine.in_use()
    free = sum(engine.images.bytes_of(image) for image in images if image.digest not in used)
    size, kept = engine.images.used_bytes, engine.puller.kept.used_bytes
    active = sum(image.digest in used for image in images)
    return Usage("images", len(images), active, size + kept, min(free, size) + kept)


def _environments(engine: Engine) -> Usage:
    environments = engine.environments()
    sizes = {env.id: environment_bytes(engine, env) for env in environments}
    free = sum(sizes[env.id] for env in environments if not env.state.alive)
    alive = sum(env.state.alive for env in environments)
    return Usage("environments", len(environments), alive, sum(sizes.values()), free)


def _volumes(engine: Engine) -> Usage:
    sizes, unused = engine.volumes.usage(), engine.volumes.unused()
    free = sum(sizes.get(volume.name, 0) for volume in unused)
    return Usage("volumes", len(sizes), max(0, len(sizes) - len(unused)), sum(sizes.values()), free)


def _snapshots(engine: Engine) -> Usage:
    found = engine.snapshots.all()
    size = sum(one.used_bytes for one in found)
    return Usage("snapshots", len(found), 0, size, 0)  # somebody made each of them on purpose


def _templates(engine: Engine) -> Usage:
    size = _blocks(engine.paths.root / "templates")
    return Usage("templates", len(engine.templates.all()), 0, size, size)


def _builds(engine: Engine) -> Usage:
    size = engine.builder.storage.usage_bytes()
    return Usage("builds", int(size > 0), engine.builder.alive_count, size, size)


def environment_bytes(engine: Engine, env: Environment) -> int:
    """Its directory (logs, a machine's disk) and what it has written to its root file system."""
    size = _blocks(env.directory)
    if env.handle.upper:
        with contextlib.suppress(OSError):  # it has just gone, or was never made
            size += btrfs.used_bytes(env.handle.upper)
    return size


def _blocks(directory: Path) -> int:
    """What the files below take of the disk; mounts and what goes meanwhile do not count."""
    size = 0
    stack = [os.fspath(directory)]
    while stack:
        try:
            with os.scandir(stack.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if not os.path.ismount(entry.path):
                            stack.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue
    return size


# what can go


def prune_environments(engine: Engine, told: Told) -> None:
    """Remove those that have ended."""
    for env in engine.environments():
        if env.state.alive:
            continue
        size = environment_bytes(engine, env)
        try:
            engine.remove(env.id, force=False)
        except (NotFound, Conflict):
            continue  # somebody else was quicker, or holds it
        told("environment", env.name, size)


def prune_images(engine: Engine, named: bool, told: Told) -> None:
    """Remove the images that nothing stands on: those without a name, with ``named`` all of them."""
    remove = engine.remove_image if named else engine.remove_nameless
    for image in engine.images.unused(engine.in_use(), named):
        before = engine.images.used_bytes
        try:
            remove(image.digest)
        except (NotFound, Conflict):
            continue
        told("image", image.names[0] if image.names else image.digest[:12], max(0, before - engine.images.used_bytes))
    freed = engine.puller.kept.sweep(0)
    if freed:
        told("blobs of unfinished pulls", "", freed)


def prune_templates(engine: Engine, told: Told) -> None:
    before = _blocks(engine.paths.root / "templates")
    for template in engine.prune_templates():
        told("template", template.id, 0)
    after = _blocks(engine.paths.root / "templates")
    if before > after:
        told("templates' files", "", before - after)


def prune_builds(engine: Engine, told: Told) -> None:
    """Remove what builds keep to be quick."""
    freed = engine.builder.storage.prune()
    if freed:
        told("cache of builds", "", freed)


def prune_volumes(engine: Engine, told: Told) -> None:
    """Remove those that nobody uses, with all that is in them."""
    for volume, size in engine.volumes.prune():
        told("volume", volume.name, size)


# whether all is well


def check(engine: Engine, *, deep: bool = False, progress: Progress = no_progress) -> list[str]:
    """What is wrong with this state root, a line each; nothing when all is well. Changes nothing."""
    return [
        *image_check.check(engine.images, deep=deep, progress=progress),
        *(f"environment {env.name}: {problem}" for env in engine.environments() for problem in _of(engine, env)),
        *_snapshot_problems(engine),
        *engine.volumes.check(),
    ]


def _of(engine: Engine, env: Environment) -> Iterator[str]:
    digest = env.handle.digest
    if digest and engine.images.find(digest) is None:
        yield f"its image {digest[:12]} is not there"
    upper = env.handle.upper
    if env.state.alive and upper and engine.pool.mounted and not btrfs.is_subvolume(upper):
        yield f"its writable part is not there: {upper}"
    if env.state.alive and (env.link is None or env.link.closed):
        yield "its keeper is gone, and that is not settled yet"


def _snapshot_problems(engine: Engine) -> Iterator[str]:
    for one in engine.snapshots.all():
        try:
            if engine.images.find(one.handle.digest) is None:
                yield f"snapshot {one.name}: its image {one.handle.digest[:12]} is not there"
        except IsolatError as error:
            yield f"snapshot {one.name}: {error.message}"
