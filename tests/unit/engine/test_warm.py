"""The pool of machines made in advance: who gets one, what is made again, what goes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from isolat.engine import admission, warm
from isolat.engine.warm import WarmPool
from isolat.errors import StartFailed


class Made:
    """Counts what is made and undone; ``fail`` lets the next ones fail."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.undone: list[str] = []
        self.fail = False
        self.lock = threading.Lock()

    def make(self, kind: str = "a") -> Callable[[], Any]:
        def one() -> Any:
            if self.fail:
                raise StartFailed("no")
            return SimpleNamespace(id=f"{kind}{next(self.numbers)}")

        return one

    def undo(self, env: Any) -> None:
        with self.lock:
            self.undone.append(env.id)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(warm, "_PAUSE_S", 0.0)
    monkeypatch.setattr(admission, "memory_available_bytes", lambda: 1 << 40)
    return Made()


@pytest.fixture
def pool(made: Made) -> Iterator[WarmPool]:
    found = WarmPool(made.undo, 2)
    yield found
    found.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_first_gets_none_and_the_next_get_what_was_made_for_them(pool: WarmPool, made: Made) -> None:
    assert pool.take("k", made.make()) is None
    until(lambda: pool.count() == 2)
    given = [pool.take("k", made.make()) for _ in range(2)]
    assert [env.id for env in given if env] == ["a0", "a1"]
    until(lambda: pool.count() == 2)
    assert made.undone == []


def test_no_kind_gets_anothers(pool: WarmPool, made: Made) -> None:
    pool.take("a", made.make("a"))
    until(lambda: pool.count() == 2)
    assert pool.take("b", made.make("b")) is None
    until(lambda: pool.count() == 4)
    env = pool.take("b", made.make("b"))
    assert env is not None
    assert env.id.startswith("b")


def test_what_has_no_key_has_no_pool(pool: WarmPool, made: Made) -> None:
    assert pool.take("", made.make()) is None
    assert pool.count() == 0


def test_too_many_kinds_make_room(pool: WarmPool, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "KINDS_MOST", 2)
    for kind in "abc":
        pool.take(kind, made.make(kind))
        until(lambda kind=kind: any(env.id.startswith(kind) for k in pool._kinds.values() for env in k.ready))  # type: ignore[misc]
    until(lambda: any(id.startswith("a") for id in made.undone))
    assert pool.take("a", made.make("a")) is None


def test_closing_undoes_all_and_makes_no_more(made: Made) -> None:
    pool = WarmPool(made.undo, 2)
    pool.take("k", made.make())
    until(lambda: pool.count() == 2)
    pool.close()
    assert sorted(made.undone) == ["a0", "a1"]
    assert pool.take("k", made.make()) is None
    assert pool.count() == 0


def test_little_memory_makes_none(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "memory_available_bytes", lambda: 1 << 30)
    pool = WarmPool(made.undo, 2)
    pool.take("k", made.make())
    time.sleep(0.1)
    assert pool.count() == 0
    pool.close()


def test_a_failure_harms_nobody(pool: WarmPool, made: Made) -> None:
    made.fail = True
    pool.take("k", made.make())
    time.sleep(0.1)
    made.fail = False
    pool.take("other", made.make("o"))
    until(lambda: pool.count() == 2)
