"""Which templates stay: a few of those that were used, and all that somebody asked for."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolat.deadline import Deadline
from isolat.engine import templates
from isolat.engine.paths import StateRoot
from isolat.engine.templates import Template, Templates
from isolat.errors import NotFound
from isolat.layers.base import TemplatePlan
from isolat.places.base import Command


def plan(key: str) -> TemplatePlan:
    return TemplatePlan(key * 64, Command(("true",), user="7:7"), (), 1 << 20, 1, "tcg", "6.1")


class Fake(Templates):
    """No machine is booted: its template is a few empty files. ``as_whom`` tells under which uid each was made."""

    as_whom: list[int]

    def _make_as(self, uid: int, plan: TemplatePlan, d: Deadline) -> Any:
        self.as_whom.append(uid)
        directory = self._dir / plan.key[:32]
        directory.mkdir(parents=True)
        disk = directory / templates.DISK
        disk.write_text("disk")
        link = SimpleNamespace(closed=False, close=lambda: None)
        template = Template(plan.key, plan.memory_bytes, 1, "tcg", "6.1", time.time_ns(), 0)
        return templates._Open(template, cast(Any, link), os.memfd_create("m"), os.memfd_create("s"), disk)

    def _end(self, found: Any) -> None:
        found.close()
        shutil.rmtree(found.disk.parent)


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Fake]:
    @contextlib.contextmanager
    def uids() -> Iterator[int]:
        yield 4711

    found = Fake(StateRoot(tmp_path), cast(Any, None), cast(Any, None), tmp_path, uids)
    found.as_whom = []
    yield found
    found.close()


def use(there: Fake, key: str) -> tuple[int, int, int]:
    return there.lend(plan(key), Deadline(5))


def keys(there: Fake) -> str:
    return "".join(sorted(found.key[0] for found in there.all()))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_one_that_was_not_used_the_longest_goes(there: Fake) -> None:
    lent = [use(there, key) for key in "abcd"]
    lent.append(use(there, "a"))
    lent.append(use(there, "e"))
    until(lambda: keys(there) == "acde")
    assert os.pread(lent[1][2], 4, 0) == b"disk"  # who has been lent it can go on
    for fds in lent:
        for fd in fds:
            os.close(fd)


def test_one_that_was_asked_for_stays_and_says_so_on_disk(there: Fake) -> None:
    found = there.want(plan("a"), Deadline(5))
    assert found.wanted
    assert '"wanted": true' in (there._dir / found.key[:32] / templates.RECORD).read_text()
    for key in "bcdef":
        for fd in use(there, key):
            os.close(fd)
    until(lambda: keys(there) == "acdef")
    assert there.remove(found.id).key == found.key


def test_it_is_made_under_a_uid_of_its_own(there: Fake) -> None:
    for fd in use(there, "a"):
        os.close(fd)
    assert there.as_whom == [4711]


def test_one_letter_names_no_template(there: Fake) -> None:
    for fd in use(there, "a"):
        os.close(fd)
    with pytest.raises(NotFound):
        there.remove("a")
    assert there.remove("aaaa").key[0] == "a"
