"""Who may have which named volume, decided from handles; without a pool, in which they would be."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from isolat.engine.handle import Handle, write_handle
from isolat.engine.paths import StateRoot
from isolat.engine.volumes import User, Volumes, unread_users, users_of
from isolat.errors import Conflict, NotFound, Refused, StoreError, Unsupported, UsageError
from isolat.images.pool import Pool
from isolat.layers.base import Frame, State
from isolat.linux import btrfs
from isolat.spec.model import Volume
from isolat.volumes import record

HANDLE = Handle(
    id="0123456789abcdef", name="web", image="debian", digest="d" * 64,
    spec={"image": "debian", "volumes": ["data:/data", "/src:/src", {"type": "volume", "source": "x", "target": "/x"}]},
    frames=(Frame("container", (), True, "guest/main"),), state=State.RUNNING, created_ns=1, boot_id="b", uid_index=0,
)  # fmt: skip
RW, RO = (Volume("data", "/data"),), (Volume("data", "/data", read_only=True),)


class FakePool:
    """Directories in place of subvolumes."""

    def __init__(self, root: Path) -> None:
        self.volumes = root / "pool" / "volumes"
        self.reason = ""
        self.mounted = True

    def ensure(self) -> bool:
        self.volumes.parent.mkdir(exist_ok=True)
        return not self.reason

    def exists(self) -> bool:
        return self.mounted


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePool:
    def destroy(parent: str, name: str) -> None:
        path = Path(parent, name)
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()

    monkeypatch.setattr(btrfs, "create", lambda parent, name: Path(parent, name).mkdir())
    monkeypatch.setattr(btrfs, "destroy_whole", destroy)
    monkeypatch.setattr(btrfs, "set_limit", lambda path, size: None)
    monkeypatch.setattr(btrfs, "is_subvolume", lambda path: Path(path).is_dir())
    return FakePool(tmp_path)


class Around:
    """Volumes, and who is said to use them."""

    def __init__(self, root: Path, pool: FakePool) -> None:
        self.users: list[User] = []
        self.volumes = Volumes(StateRoot(root), cast(Pool, pool), lambda: self.users)

    def use(self, name: str, state: State = State.RUNNING, *, read_only: bool = False, copies: bool = False) -> None:
        self.users.append(User(name, "environment", "1" * 16, "web", str(state), read_only, copies))


@pytest.fixture
def around(tmp_path: Path, pool: FakePool) -> Around:
    return Around(tmp_path, pool)


def test_users_are_read_from_a_handle() -> None:
    found = list(users_of(HANDLE))
    assert [(user.volume, user.read_only, user.copies, user.alive) for user in found] == [
        ("data", False, False, True),
        ("x", False, False, True),
    ]
    machine = HANDLE.with_(frames=(Frame("microvm", (), True, "guest/main"),), state=State.EXITED)
    assert [(user.copies, user.alive) for user in users_of(machine)] == [(True, False)] * 2
    kept = list(users_of(machine, "before"))
    assert (kept[0].kind, kept[0].name, kept[0].alive) == ("snapshot", "before", False)


def test_users_are_read_from_a_handle_that_is_damaged(tmp_path: Path) -> None:
    assert unread_users(tmp_path) == ()
    write_handle(tmp_path, HANDLE)
    text = (tmp_path / "handle.json").read_text()
    (tmp_path / "handle.json").write_text(text.replace('"version":1', '"version":99'))
    assert [user.volume for user in unread_users(tmp_path)] == ["data", "x"]
    (tmp_path / "handle.json").write_text(text[:100])
    assert unread_users(tmp_path) == ()


@pytest.mark.parametrize("state", list(State))
def test_what_is_used_is_not_removed(around: Around, state: State) -> None:
    around.volumes.create("data")
    around.use("data", state)
    with pytest.raises(Conflict, match=rf"the environment web \({state}\)") as caught:
        around.volumes.remove("data")
    assert caught.value.hint == "isolat rm web"
    assert around.volumes.prune() == []
    around.users.clear()
    around.volumes.remove("data")
    with pytest.raises(NotFound):
        around.volumes.remove("data")


def test_what_somebody_is_about_to_use_is_not_removed(around: Around) -> None:
    around.volumes.create("data")
    with around.volumes.claim(RW, copies=False):
        with pytest.raises(Conflict, match="just being made"):
            around.volumes.remove("data")
        assert [volume.name for volume in around.volumes.unused()] == []
    assert [volume.name for volume, _ in around.volumes.prune()] == ["data"]


# whose application, copied or live, and who else there is: whether both may be
WRITERS = [
    (False, RW, {"copies": False}, True),
    (False, RW, {"copies": True}, False),
    (True, RW, {"copies": False}, False),
    (True, RW, {"copies": True}, False),
    (True, RO, {"copies": True}, True),
    (False, RO, {"copies": True}, True),
    (True, RW, {"copies": True, "read_only": True}, True),
    (True, RW, {"copies": False, "read_only": True}, True),
]


@pytest.mark.parametrize(("copies", "wanted", "other", "fine"), WRITERS)
def test_a_copy_that_comes_back_is_written_by_nobody_else(
    around: Around, copies: bool, wanted: tuple[Volume, ...], other: dict[str, Any], fine: bool
) -> None:
    around.use("data", **other)
    outcome = contextlib.nullcontext() if fine else pytest.raises(Conflict, match="written by the environment web")
    with outcome, around.volumes.claim(wanted, copies=copies):
        pass
    around.users.clear()
    around.use("data", State.EXITED, **other)
    with around.volumes.claim(wanted, copies=copies):
        pass


def test_two_that_are_just_being_made_are_not_both_let_in(around: Around) -> None:
    with (
        around.volumes.claim(RW, copies=True),
        pytest.raises(Conflict, match="just being made"),
        around.volumes.claim(RW, copies=True),
    ):
        pass
    with around.volumes.claim(RW, copies=True):
        pass


def test_a_machine_has_a_volume_that_it_writes_only_once(around: Around) -> None:
    with pytest.raises(Unsupported, match="twice"), around.volumes.claim((*RW, Volume("data", "/x")), copies=True):
        pass
    with around.volumes.claim((*RO, Volume("data", "/x", read_only=True)), copies=True):
        pass
    with around.volumes.claim((*RW, Volume("data", "/x")), copies=False):
        pass


def test_without_a_pool_it_is_refused_with_reason_and_remedy_and_directories_are_not(
    around: Around, pool: FakePool
) -> None:
    pool.reason = "this kernel has no btrfs"
    with pytest.raises(Refused, match="this kernel has no btrfs") as caught, around.volumes.claim(RW, copies=False):
        pass
    assert "isolat doctor" in caught.value.hint
    with pytest.raises(Refused):
        around.volumes.create("data")
    with around.volumes.claim((Volume("/src", "/src"),), copies=False):
        pass
    assert around.volumes.list() == []


def test_the_same_again_is_the_same_and_another_size_is_a_conflict(around: Around) -> None:
    first = around.volumes.create("data", 1 << 30, (("a", "b"),))
    assert around.volumes.create("data") == around.volumes.create("data", 1 << 30) == first
    with pytest.raises(Conflict, match="1073741824"):
        around.volumes.create("data", 2 << 30)
    with pytest.raises(UsageError):
        around.volumes.create("a/b")
    assert record.NAME.fullmatch(around.volumes.create().name)


def _states(tmp_path: Path) -> Iterator[tuple[str, record.State]]:
    for name in record.names(tmp_path / "volumes"):
        found = record.read(tmp_path / "volumes", name)
        assert found is not None
        yield name, found.state


def test_a_start_completes_what_was_half_made_or_half_removed(around: Around, tmp_path: Path) -> None:
    for name in ("new", "empty", "gone", "whole"):
        volume = around.volumes.create(name)
        (tmp_path / "pool/volumes" / name / "x").touch()
        if name != "whole":
            state = record.State.GONE if name == "gone" else record.State.NEW
            record.write(tmp_path / "volumes", record.Volume(name, volume.size_bytes, 1, (), state))
    (tmp_path / "pool/volumes/empty/x").unlink()
    (tmp_path / "pool/volumes/empty").rmdir()
    (tmp_path / "volumes/.whole.json.new").touch()
    assert len(around.volumes.check()) == 3
    around.volumes.start()
    ready = record.State.READY
    assert dict(_states(tmp_path)) == {"new": ready, "empty": ready, "whole": ready}
    assert sorted(path.name for path in (tmp_path / "pool/volumes").iterdir()) == ["empty", "new", "whole"]
    assert (tmp_path / "pool/volumes/whole/x").exists()
    assert not (tmp_path / "pool/volumes/new/x").exists()
    assert around.volumes.check() == []


def test_without_its_pool_nothing_is_completed_or_forgotten(around: Around, pool: FakePool, tmp_path: Path) -> None:
    around.volumes.create("data")
    record.write(tmp_path / "volumes", record.Volume("data", 1, 1, (), record.State.GONE))
    pool.exists = lambda: True  # type: ignore[method-assign]
    pool.mounted = False
    around.volumes.start()
    assert dict(_states(tmp_path)) == {"data": record.State.GONE}


def test_what_can_not_be_made_is_not_half_there(
    around: Around, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(parent: str, name: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(btrfs, "create", full)
    with pytest.raises(StoreError, match="data can't be made: No space left"):
        around.volumes.create("data")
    assert dict(_states(tmp_path)) == {}


def test_check_tells_what_does_not_fit_together(around: Around, tmp_path: Path) -> None:
    around.volumes.create("data")
    around.use("lost")
    (tmp_path / "pool/volumes/stray").mkdir()
    (tmp_path / "pool/volumes/data").rmdir()
    (tmp_path / "volumes/mad.json").write_text("{")
    told = "\n".join(around.volumes.check())
    assert "the environment web (running) uses the volume lost, which is not there" in told
    assert "stray has no description" in told
    assert "the data of the volume data is gone" in told
    assert "the volume mad can't be read" in told


def test_many_at_once_make_one_volume(around: Around) -> None:
    made: list[record.Volume] = []
    threads = [threading.Thread(target=lambda: made.append(around.volumes.create("data"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 16
    assert len(set(made)) == 1
