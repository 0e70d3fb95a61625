from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.native.wireside import Controller, Held, Refused, start_keeper

from isolat.wire import codec
from isolat.wire import kinds as k

DIR, FILE, MOUNT, IDMAP, CGROUP, RUN, SUBVOLUME = range(1, 8)
SH = "/bin/sh"
MS_BIND, MS_RDONLY = 4096, 1


def path(p: Path) -> tuple[int, bytes]:
    return (k.T_PATH, bytes(p))


def see(held: Held, p: Path) -> Path:
    """The path as the keeper's mount namespace has it."""
    return Path(f"/proc/{held.pid}/root{p}")


def test_dir(c: Controller, tmp_path: Path) -> None:
    d = tmp_path / "a" / "b"
    fields: codec.Fields = [path(d), (k.T_MODE, 0o1750), (k.T_UID, os.getuid()), (k.T_GID, os.getgid())]
    for _ in range(2):
        c.step(DIR, fields)
        assert d.stat().st_mode & 0o7777 == 0o1750
    (d / "x" / "y").mkdir(parents=True)
    (d / "x" / "file").write_text("x")
    (d / "x" / "link").symlink_to(tmp_path)
    for _ in range(2):
        c.step(DIR, fields, revert=True)
        assert not d.exists()
    assert tmp_path.exists()


def test_a_very_deep_tree_is_removed(c: Controller, tmp_path: Path) -> None:
    top = tmp_path / "deep"
    top.mkdir()
    at = os.open(top, os.O_RDONLY)
    for i in range(2000):
        os.mkdir("d", dir_fd=at)
        if i % 100 == 0:
            os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    c.step(DIR, [path(top)], revert=True)
    assert not top.exists()


@pytest.mark.parametrize("p", ["/", "/home", "relative/path", "/tmp/../etc", "/tmp/x/..", ""])
def test_what_must_not_be_removed(c: Controller, p: str) -> None:
    with pytest.raises(Refused):
        c.step(DIR, [(k.T_PATH, p.encode())], revert=True)


def test_dir_says_what_failed(c: Controller) -> None:
    with pytest.raises(Refused) as info:
        c.step(DIR, [(k.T_PATH, b"/etc/passwd/x")])
    assert (info.value.stage, info.value.errno) == ("dir", 20)
    assert info.value.message == 'directory "/etc/passwd/x": Not a directory'


def test_file(c: Controller, tmp_path: Path) -> None:
    f = tmp_path / "f"
    for data in (b"one", b"two\0three"):
        c.step(FILE, [path(f), (k.T_DATA, data), (k.T_MODE, 0o600)])
        assert f.read_bytes() == data
    assert f.stat().st_mode & 0o777 == 0o600
    # nothing beside it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["env", "f"]
    for _ in range(2):
        c.step(FILE, [path(f)], revert=True)
    assert not f.exists()


def test_run(c: Controller, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    fields: codec.Fields = [(k.T_ARGV, a.encode()) for a in (SH, "-c", f"echo $X > {mark}")]
    inverse = [(k.T_INVERSE, a.encode()) for a in ("rm", str(mark))]
    c.step(RUN, [*fields, (k.T_ENV, b"X=7"), (k.T_ENV, b"PATH=/bin"), *inverse])
    assert mark.read_text() == "7\n"
    for _ in range(2):
        c.step(RUN, [*fields, *inverse], revert=True)
    assert not mark.exists()


def test_run_without_a_command_has_an_inverse_only(c: Controller) -> None:
    c.step(RUN, [(k.T_INVERSE, b"false")])
    c.step(RUN, [(k.T_INVERSE, b"false")], revert=True)


def test_run_fails_with_the_end_of_stderr(c: Controller) -> None:
    with pytest.raises(Refused) as info:
        c.step(RUN, [(k.T_ARGV, a) for a in (b"/bin/sh", b"-c", b"seq 10000 >&2; exit 3")])
    assert info.value.stage == "run"
    assert info.value.tail.endswith(b"9999\n10000\n")
    assert len(info.value.tail) <= 2048
    assert "code 3" in info.value.message
    with pytest.raises(Refused) as info:
        c.step(RUN, [(k.T_ARGV, b"nosuchcommand")])
    assert info.value.tail == b'exec: "nosuchcommand": not found in PATH'


def test_run_does_not_wait_for_a_daemon_that_keeps_stderr(c: Controller) -> None:
    start = time.monotonic()
    c.step(RUN, [(k.T_ARGV, a) for a in (b"/bin/sh", b"-c", b"sleep 20 & exit 0")])
    assert time.monotonic() - start < 5


def test_steps_go_on_in_order_until_one_fails(c: Controller, tmp_path: Path) -> None:
    steps: list[codec.Fields] = [[(k.T_OP, DIR), path(tmp_path / name)] for name in ("a", "f/x", "c")]
    (tmp_path / "f").write_text("")
    with pytest.raises(Refused):
        c.ask(k.STEP, [(k.T_OP, 0), *((k.T_STEP, s) for s in steps)])
    assert (tmp_path / "a").is_dir()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("number", [0, 8, -1, 1 << 40])
def test_an_unknown_step_is_an_error(c: Controller, number: int) -> None:
    with pytest.raises(Refused):
        c.step(number, [])


@pytest.mark.root
def test_mount_is_private_and_idempotent(keeper: Held, tmp_path: Path) -> None:
    target = tmp_path / "m" / "t"
    fields: codec.Fields = [
        (k.T_SOURCE, b"none"),
        (k.T_TARGET, bytes(target)),
        (k.T_FSTYPE, "tmpfs"),
        (k.T_OPTIONS, b"size=1m"),
    ]
    for _ in range(2):
        keeper.c.step(MOUNT, fields)
    mounts = Path(f"/proc/{keeper.pid}/mounts").read_text()
    assert mounts.count(f" {target} tmpfs ") == 1
    assert f" {target} " not in Path("/proc/self/mounts").read_text()
    for _ in range(2):
        keeper.c.step(MOUNT, fields, revert=True)
    assert f" {target} " not in Path(f"/proc/{keeper.pid}/mounts").read_text()


@pytest.mark.root
def test_a_file_is_bound_to_a_file(keeper: Held, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("x")
    target = tmp_path / "n" / "t"
    fields: codec.Fields = [(k.T_SOURCE, bytes(tmp_path / "source")), (k.T_TARGET, bytes(target)), (k.T_COUNT, MS_BIND)]
    keeper.c.step(MOUNT, fields)
    assert see(keeper, target).read_text() == "x"
    keeper.c.step(MOUNT, fields, revert=True)


def test_a_file_with_other_contents_stays_the_same_file(c: Controller, tmp_path: Path) -> None:
    f = tmp_path / "f"
    c.step(FILE, [path(f), (k.T_DATA, b"longer than the next"), (k.T_COUNT, 1)])
    f.chmod(0o640)
    before = f.stat()
    c.step(FILE, [path(f), (k.T_DATA, b"shorter"), (k.T_COUNT, 1)])
    assert f.read_bytes() == b"shorter"
    assert (f.stat().st_ino, f.stat().st_mode) == (before.st_ino, before.st_mode)
    link = tmp_path / "link"
    link.symlink_to(f)
    with pytest.raises(Refused):
        c.step(FILE, [path(link), (k.T_DATA, b"through a link"), (k.T_COUNT, 1)])
    assert f.read_bytes() == b"shorter"


@pytest.mark.root
def test_removing_a_tree_stops_at_a_bind_mount(keeper: Held, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    target = tmp_path / "tree" / "mounted"
    fields: codec.Fields = [
        (k.T_SOURCE, bytes(tmp_path / "precious")),
        (k.T_TARGET, bytes(target)),
        (k.T_COUNT, MS_BIND),
    ]
    keeper.c.step(MOUNT, fields)
    with pytest.raises(Refused) as info:
        keeper.c.step(DIR, [path(tmp_path / "tree")], revert=True)
    assert info.value.errno == 16
    assert (tmp_path / "precious" / "file").read_text() == "x"
    keeper.c.step(MOUNT, fields, revert=True)
    keeper.c.step(DIR, [path(tmp_path / "tree")], revert=True)
    assert not (tmp_path / "tree").exists()


@pytest.mark.root
@pytest.mark.parametrize("by_descriptor", [False, True])
@pytest.mark.parametrize("directory", [False, True])
def test_idmap(keeper: Held, tmp_path: Path, by_descriptor: bool, directory: bool) -> None:
    source = tmp_path / "source"
    if directory:
        source.mkdir()
    else:
        source.write_text("x")
    os.chown(source, 5, 6)
    target = tmp_path / "i" / "t"
    line: codec.Fields = [(k.T_UID, 0), (k.T_UID, 100000), (k.T_COUNT, 65536)]
    fields: codec.Fields = [(k.T_TARGET, bytes(target)), (k.T_LINE, line), (k.T_COUNT, MS_RDONLY)]
    fds = []
    if by_descriptor:
        fds = [os.open(source, os.O_PATH)]
    else:
        fields.append((k.T_SOURCE, bytes(source)))
    for _ in range(2):
        keeper.c.step(IDMAP, fields, fds=fds)
    for fd in fds:
        os.close(fd)
    st = see(keeper, target).stat()
    assert (st.st_uid, st.st_gid) == (100005, 100006)
    assert os.statvfs(see(keeper, target)).f_flag & os.ST_RDONLY
    keeper.c.step(IDMAP, fields, revert=True)
    assert see(keeper, target).stat().st_uid != 100005


def cgroup_roots() -> list[Path]:
    """Where this machine lets us make cgroups: one per hierarchy on v1, the only one on v2."""
    base = Path("/sys/fs/cgroup")
    return [base] if (base / "cgroup.controllers").exists() else [base / "memory", base / "pids", base / "freezer"]


@pytest.mark.root
def test_cgroup(c: Controller) -> None:
    name = f"isolat-test-{os.getpid()}"
    dirs = [root / name / "inner" for root in cgroup_roots()] + [root / name for root in cgroup_roots()]
    fields: codec.Fields = [(k.T_PATH, bytes(d)) for d in dirs]
    pids = next(root for root in cgroup_roots() if root.name in {"pids", "cgroup"})
    if pids.name == "pids":
        fields.append((k.T_WRITE, [path(pids / name / "pids.max"), (k.T_DATA, b"30")]))
    for _ in range(2):
        c.step(CGROUP, fields)
    if pids.name == "pids":
        assert (pids / name / "pids.max").read_text() == "30\n"
    groups = [(k.T_CGROUP, bytes(d / "cgroup.procs")) for d in dirs if d.name == "inner"]
    script = "cat /proc/self/cgroup; (setsid sleep 60 &) ; sleep 60"
    client = c.adopt("p")
    c.spawn("p", [SH, "-c", script], more=groups)
    assert f"{name}/inner".encode() in client.read_until(f"{name}/inner".encode())
    for _ in range(2):
        c.step(CGROUP, fields, revert=True)
    assert not any(d.exists() for d in dirs)
    assert client.finish().code == 137
    client.close()


@pytest.mark.root
def test_what_is_frozen_goes_with_its_group(c: Controller) -> None:
    """It dies only when it is thawed, which on v1 is another hierarchy's matter than those that wait for its end."""
    dirs = [root / f"isolat-test-frozen-{os.getpid()}" for root in reversed(cgroup_roots())]
    fields: codec.Fields = [(k.T_PATH, bytes(d)) for d in dirs]
    c.step(CGROUP, fields)
    client = c.adopt("p")
    c.spawn("p", [SH, "-c", "echo ready; sleep 60"], more=[(k.T_CGROUP, bytes(d / "cgroup.procs")) for d in dirs])
    client.read_until(b"ready")
    for file in (d / name for d in dirs for name in ("freezer.state", "cgroup.freeze")):
        if file.exists():
            file.write_text("FROZEN" if file.name == "freezer.state" else "1")
    c.step(CGROUP, fields, revert=True)
    assert not any(d.exists() for d in dirs)
    assert client.finish().code == 137
    client.close()


@pytest.mark.root
def test_a_process_is_born_in_its_only_group_and_moves_where_that_can_not_be(c: Controller) -> None:
    """Born: of a group of the second version it is a member before it runs."""
    mounted = (line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line)
    unified = next((Path(at) for at in mounted), None)
    if unified is None:
        pytest.skip("no cgroup2 is mounted here")
    groups = [unified / f"isolat-test-born-{os.getpid()}", cgroup_roots()[0] / f"isolat-test-moved-{os.getpid()}"]
    for n, group in enumerate(groups):
        c.step(CGROUP, [path(group)])
        client = c.adopt(f"p{n}")
        c.spawn(f"p{n}", [SH, "-c", "cat /proc/self/cgroup"], more=[(k.T_CGROUP, bytes(group / "cgroup.procs"))])
        assert group.name.encode() in client.read_until(group.name.encode())
        assert client.finish().code == 0
        client.close()
        c.step(CGROUP, [path(group)], revert=True)


@pytest.mark.parametrize("p", ["/sys/fs/cgroup/memory/other", "/sys/fs/cgroup/memory/isolat/../x", "/etc/passwd"])
def test_foreign_cgroups_are_never_touched(c: Controller, p: str) -> None:
    for revert in (False, True):
        with pytest.raises(Refused) as info:
            c.step(CGROUP, [(k.T_PATH, p.encode())], revert=revert)
        assert info.value.stage == "cgroup"
    with pytest.raises(Refused):
        c.step(CGROUP, [(k.T_WRITE, [(k.T_PATH, p.encode()), (k.T_DATA, b"0")])])


def test_a_bad_cgroup_fails_the_spawn_with_its_stage(c: Controller) -> None:
    with pytest.raises(Refused) as info:
        c.spawn("p", ["true"], more=[(k.T_CGROUP, b"/sys/fs/cgroup/isolat-none/cgroup.procs")])
    assert (info.value.stage, info.value.errno, info.value.code) == ("cgroup", 2, 0)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Path]:
    if not shutil.which("mkfs.btrfs"):
        pytest.skip("mkfs.btrfs is missing")
    image, at = tmp_path / "pool.img", tmp_path / "pool"
    with image.open("wb") as f:
        f.truncate(200 << 20)
    at.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, at], capture_output=True, check=False).returncode:
        pytest.skip("no loop devices or no btrfs here")
    subprocess.run(["btrfs", "quota", "enable", at], check=True)
    yield at
    libc = ctypes.CDLL(None)
    assert libc.umount2(os.fsencode(at), 2) == 0


@pytest.mark.root
def test_subvolume(pool: Path, tmp_path: Path) -> None:
    held = start_keeper(tmp_path / "env")  # after the mount, which it has to see
    try:
        volume = pool / "v"
        for _ in range(2):
            held.c.step(SUBVOLUME, [path(volume), (k.T_SIZE, 8 << 20)])
        with pytest.raises(OSError, match=r"[Qq]uota") as info:
            (volume / "file").write_bytes(os.urandom(20 << 20))
        assert info.value.errno == 122
        for _ in range(2):
            held.c.step(SUBVOLUME, [path(volume)], revert=True)
        assert not volume.exists()
        held.c.step(SUBVOLUME, [path(volume)])
        held.c.step(SUBVOLUME, [path(volume)], revert=True)
        (pool / "plain").mkdir()
        with pytest.raises(Refused):
            held.c.step(SUBVOLUME, [path(pool / "plain")])
    finally:
        held.stop()
