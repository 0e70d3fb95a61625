"""What can't be held, or not be given to a child, changes nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.unit.native.wireside import Controller, Held, Refused

from isolat.wire import kinds as k

HELD_MAX = 32
CHILD_MAX = 12  # of held descriptors: the child's 4 to 15


@pytest.fixture
def files() -> Iterator[list[int]]:
    made = [os.memfd_create(f"m{i}") for i in range(HELD_MAX + 1)]
    for i, fd in enumerate(made):
        os.write(fd, f"file {i}\n".encode())
    yield made
    for fd in made:
        os.close(fd)


def hold(c: Controller, names: Sequence[str], fds: Sequence[int]) -> None:
    c.ask(k.HOLD, [(k.T_KEY, name) for name in names], fds)


def descriptors(keeper: Held) -> int:
    keeper.c.hello()  # so that it has done what was asked before
    return len(list(Path(f"/proc/{keeper.pid}/fd").iterdir()))


def test_all_or_nothing(keeper: Held, files: list[int]) -> None:
    c = keeper.c
    for i in range(HELD_MAX - 1):
        hold(c, [f"n{i}"], [files[i]])
    before = descriptors(keeper)
    with pytest.raises(Refused) as info:
        hold(c, ["n0", "x", "y"], files[4:7])
    assert (info.value.stage, info.value.errno) == ("key", errno.ENOSPC)
    assert descriptors(keeper) == before
    with pytest.raises(Refused):
        c.ask(k.FETCH, [(k.T_KEY, "x")])
    c.ask(k.FETCH, [(k.T_KEY, "n0")])
    assert os.path.sameopenfile(c.fds[-1], files[0])


@pytest.mark.parametrize("names", [[], [""], ["x" * 32], ["ok", ""], ["a", "a"]])
def test_names_that_are_none(keeper: Held, files: list[int], names: Sequence[str]) -> None:
    before = descriptors(keeper)
    with pytest.raises(Refused) as info:
        hold(keeper.c, names, files[: len(names)])
    assert info.value.errno == errno.EINVAL
    assert descriptors(keeper) == before
    hold(keeper.c, ["x" * 31], files[:1])
    keeper.c.ask(k.FETCH, [(k.T_KEY, "x" * 31)])


@pytest.mark.parametrize("count", [1, CHILD_MAX])
def test_a_failure_is_told_whatever_a_child_was_to_get(c: Controller, files: list[int], count: int) -> None:
    """Its report travels on a descriptor too, which none of these may take the place of."""
    for i in range(count):
        hold(c, [f"n{i}"], [files[i]])
    for argv, code in ((["/nowhere/isolat/x"], 127), (["/etc"], 126)):
        with pytest.raises(Refused) as info:
            c.spawn("p", argv, more=[(k.T_HELD, f"n{i % count}") for i in range(CHILD_MAX)])
        assert (info.value.stage, info.value.code) == ("exec", code)
    assert [os.pread(fd, 99, 0) for fd in files] == [f"file {i}\n".encode() for i in range(len(files))]


def test_a_child_has_no_more_than_it_is_to_have(c: Controller, files: list[int]) -> None:
    for i in range(CHILD_MAX):
        hold(c, [f"n{i}"], [files[i]])
    last = "import os; print([n for n in range(99) if os.path.exists(f'/proc/self/fd/{n}')], os.pread(15, 99, 0))"
    result = c.run("p", ["/usr/bin/python3", "-IS", "-c", last], more=[(k.T_HELD, f"n{i}") for i in range(CHILD_MAX)])
    assert result.stdout.decode() == f"{[0, 1, 2, *range(4, 4 + CHILD_MAX)]} {b'file 11' + bytes([10])!r}\n"
    with pytest.raises(Refused, match="at most 12") as info:
        c.spawn("p2", ["true"], more=[(k.T_HELD, "n0")] * (CHILD_MAX + 1))
    assert info.value.stage == "held"
