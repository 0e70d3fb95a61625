"""The image store while several change it at once: nobody hangs, and what somebody stands on stays."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolat.engine import upkeep
from isolat.engine.maker import Maker
from isolat.errors import Conflict, NotFound, StoreError
from isolat.images import store as store_module
from isolat.images.image import Image
from isolat.images.store import ImageStore
from tests.support.archives import docker_members, layer, load, tar

pytestmark = pytest.mark.root
_JOIN_S = 30.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    opened = ImageStore(tmp_path / "state")
    yield opened
    opened.unmount_all()


def image(store: ImageStore, text: str, *names: str) -> Image:
    return load(store, tar(docker_members([layer(text)], names)))[0][0]


def in_threads(*works: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_JOIN_S)
    assert not any(thread.is_alive() for thread in threads)


def is_locked(store: ImageStore) -> bool:
    descriptor = os.open(store.dir / "lock", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def test_removing_and_mounting_at_once_ends(store: ImageStore) -> None:
    digests = [image(store, f"{at}", f"n{at}").digest for at in range(20)]

    def mount() -> None:
        for _ in range(3):
            for digest in digests:
                try:
                    store.mount(digest)
                except NotFound:
                    continue

    def remove(from_: int) -> None:
        for at in range(from_, len(digests), 2):
            store.remove(f"n{at}")

    in_threads(mount, mount, lambda: remove(0), lambda: remove(1))
    assert store.list() == [] and store.names() == ()
    assert not [path for path in store.mounts_dir.iterdir() if os.path.ismount(path)]


@pytest.mark.parametrize("who", ["a thread", "another process"])
def test_a_lock_that_nobody_gives_back_is_an_error(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    monkeypatch.setattr(store_module, "_LOCK_S", 0.1)
    held = store if who == "a thread" else ImageStore(store.root)
    found: list[str] = []

    def mount() -> None:
        with pytest.raises(StoreError) as caught:
            store.mount("0" * 64)
        found.append(caught.value.stage)

    with held._lock():
        in_threads(mount)
    assert found == ["lock"]


def test_who_stands_on_an_image_is_asked_under_the_lock(store: ImageStore) -> None:
    one = image(store, "one", "one")
    asked: list[bool] = []

    def in_use() -> set[str]:
        asked.append(is_locked(store))
        return {one.digest}

    with pytest.raises(Conflict):
        store.remove("one", in_use)
    assert asked == [True] and store.resolve("one").digest == one.digest


def test_an_image_that_goes_while_an_environment_is_made_is_asked_for_again(store: ImageStore) -> None:
    first, second = image(store, "first", "name"), image(store, "second", "other")
    said: list[str] = []

    def making(_: str, digest: str) -> None:
        if not said:  # somebody had asked who stands on it before this was said
            store.remove("name")
            store.tag(second.digest, ["name"])
        said.append(digest)

    maker = cast(Any, Maker.__new__(Maker))
    maker._images, maker._table = store, SimpleNamespace(making=making)
    assert maker.image("id", "name", True).digest == second.digest
    assert said == [first.digest, second.digest]


def test_an_image_that_gets_a_name_is_not_pruned(store: ImageStore) -> None:
    one = image(store, "one")

    def remove_nameless(digest: str) -> None:
        store.tag(digest, ["kept"])
        store.remove_nameless(digest)

    engine = SimpleNamespace(
        images=store,
        in_use=set,
        remove_nameless=remove_nameless,
        puller=SimpleNamespace(kept=SimpleNamespace(sweep=lambda _: 0)),
    )
    upkeep.prune_images(cast(Any, engine), False, lambda *_: pytest.fail("it was pruned"))
    assert store.resolve("kept").digest == one.digest


def test_a_name_that_comes_while_its_image_goes_goes_with_it(store: ImageStore) -> None:
    one = image(store, "one", "a")
    with store._lock():
        thread = threading.Thread(target=store.remove, args=(one.digest,), daemon=True)
        thread.start()
        thread.join(0.2)
        store._write_names({**store._names(), "b:latest": one.digest})
    thread.join(_JOIN_S)
    assert store.names() == () and store.list() == []


def test_a_name_of_nothing_can_be_taken_away(store: ImageStore) -> None:
    with store._lock():
        store._write_names({"b:latest": "0" * 64})
    with pytest.raises(NotFound):
        store.resolve("b")
    store.remove("b")
    assert store.names() == ()
    with pytest.raises(NotFound):
        store.remove("b")


def test_what_has_gone_gets_no_name(store: ImageStore) -> None:
    one = image(store, "one", "a")
    store.remove("a")
    with pytest.raises(NotFound):
        store.tag(one.digest, ["b"])
    assert store.names() == ()
