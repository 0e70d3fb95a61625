"""Templates of images are made behind whoever asked: once, when nobody waits, a few of them, and they go again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from isolat import checkpoint
from isolat.engine import admission, behind
from isolat.engine.behind import Behind
from isolat.errors import StartFailed


class Made:
    """What is there; ``fail`` lets the next ones fail."""

    def __init__(self) -> None:
        self.there: list[str] = []
        self.tried = 0
        self.fail = False
        self.lock = threading.Lock()

    def make(self, key: str) -> Callable[[], None]:
        def one() -> None:
            self.tried += 1
            if self.fail:
                raise StartFailed("no")
            with self.lock:
                self.there.append(key)

        return one

    def remove(self, key: str) -> None:
        with self.lock:
            self.there = [other for other in self.there if other != key]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(behind, "_PAUSE_S", 0.0)
    monkeypatch.setattr(admission, "memory_available_bytes", lambda: 1 << 40)
    return Made()


@pytest.fixture
def maker(made: Made) -> Iterator[Behind]:
    found = Behind(made.remove, 2)
    yield found
    found.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_it_is_made_once(maker: Behind, made: Made) -> None:
    maker.want("a", made.make("a"))
    until(lambda: made.there == ["a"])
    for _ in range(3):
        maker.used("a")
    time.sleep(0.05)
    assert made.there == ["a"]


def test_who_asks_first_goes_first_and_who_asks_again_does_not_put_it_off(
    maker: Behind, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "_PAUSE_S", 0.2)
    began = time.monotonic()
    while not made.there:
        maker.want("a", made.make("a"))
        time.sleep(0.02)
        assert time.monotonic() < began + 5
    assert time.monotonic() - began >= 0.2


def test_the_one_that_was_not_asked_for_the_longest_makes_room(maker: Behind, made: Made) -> None:
    for key in "ab":
        maker.want(key, made.make(key))
        until(lambda key=key: key in made.there)  # type: ignore[misc]
    maker.used("a")
    maker.want("c", made.make("c"))
    until(lambda: sorted(made.there) == ["a", "c"])


def test_one_that_nobody_needs_any_more_goes(maker: Behind, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    maker.want("a", made.make("a"))
    until(lambda: made.there == ["a"])
    monkeypatch.setattr(behind, "UNUSED_S", 0.0)
    maker.want("b", made.make("b"))
    until(lambda: made.there == [])


def test_little_memory_makes_none(maker: Behind, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "memory_available_bytes", lambda: 1 << 20)
    maker.want("a", made.make("a"))
    time.sleep(0.1)
    assert made.tried == 0


def test_those_that_nobody_needs_just_now_go_when_memory_gets_scarce(
    maker: Behind, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker.want("a", made.make("a"))
    until(lambda: made.there == ["a"])
    monkeypatch.setattr(behind, "SCARCE_UNUSED_S", 0.1)
    time.sleep(0.2)
    maker.used("b")
    time.sleep(0.05)
    assert made.there == ["a"]
    monkeypatch.setattr(admission, "memory_available_bytes", lambda: 1 << 20)
    maker.used("b")
    until(lambda: made.there == [])


def test_what_it_did_not_expect_is_a_failure_like_any_other(
    maker: Behind, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ValueError("no")

    maker.want("a", broken)
    maker.want("b", made.make("b"))
    until(lambda: made.there == ["b"])


def test_a_failure_is_not_tried_at_once_again(maker: Behind, made: Made) -> None:
    made.fail = True
    maker.want("a", made.make("a"))
    until(lambda: made.tried == 1)
    maker.want("a", made.make("a"))
    time.sleep(0.1)
    assert made.tried == 1


def test_closing_leaves_what_is_there_and_makes_no_more(maker: Behind, made: Made) -> None:
    maker.want("a", made.make("a"))
    until(lambda: made.there == ["a"])
    maker.close()
    maker.want("b", made.make("b"))
    time.sleep(0.05)
    assert made.there == ["a"]


def test_none_are_made_where_none_are_wanted_or_somebody_counts(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    none = Behind(made.remove, 0)
    none.want("a", made.make("a"))
    monkeypatch.setattr(checkpoint, "_left", 1)
    counted = Behind(made.remove, 2)
    counted.want("a", made.make("a"))
    time.sleep(0.05)
    assert made.tried == 0
