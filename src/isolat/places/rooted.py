"""A place seen with another root and in a control group: what the inside of the host layer is.

It keeps nothing in, and says so: paths are joined to the new root as text, so that an absolute symbolic link in it
leads to the place around.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from isolat.deadline import Deadline
from isolat.errors import Unsupported
from isolat.places.base import CgroupFacts, CgroupMode, Command, Exit, Facts, Identity, Io, Place, Proc, Starting
from isolat.places.steps import MakeDir, PutFile, Step


class RootedPlace:
    """``place`` with every path below ``root``; started processes join through ``cgroup_files``."""

    def __init__(self, place: Place, root: str, cgroup_files: tuple[str, ...] = ()) -> None:
        self._place = place
        self._root = root
        self._cgroup_files = cgroup_files

    @property
    def facts(self) -> Facts:
        """The same kernel; what the tools and features of the new root are, nobody looked."""
        return replace(self._place.facts, cgroups=CgroupFacts(CgroupMode.NONE), tools=(), features=(), root=False)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path.lstrip('/')}"

    def _moved(self, steps: Sequence[Step]) -> list[Step]:
        moved: list[Step] = []
        for step in steps:
            if not isinstance(step, (MakeDir, PutFile)):
                raise Unsupported(f"the inside of the host layer can't do this: {step.describe()}")
            moved.append(replace(step, path=self._at(step.path)))
        return moved

    def carry_out(self, steps: Sequence[Step], d: Deadline, descriptors: Sequence[int] = ()) -> None:
        self._place.carry_out(self._moved(steps), d, descriptors)

    def revert(self, steps: Sequence[Step], d: Deadline) -> None:
        self._place.revert(self._moved(steps), d)

    def spawn(self, key: str, cmd: Command, io: Io, d: Deadline) -> Proc:
        return self._place.spawn(key, replace(cmd, root=self._root, cgroup_files=self._cgroup_files), io, d)

    def begin(self, key: str, cmd: Command, io: Io, d: Deadline) -> Starting:
        return self._place.begin(key, replace(cmd, root=self._root, cgroup_files=self._cgroup_files), io, d)

    def hold(self, descriptors: Mapping[str, int], d: Deadline) -> None:
        self._place.hold(descriptors, d)

    def fetch(self, name: str, d: Deadline) -> int:
        return self._place.fetch(name, d)

    def drop(self, names: Sequence[str], d: Deadline) -> None:
        self._place.drop(names, d)

    def resume(self, identity: Identity, d: Deadline) -> None:
        self._place.resume(identity, d)

    def settle(self, d: Deadline, *, keep_cache: bool = False) -> None:
        self._place.settle(d, keep_cache=keep_cache)

    def hush(self, d: Deadline) -> None:
        self._place.hush(d)

    def speak(self, d: Deadline) -> None:
        self._place.speak(d)

    def adopt(self, key: str, client: int, stdin: bool, d: Deadline) -> None:
        self._place.adopt(key, client, stdin, d)

    def procs(self, prefix: str, d: Deadline) -> list[Proc]:
        return self._place.procs(prefix, d)

    def wait(self, key: str, d: Deadline) -> Exit:
        return self._place.wait(key, d)

    def signal(self, key: str, n: int, d: Deadline, *, everything: bool = False) -> None:
        self._place.signal(key, n, d, everything=everything)

    def resize(self, key: str, rows: int, cols: int, d: Deadline) -> None:
        self._place.resize(key, rows, cols, d)

    def forget(self, key: str, d: Deadline) -> None:
        self._place.forget(key, d)

    def put(self, path: str, source: int, d: Deadline, mode: int = 0o644) -> None:
        self._place.put(self._at(path), source, d, mode)

    def get(self, path: str, target: int, most_bytes: int, d: Deadline) -> None:
        self._place.get(self._at(path), target, most_bytes, d)

    def inside(self, key: str, facts: Facts) -> Place:
        return self._place.inside(key, facts)
