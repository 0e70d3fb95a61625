"""The image store and the pool on a real kernel, each in a state root of its own that is empty of mounts afterwards."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.errors import Conflict, NotFound, Refused, StoreError
from isolat.images import host
from isolat.images.image import ImageConfig
from isolat.images.pool import Pool
from isolat.images.store import ImageStore
from isolat.linux import btrfs, confine, mounts

pytestmark = pytest.mark.root
TREE = ImageConfig(kind="tree")
SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A state root. Afterwards nothing may be mounted below it, and no loop device may read from it."""
    path = tmp_path / "state"
    yield path
    left = [entry.target for entry in mounts.mounts() if entry.target.startswith(str(tmp_path))]
    mounts.umount_below(str(tmp_path))
    loops = [name for name in Path("/sys/block").glob("loop*/loop/backing_file") if str(tmp_path) in _read(name)]
    assert left == [] and loops == []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.fixture
def store(root: Path) -> Iterator[ImageStore]:
    opened = ImageStore(root)
    yield opened
    opened.unmount_all()


def make_tree(path: Path, names: tuple[str, ...] = ("a", "b", "c"), text: str = "same") -> Path:
    """A small root file system: files of several owners and modes, a link, a hard link, a device, a capability."""
    path.mkdir()
    for name in names:
        (path / name).write_text(text * 1000)
        os.utime(path / name, (1_600_000_000, 1_600_000_000))
    (path / "link").symlink_to("a")
    os.link(path / "a", path / "hard")
    os.chown(path / "b", 1000, 2000)
    (path / "b").chmod(0o640)
    (path / "dev").mkdir()
    os.mknod(path / "dev/null", 0o20666, os.makedev(1, 3))
    for directory in (path / "dev", path):
        os.utime(directory, (1_600_000_000, 1_600_000_000))
    os.utime(path / "link", (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    return path


def test_a_tree_becomes_an_image_with_owners_modes_times_and_an_empty_dev(store: ImageStore, tmp_path: Path) -> None:
    image = store.add_tree(make_tree(tmp_path / "tree"), TREE, ["small"])
    found = store.mount(image.digest)
    assert (found / "link").read_text() == "same" * 1000
    facts = (found / "b").stat()
    assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o7777, facts.st_mtime) == (1000, 2000, 0o640, 1_600_000_000)
    assert (found / "hard").stat().st_ino == (found / "a").stat().st_ino
    assert list((found / "dev").iterdir()) == []
    with pytest.raises(OSError, match="Read-only"):
        (found / "new").touch()


def test_the_same_tree_is_the_same_image_whatever_the_order_it_was_made_in(store: ImageStore, tmp_path: Path) -> None:
    one = store.add_tree(make_tree(tmp_path / "one"), TREE, ["one"])
    time.sleep(1.1)  # a time of making would show
    two = store.add_tree(make_tree(tmp_path / "two", ("c", "b", "a")), TREE, ["two"])
    other = store.add_tree(make_tree(tmp_path / "other", text="else"), TREE)
    assert one.digest == two.digest != other.digest
    assert store.resolve("one").names == ("one:latest", "two:latest")
    assert len(store.list()) == 2


def test_other_defaults_are_another_image(store: ImageStore, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    assert store.add_tree(tree, TREE).digest != store.add_tree(tree, ImageConfig("tree", command=("x",))).digest


def test_a_dev_that_is_a_link_becomes_a_directory_and_nothing_stays(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/dev").symlink_to("/etc")
    image = store.add_tree(tmp_path / "tree", TREE)
    at = store.mount(image.digest) / "dev"
    assert at.is_dir() and not at.is_symlink() and list(at.iterdir()) == []
    assert list((store.dir / "tmp").iterdir()) == []


def test_names_digests_and_their_beginnings_resolve(store: ImageStore, tmp_path: Path) -> None:
    image = store.add_tree(make_tree(tmp_path / "tree"), TREE, ["team/tool:1"])
    for name in ("team/tool:1", image.digest, image.digest[:6], f"sha256:{image.digest}"):
        assert store.resolve(name) == store.resolve(image.digest)
    with pytest.raises(NotFound) as caught:
        store.resolve("team/tool")
    assert "isolat image bootstrap debian" in caught.value.hint


def test_an_image_in_use_is_not_removed_but_a_further_name_is(store: ImageStore, tmp_path: Path) -> None:
    image = store.add_tree(make_tree(tmp_path / "tree"), TREE, ["one", "two"])
    store.mount(image.digest)
    store.remove("one", in_use=lambda: {image.digest})
    for name in ("two", image.digest):
        with pytest.raises(Conflict, match="in use"):
            store.remove(name, in_use=lambda: {image.digest})
    assert store.mount(image.digest).is_dir()
    store.remove("two")
    assert store.list() == [] and not store.file(image.digest).exists()
    assert not (store.mounts_dir / image.digest).exists()


def test_mounting_is_once_for_all_threads_and_stores(store: ImageStore, root: Path, tmp_path: Path) -> None:
    digest = store.add_tree(make_tree(tmp_path / "tree"), TREE).digest
    stores = [store, *(ImageStore(root) for _ in range(3))]
    threads = [threading.Thread(target=one.mount, args=(digest,)) for one in stores for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    target = str(store.mount(digest))
    assert [entry.target for entry in mounts.mounts()].count(target) == 1
    entry = mounts.mounted_at(target)
    assert entry is not None and entry.fstype == "erofs"
    assert mounts.backing_file(entry) == str(store.file(digest))


def test_mounting_again_after_somebody_unmounted_it(store: ImageStore, tmp_path: Path) -> None:
    digest = store.add_tree(make_tree(tmp_path / "tree"), TREE).digest
    target = store.mount(digest)
    mounts.umount(str(target))
    assert (store.mount(digest) / "a").exists()


def test_a_stranger_in_the_place_of_the_mount_is_refused(store: ImageStore, tmp_path: Path) -> None:
    digest = store.add_tree(make_tree(tmp_path / "tree"), TREE).digest
    target = store.mounts_dir / digest
    target.mkdir()
    mounts.mount("tmpfs", str(target), "tmpfs")
    with pytest.raises(StoreError, match="is occupied: tmpfs"):
        store.mount(digest)


def test_where_the_kernel_cannot_read_the_file_itself_a_loop_device_does(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.add_tree(make_tree(tmp_path / "tree"), TREE).digest
    direct = mounts._mount

    def refuse_files(source: str, target: str, fstype: str, flags: int, options: str) -> int:
        return direct(source, target, fstype, flags, options) if source.startswith("/dev/") else errno.ENOTBLK

    monkeypatch.setattr(mounts, "_mount", refuse_files)
    target = store.mount(digest)
    entry = mounts.mounted_at(str(target))
    assert entry is not None and entry.source.startswith("/dev/loop")
    assert ImageStore(store.root).mount(digest) == target


KILLED_BUILD = """
    import sys
    sys.path.insert(0, {source!r})
    from pathlib import Path
    from isolat.images.bootstrap import bootstrap
    from isolat.images.store import ImageStore
    from isolat.linux import child
    child.SAFE_PATH = {programs!r} + ":" + child.SAFE_PATH
    bootstrap(ImageStore(Path({root!r})), "debian", progress=lambda text, done, total: print(text, flush=True))
"""
SLOW_MMDEBSTRAP = """\
#!/bin/sh
for tree; do :; done
mkdir -p "$tree/proc" && mount -t tmpfs tmpfs "$tree/proc"
echo "I: making it"
while :; do echo x >>"$tree/file"; done
"""


def test_a_build_that_is_killed_leaves_no_file_process_or_mount(root: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "mmdebstrap").write_text(SLOW_MMDEBSTRAP)
    (programs / "mmdebstrap").chmod(0o755)
    script = textwrap.dedent(KILLED_BUILD.format(source=str(SOURCE), programs=str(programs), root=str(root)))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "making it\n"
        ImageStore(root)  # opening a store sweeps, but not what somebody alive is building
        assert len(list((root / "images/tmp").iterdir())) == 1
        builder.send_signal(signal.SIGKILL)
    _wait_until(lambda: not _processes_naming(str(programs)))
    ImageStore(root)
    assert list((root / "images/tmp").iterdir()) == []
    assert sorted(path.name for path in (root / "images").iterdir()) == ["blobs", "lock", "tmp"]


def _wait_until(true: object) -> None:
    assert callable(true)
    give_up = Deadline(10)
    while not true():
        give_up.check("waiting for the processes of a killed build")
        time.sleep(0.01)


def _processes_naming(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if text.encode() in line:
            found.append(path.parent.name)
    return found


def test_the_image_host_runs_this_machines_programs_and_shows_nothing_else(store: ImageStore) -> None:
    image = host.bootstrap(store)
    target = store.mount(image.digest)
    binds = " && ".join(f"mount --bind -o ro {source} {target}{inside}" for source, inside in image.binds)
    script = f"{binds} && chroot {target} /bin/sh -c 'ls / && cat /etc/passwd /etc/machine-id /etc/hostname'"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "root:x:0:0:root:/root:/bin/bash" in done.stdout
    assert os.uname().nodename not in done.stdout.split()
    assert image.names == ("host:latest",) and ("/usr", "/usr") in image.binds


def test_a_confined_program_reads_and_writes_only_what_it_is_given(tmp_path: Path) -> None:
    given, own, other = tmp_path / "given", tmp_path / "own", tmp_path / "other"
    for path in (given, own, other):
        path.mkdir()
        (path / "file").write_text("x")
        (path / "file").chmod(0o600)
    tmp_path.chmod(0o711)
    os.chown(own, 65534, 65534)
    script = f"cat {given}/file && touch {own}/new && id -u && ls /sys/class/net; cat {other}/file; touch {given}/new"
    done = subprocess.run(
        [
            *(sys.executable, "-I", "-S", str(Path(confine.__file__).resolve())),
            *("--read", str(given), "--write", str(own), "--user", "--", "sh", "-c", script),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.stdout.startswith("x65534\n"), done
    assert (own / "new").exists() and not (given / "new").exists()
    if confine._libc.syscall(444, None, 0, 1) > 0:
        assert done.stdout == "x65534\n"


# The pool


@pytest.fixture
def pool(root: Path) -> Iterator[Pool]:
    made = Pool(root, size_bytes=1 << 30)
    if not made.available:
        pytest.skip(made.reason)
    yield made
    made.close()


def _fill(path: Path, size: int) -> int:
    """Write ``size`` bytes; the errno that stopped it, or 0."""
    try:
        with path.open("wb", buffering=0) as stream:
            for _ in range(size >> 20):
                stream.write(bytes(1 << 20))
            os.fsync(stream.fileno())
    except OSError as error:
        return error.errno or -1
    return 0


def test_a_limit_holds_for_one_subvolume_alone(pool: Pool) -> None:
    assert pool.ensure()
    for name, size in (("small", 4 << 20), ("large", 64 << 20)):
        btrfs.create(str(pool.path), name)
        btrfs.set_limit(str(pool.upper(name)), size)
    assert _fill(pool.upper("small") / "file", 16 << 20) == errno.EDQUOT
    assert _fill(pool.upper("large") / "file", 16 << 20) == 0


def test_the_pool_is_made_once_and_found_again(pool: Pool, root: Path) -> None:
    assert pool.ensure() and pool.ensure()
    btrfs.create(str(pool.path), "kept")
    (pool.upper("kept") / "file").write_text("here")
    again = Pool(root)
    assert again.mounted and again.ensure()
    pool.close()
    assert not pool.mounted and pool.exists()
    assert pool.ensure()
    assert (pool.upper("kept") / "file").read_text() == "here"
    assert pool.file.stat().st_blocks * 512 < 64 << 20  # sparse


def test_a_limit_holds_after_the_pool_was_mounted_again(pool: Pool) -> None:
    pool.ensure()
    pool.close()
    pool.ensure()
    btrfs.create(str(pool.path), "late")
    btrfs.set_limit(str(pool.upper("late")), 4 << 20)
    assert _fill(pool.upper("late") / "file", 16 << 20) == errno.EDQUOT


def test_sweeping_deletes_what_nobody_knows(pool: Pool) -> None:
    assert pool.sweep(()) == []
    pool.ensure()
    for name in ("known", "left", "lost"):
        btrfs.create(str(pool.path), name)
    assert pool.sweep({"known"}) == ["left", "lost"]
    assert sorted(path.name for path in pool.path.iterdir()) == [".isolat-pool", "known"]


def test_a_pool_whose_maker_was_killed_is_made_anew(pool: Pool) -> None:
    pool.file.parent.mkdir(parents=True)
    (pool.file.parent / "pool.img.new-dead").write_text("x")
    pool._format()
    assert pool.ensure()
    assert (pool.path / ".isolat-pool").exists()
    assert not list(pool.file.parent.glob("pool.img.new-*"))


def test_a_disk_that_is_too_full_is_refused_with_the_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1 << 30

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    pool = Pool(root)
    with pytest.raises(Refused, match="has 1024 MiB free"):
        pool._choose_size()
    assert pool.ensure() is False
    assert "2 GiB" in pool.reason
    assert not root.exists()


def test_a_pool_is_not_mounted_while_another_loop_device_has_its_file(tmp_path: Path) -> None:
    pool = Pool(tmp_path, size_bytes=1 << 30)
    assert pool.ensure()
    pool.close()
    device = subprocess.run(
        ["losetup", "--find", "--show", str(pool.file)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        with pytest.raises(StoreError, match=device):
            pool.ensure()
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
    assert pool.ensure()
    pool.close()
