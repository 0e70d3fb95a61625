"""Volumes there and back: through the worker, and through the agent's own hands where a machine would be."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.errors import StoreError, UsageError
from isolat.volumes import transfer
from isolat.volumes.transfer import Owner, Volume

REPOSITORY = Path(__file__).resolve().parents[3]
AGENT = REPOSITORY / "native" / "build" / "isolat-agent"
LIMIT = 32 << 20
CALLER = 1234


class Trip:
    """One volume, its archive, and a directory that stands for the machine's."""

    def __init__(self, at: Path) -> None:
        self.outside = at / "outside"
        self.state = at / "state"
        self.machine = at / "machine"
        self.inside = self.machine / "0"
        self.outside.mkdir()
        self.state.mkdir()
        self.archive = self.state / transfer.ARCHIVE
        self.owner = Owner(os.geteuid(), os.getegid())
        self.read_only = False
        self.named = False
        self.room = -1
        self.fds: list[int] = []

    def _volumes(self) -> list[Volume]:
        fd = os.open(self.outside, os.O_PATH)
        self.fds.append(fd)
        return [Volume("0", fd, self.read_only, named=self.named, room_bytes=self.room)]

    def there(self, limit: int = LIMIT) -> list[str]:
        left = transfer.bring_in(self.archive, self._volumes(), self.owner, limit, Deadline(30))
        subprocess.run([AGENT, "--unpack", self.archive, self.machine], check=True)
        return left

    def pack(self) -> None:
        subprocess.run([AGENT, "--pack", self.archive, self.machine, str(LIMIT), "", "0"], check=True)

    def back(self) -> list[str]:
        self.pack()
        return self.carry()

    def carry(self) -> list[str]:
        return transfer.take_back(self.archive, self._volumes(), self.owner, "test", Deadline(30))


@pytest.fixture
def trip() -> Iterator[Trip]:
    """Below /tmp and open to all, since callers other than root go there too."""
    at = Path(tempfile.mkdtemp(prefix="isolat-v-", dir="/tmp"))
    at.chmod(0o755)
    one = Trip(at)
    yield one
    for fd in one.fds:
        os.close(fd)
    shutil.rmtree(at)


def test_what_has_changed_comes_back_and_nothing_else_is_touched(trip: Trip) -> None:
    out, inside = trip.outside, trip.inside
    for name in ("stays", "changes", "goes", "is replaced"):
        (out / name).write_text(name)
    (out / "d").mkdir()
    (out / "d" / "goes too").touch()
    (out / "link").symlink_to("stays")
    before = (out / "stays").stat()
    assert trip.there() == []
    assert {path.name for path in inside.iterdir()} == {"stays", "changes", "goes", "is replaced", "d", "link"}
    (inside / "changes").write_text("changed")
    (inside / "changes").chmod(0o751)
    (inside / "goes").unlink()
    (inside / "is replaced").unlink()
    (inside / "is replaced").mkdir()
    (inside / "is replaced" / "new").write_text("new")
    shutil.rmtree(inside / "d")
    (inside / "link").unlink()
    (inside / "link").symlink_to("elsewhere")
    os.mkfifo(inside / "fifo")
    assert trip.back() == []
    assert {path.name for path in out.iterdir()} == {"stays", "changes", "is replaced", "link", "fifo"}
    assert (out / "changes").read_text() == "changed"
    assert (out / "changes").stat().st_mode & 0o7777 == 0o751
    assert (out / "is replaced" / "new").read_text() == "new"
    assert (out / "link").readlink() == Path("elsewhere")
    assert stat.S_ISFIFO((out / "fifo").stat().st_mode)
    after = (out / "stays").stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_doing_it_again_changes_nothing(trip: Trip) -> None:
    (trip.outside / "gone").touch()
    trip.there()
    (trip.inside / "gone").unlink()
    (trip.inside / "new").write_text("new")
    assert trip.back() == []
    assert trip.carry() == []
    assert [path.name for path in trip.outside.iterdir()] == ["new"]


def test_content_that_changes_behind_its_size_and_time_comes_back(trip: Trip) -> None:
    (trip.outside / "file").write_text("one")
    time_ns = (trip.outside / "file").stat().st_mtime_ns
    trip.there()
    (trip.inside / "file").write_text("two")
    os.utime(trip.inside / "file", ns=(time_ns, time_ns))
    trip.back()
    assert (trip.outside / "file").read_text() == "two"


def test_what_changes_outside_meanwhile(trip: Trip) -> None:
    """Only where both sides have changed the same file one is lost: the outer, as if it had been written earlier."""
    for name in ("outside only", "both", "removed inside", "removed outside"):
        (trip.outside / name).write_text("old")
    trip.there()
    (trip.outside / "outside only").write_text("outside")
    (trip.outside / "both").write_text("outside")
    (trip.outside / "removed inside").write_text("outside")
    (trip.outside / "removed outside").unlink()
    (trip.outside / "new").write_text("outside")
    (trip.inside / "both").write_text("inside")
    (trip.inside / "removed inside").unlink()
    assert trip.back() == ["0/removed inside: it was changed outside meanwhile, so it stays"]
    content = {path.name: path.read_text() for path in trip.outside.iterdir()}
    assert content == {"outside only": "outside", "both": "inside", "removed inside": "outside", "new": "outside"}


def test_several_names_of_one_file_stay_that(trip: Trip) -> None:
    (trip.outside / "b").write_text("old")
    (trip.outside / "d").mkdir()
    os.link(trip.outside / "b", trip.outside / "d" / "a")
    trip.there()
    assert (trip.inside / "b").stat().st_ino == (trip.inside / "d" / "a").stat().st_ino
    (trip.inside / "b").write_text("new")
    os.link(trip.inside / "b", trip.inside / "third")
    assert trip.back() == []
    names = [trip.outside / "b", trip.outside / "d" / "a", trip.outside / "third"]
    assert {path.read_text() for path in names} == {"new"}
    assert len({path.stat().st_ino for path in names}) == 1


def test_a_source_that_nobody_holds_is_opened_again_while_it_is_the_same(trip: Trip) -> None:
    trip.there()
    (trip.inside / "new").write_text("new")
    trip.pack()
    moved = trip.outside.with_name("moved")
    trip.outside.rename(moved)
    volumes = [Volume("0", -1, path=str(trip.outside))]

    def carry() -> list[str]:
        return transfer.take_back(trip.archive, volumes, trip.owner, "test", Deadline(30))

    with pytest.raises(StoreError, match="can't be opened again: No such file"):
        carry()
    trip.outside.symlink_to(moved)
    with pytest.raises(StoreError, match="is no longer what it was"):
        carry()
    trip.outside.unlink()
    trip.outside.mkdir()
    with pytest.raises(StoreError, match="is no longer what it was"):
        carry()
    trip.outside.rmdir()
    moved.rename(trip.outside)
    assert carry() == []
    assert (trip.outside / "new").read_text() == "new"


def test_large_and_sparse_files(trip: Trip) -> None:
    with (trip.outside / "sparse").open("wb") as file:
        file.write(b"a")
        file.seek(20 << 20)
        file.write(b"z" * 5000)
    trip.there()
    assert (trip.inside / "sparse").read_bytes() == (trip.outside / "sparse").read_bytes()
    assert (trip.inside / "sparse").stat().st_blocks < 64
    assert trip.archive.stat().st_blocks < 200
    data = os.urandom(3_000_001)
    (trip.inside / "large").write_bytes(data)
    assert trip.back() == []
    assert (trip.outside / "large").read_bytes() == data


def test_more_than_the_disk_holds_is_refused_with_its_size(trip: Trip) -> None:
    (trip.outside / "large").write_bytes(b"x" * (3 << 20))
    with pytest.raises(UsageError, match="they take 4 MiB, and the environment's disk has 2 MiB"):
        trip.there(2 << 20)


def test_a_file_is_written_where_it_lies(trip: Trip) -> None:
    trip.outside.rmdir()
    trip.outside.write_text("before")
    inode = trip.outside.stat().st_ino
    trip.there()
    assert trip.inside.read_text() == "before"
    trip.inside.write_text("it has got longer")
    assert trip.back() == []
    assert trip.outside.read_text() == "it has got longer"
    assert trip.outside.stat().st_ino == inode


def test_devices_and_sockets_are_left_out_and_never_replaced(trip: Trip) -> None:
    os.mknod(trip.outside / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    assert trip.there() == ["0/null: a device or a socket"]
    assert not (trip.inside / "null").exists()
    (trip.inside / "null").write_text("not a device")
    assert trip.back() == ["0/null: what is there was not copied in, so it stays"]
    assert stat.S_ISCHR((trip.outside / "null").stat().st_mode)


def test_nothing_becomes_set_user_id(trip: Trip) -> None:
    trip.there()
    (trip.inside / "file").touch()
    (trip.inside / "file").chmod(0o6755)
    trip.back()
    assert (trip.outside / "file").stat().st_mode & 0o7777 == 0o755


def test_an_unfinished_archive_changes_nothing(trip: Trip) -> None:
    (trip.outside / "file").touch()
    trip.there()
    assert not transfer.is_finished(trip.archive)
    with pytest.raises(StoreError, match="not finished"):
        trip.carry()
    trip.pack()
    assert transfer.is_finished(trip.archive)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
class TestOfAnUnprivilegedCaller:
    @pytest.fixture(autouse=True)
    def _owner(self, trip: Trip) -> None:
        trip.owner = Owner(CALLER, CALLER)
        os.chown(trip.outside, CALLER, CALLER)

    def test_their_files_are_roots_inside_and_theirs_again(self, trip: Trip) -> None:
        (trip.outside / "mine").write_text("x")
        os.chown(trip.outside / "mine", CALLER, CALLER)
        (trip.outside / "others").write_text("x")
        trip.there()
        assert (trip.inside / "mine").stat().st_uid == 0
        assert (trip.inside / "others").stat().st_uid == 65534
        (trip.inside / "new").write_text("n")
        assert trip.back() == []
        assert (trip.outside / "new").stat().st_uid == CALLER

    def test_what_they_may_not_read_is_not_read_for_them(self, trip: Trip) -> None:
        (trip.outside / "secret").write_text("secret")
        (trip.outside / "secret").chmod(0o600)
        assert trip.there() == ["0/secret: Permission denied"]
        assert b"secret\n" not in trip.archive.read_bytes()
        (trip.inside / "secret").write_text("overwritten")
        assert len(trip.back()) == 1
        assert (trip.outside / "secret").read_text() == "secret"

    def test_what_they_may_not_write_is_not_written_for_them(self, trip: Trip) -> None:
        (trip.outside / "roots").mkdir()
        (trip.outside / "roots" / "file").write_text("old")
        trip.there()
        (trip.inside / "roots" / "file").write_text("new")
        (trip.inside / "roots" / "another").write_text("new")
        assert [line.rpartition(": ")[2] for line in trip.back()] == ["Permission denied"] * 2
        assert {path.name: path.read_text() for path in (trip.outside / "roots").iterdir()} == {"file": "old"}

    def test_a_file_that_is_theirs_to_read_only(self, trip: Trip) -> None:
        trip.outside.rmdir()
        trip.outside.write_text("of root")
        trip.there()
        trip.inside.write_text("changed")
        assert trip.back() == ["0: Permission denied"]
        assert trip.outside.read_text() == "of root"


def test_what_does_not_fit_changes_nothing_and_what_is_replaced_gives_its_room(trip: Trip) -> None:
    (trip.outside / "old").write_bytes(os.urandom(4 << 20))
    (trip.outside / "goes").write_bytes(os.urandom(2 << 20))
    trip.there()
    (trip.inside / "old").write_bytes(os.urandom(5 << 20))
    (trip.inside / "goes").unlink()
    (trip.inside / "new").write_bytes(os.urandom(3 << 20))
    trip.room = 1 << 20
    before = {path.name: path.read_bytes() for path in trip.outside.iterdir()}
    trip.pack()
    with pytest.raises(StoreError, match="0: what was written takes 2 MiB more, and 1 MiB are left in it"):
        trip.carry()
    assert {path.name: path.read_bytes() for path in trip.outside.iterdir()} == before
    trip.room = 3 << 20
    assert trip.carry() == []
    assert (trip.outside / "old").stat().st_size == 5 << 20
    trip.room = 1 << 20
    assert trip.carry() == []  # it is there already


@pytest.mark.root
def test_a_named_volume_keeps_its_numbers_whoever_the_caller_is(trip: Trip) -> None:
    other = trip.outside.with_name("other")
    other.mkdir()
    os.chown(other, CALLER, CALLER)
    os.chown(trip.outside, 33, 44)
    trip.outside.chmod(0o700)
    (trip.outside / "theirs").write_text("x")
    os.chown(trip.outside / "theirs", 7, 8)
    trip.owner = Owner(CALLER, CALLER)

    def volumes() -> list[Volume]:
        trip.fds += [os.open(other, os.O_PATH), os.open(trip.outside, os.O_PATH)]
        return [Volume("0", trip.fds[-2]), Volume("1", trip.fds[-1], named=True, room_bytes=1 << 20)]

    assert transfer.bring_in(trip.archive, volumes(), trip.owner, LIMIT, Deadline(30)) == []
    subprocess.run([AGENT, "--unpack", trip.archive, trip.machine], check=True)
    inside = {path: trip.machine / path for path in ("0", "1", "1/theirs")}
    assert {name: path.stat().st_uid for name, path in inside.items()} == {"0": 0, "1": 33, "1/theirs": 7}
    for name in ("0", "1"):
        (trip.machine / name / "new").write_text(name)
        os.chown(trip.machine / name / "new", 5, 6)
    subprocess.run([AGENT, "--pack", trip.archive, trip.machine, str(LIMIT), "", "0", "1"], check=True)
    assert transfer.take_back(trip.archive, volumes(), trip.owner, "test", Deadline(30)) == []
    assert ((other / "new").stat().st_uid, (trip.outside / "new").stat().st_uid) == (CALLER, 5)


@pytest.mark.root
def test_what_an_image_has_is_put_into_a_volume_as_it_is(trip: Trip) -> None:
    source, target = trip.outside, trip.machine
    target.mkdir()
    (source / "d" / "e").mkdir(parents=True)
    (source / "d" / "x").write_text("x")
    os.link(source / "d" / "x", source / "again")
    (source / "away").symlink_to("/etc/passwd")
    os.mkfifo(source / "fifo", 0o600)
    os.mknod(source / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with (source / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    os.chown(source / "d", 33, 44)
    (source / "d").chmod(0o2750)
    os.utime(source / "d", ns=(7, 1_000_000_007))
    source.chmod(0o1777)
    trip.fds += [os.open(source, os.O_PATH), os.open(target, os.O_PATH)]
    assert transfer.seed(trip.fds[-2], trip.fds[-1], Deadline(30)) == ["image/null: a device or a socket"]
    told = "find . -mindepth 1 -not -name null -printf '%p %y %#m %U %G %s %T@ %l %n\\n' | sort; stat -c '%a %u' ."
    seen = [subprocess.run(["sh", "-c", told], cwd=at, capture_output=True, check=True) for at in (source, target)]
    assert seen[0].stdout == seen[1].stdout
    assert (target / "sparse").stat().st_blocks == 0
