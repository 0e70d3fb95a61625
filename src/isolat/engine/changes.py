"""What an environment has changed of its image: told (`diff`), and kept as a new image (`commit`).

Both read the overlay's upper directory, which lies on this machine for containers and plain processes; a machine's lies
on its own disk, so it is refused. Every name is looked up in its directory's descriptor and never followed: whoever
wrote these directories may have put links anywhere.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isolat.deadline import Deadline
from isolat.engine import states
from isolat.engine.environment import Environment
from isolat.engine.states import Verb
from isolat.errors import StoreError, Unsupported
from isolat.images import authoring
from isolat.images.flatten.pack import pack
from isolat.images.image import Image
from isolat.images.progress import Progress
from isolat.layers import registry
from isolat.linux import cgroup
from isolat.places.base import CgroupMode

if TYPE_CHECKING:
    from isolat.engine.engine import Engine

OURS = ("etc/hostname", "etc/hosts", "etc/resolv.conf")  # what Isolat itself puts there (layers/container.py)
_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")
_FREEZE_S = 10.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Wanted:
    """What `commit` is asked for. ``pause``: everything inside stands still meanwhile."""

    names: tuple[str, ...] = ()
    message: str = ""
    author: str = ""
    change: tuple[str, ...] = ()
    pause: bool = True


def diff(engine: Engine, env: Environment) -> list[tuple[str, str]]:
    """(A, C or D, path) as Docker's `diff` tells it, in the order of the paths."""
    states.check(Verb.DIFF, env.state, env.name)
    upper = _upper(env)
    lower = engine.images.mount(env.handle.digest)
    with contextlib.ExitStack() as stack:
        above = os.open(upper, _DIRECTORY)
        stack.callback(os.close, above)
        below = os.open(lower, _DIRECTORY)
        stack.callback(os.close, below)
        found = list(_differences(above, below, ""))
    return sorted((one for one in found if one[1].lstrip("/") not in OURS), key=lambda one: one[1])


def commit(engine: Engine, env: Environment, wanted: Wanted, progress: Progress) -> Image:
    """The environment's image with one more layer. Raises Unsupported, UsageError, and what the store raises."""
    states.check(Verb.COMMIT, env.state, env.name)
    upper = _upper(env)
    base = engine.images.resolve(env.handle.digest)
    shift = engine.uid_base(env.handle.uid_index) if _own_uids(env) else 0
    main = env.handle.frames[-1].main
    step = authoring.Step(
        created_by=shlex.join(main.argv) if main else "",
        created=authoring.now(),
        author=wanted.author,
        comment=wanted.message,
    )
    with env.operation("committing"), engine.images.build() as build:
        progress(f"reading what {env.name} has changed", 0, 0)
        with _standing_still(engine, env) if wanted.pause and env.state.alive else contextlib.nullcontext():
            layer = authoring.make_layer(build, lambda out: pack(upper, out, uid_shift=shift, overlay=True, skip=OURS))
        image = authoring.derive(
            engine.images, build, base, layer, step, wanted.names, change=wanted.change, progress=progress
        )
    engine.table.publish("commit", env, image=image.digest)
    return image


def _upper(env: Environment) -> Path:
    """Raises Unsupported where the changes are not on this machine."""
    layers = (frame.layer for frame in env.handle.frames)
    machine = next((name for name in layers if registry.LAYERS[name].capabilities.machine), "")
    if machine or env.handle.around is not None:
        raise Unsupported(
            f"what {env.name} has changed lies on the disk of a machine ({machine or 'the one that it is in'})",
            hint="a snapshot keeps it: isolat snapshot; or do the same in a container, and commit that",
        )
    upper = Path(env.handle.upper or env.directory / "upper") / "u"
    if not upper.is_dir() or not env.handle.digest:
        raise Unsupported(f"{env.name} has nothing that could be looked at: it was not made of an image, or has gone")
    return upper


def _own_uids(env: Environment) -> bool:
    return any(registry.LAYERS[frame.layer].capabilities.own_uids for frame in env.handle.frames)


# standing still


@contextlib.contextmanager
def _standing_still(engine: Engine, env: Environment) -> Iterator[None]:
    """Freeze its control group (freezer-subsystem.rst; cgroup-v2.rst, cgroup.freeze). Raises StoreError."""
    file, on, off, told = _freezer(engine, env)
    if file is None:
        yield
        return
    try:
        file.write_text(on)
        d = Deadline(_FREEZE_S)
        while told not in file.with_name(_state_file(file)).read_text():
            if d.passed:
                raise StoreError(
                    f"{env.name} does not stand still",
                    stage="commit",
                    hint="isolat commit --pause=false takes it as it is",
                )
            time.sleep(0.01)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            file.write_text(off)


def _freezer(engine: Engine, env: Environment) -> tuple[Path | None, str, str, str]:
    facts = engine.facts.cgroups
    path = f"{engine.paths.cgroup}/{env.id}"
    if facts.mode is CgroupMode.V2:
        (directory,) = cgroup.directories(facts, path)
        return Path(directory) / "cgroup.freeze", "1", "0", "frozen 1"
    for directory in cgroup.directories(facts, path, ("freezer",)):
        if (Path(directory) / "freezer.state").exists():
            return Path(directory) / "freezer.state", "FROZEN", "THAWED", "FROZEN"
    return None, "", "", ""


def _state_file(file: Path) -> str:
    return "cgroup.events" if file.name == "cgroup.freeze" else file.name


# what differs


def _differences(above: int, below: int | None, prefix: str) -> Iterator[tuple[str, str]]:
    for name in sorted(os.listdir(above)):
        found = os.lstat(name, dir_fd=above)
        before = _found(below, name)
        path = f"{prefix}/{name}"
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
            if before is not None:
                yield "D", path
            continue
        yield ("A" if before is None else "C"), path
        if stat.S_ISDIR(found.st_mode):
            yield from _inside(above, below, name, path, before)


def _inside(
    above: int, below: int | None, name: str, path: str, before: os.stat_result | None
) -> Iterator[tuple[str, str]]:
    with contextlib.ExitStack() as stack:
        inner = os.open(name, _DIRECTORY, dir_fd=above)
        stack.callback(os.close, inner)
        lower = None
        if below is not None and before is not None and stat.S_ISDIR(before.st_mode):
            lower = os.open(name, _DIRECTORY, dir_fd=below)
            stack.callback(os.close, lower)
        if lower is not None and _is_opaque(inner):
            yield from (("D", f"{path}/{gone}") for gone in _gone(inner, lower))
        yield from _differences(inner, lower, path)


def _found(directory: int | None, name: str) -> os.stat_result | None:
    if directory is not None:
        with contextlib.suppress(FileNotFoundError):
            return os.lstat(name, dir_fd=directory)
    return None


def _gone(above: int, below: int) -> Collection[str]:
    """What a directory that was made anew has not any more."""
    return sorted(set(os.listdir(below)) - set(os.listdir(above)))


def _is_opaque(directory: int) -> bool:
    for name in _OPAQUE:
        with contextlib.suppress(OSError):
            if os.getxattr(directory, name) == b"y":
                return True
    return False


def lines(found: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """The form that the daemon's interface has."""
    return [{"kind": kind, "path": path} for kind, path in found]
