"""Volumes of microVMs: copied in, seen where they were asked for, and what has changed copied back at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.microvms import qemu, until_warm
from tests.support.roots import Root

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

CALLER = 1234
LAYER = ("--layer", "microvm", "-m", "128m")


@pytest.fixture
def directory() -> Iterator[Path]:
    """Below /tmp and open to all, since callers other than root go there too."""
    path = Path(tempfile.mkdtemp(prefix="isolat-v-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def open_root(root: Root) -> Iterator[Root]:
    """A root whose socket everybody may use for a moment, as members of the group isolat may."""
    mode = root.socket.stat().st_mode & 0o777
    root.socket.chmod(0o666)
    yield root
    root.socket.chmod(mode)


def _cli(root: Root, *words: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    return root.cli(*words, **more)  # type: ignore[arg-type]


def _run(root: Root, volume: str, script: str, *options: str, layer: tuple[str, ...] = LAYER) -> str:
    done = _cli(root, "run", "--rm", *layer, "-v", volume, *options, "debian", "sh", "-c", script)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    return done.stdout.decode()


def _started(root: Root, volume: str, script: str) -> str:
    """The id of one that runs, and has said so."""
    done = _cli(root, "run", "-d", *LAYER, "-v", volume, "debian", "sh", "-c", f"{script}; echo ready; exec sleep 600")
    assert done.returncode == 0, done.stderr.decode()
    id = done.stdout.decode().strip()
    end = time.monotonic() + 60
    while b"ready" not in _cli(root, "logs", id).stdout:
        assert time.monotonic() < end
        time.sleep(0.05)
    return id


def test_there_and_back(root: Root, directory: Path) -> None:
    (directory / "in").write_text("told\n")
    (directory / "in").chmod(0o640)
    (directory / "gone").touch()
    (directory / "link").symlink_to("in")
    os.utime(directory / "in", ns=(7, 1_000_000_007))
    script = """
        cat /v/in /v/link; stat -c '%a %u %g %Y' /v/in; rm /v/gone
        echo back > /v/out; mkdir -p /v/d/e; ln -s out /v/d/new; chmod 751 /v/out; ln /v/out /v/again
    """
    assert _run(root, f"{directory}:/v", script) == "told\ntold\n640 0 0 1\n"
    assert {path.name for path in directory.iterdir()} == {"in", "link", "out", "d", "again"}
    assert (directory / "out").read_text() == "back\n"
    assert (directory / "out").stat().st_mode & 0o7777 == 0o751
    assert (directory / "again").stat().st_ino == (directory / "out").stat().st_ino
    assert (directory / "d" / "new").readlink() == Path("out")
    assert (directory / "d" / "e").is_dir()
    assert (directory / "in").stat().st_mtime_ns == 1_000_000_007
    assert {(p.stat().st_uid, p.stat().st_gid) for p in (directory / "out", directory / "d")} == {(0, 0)}


def test_what_ends_is_told_as_it_was(root: Root, directory: Path) -> None:
    for script, code in (("exit 7", 7), ("kill -TERM $$", 143)):
        done = _cli(
            root, "run", "--rm", *LAYER, "-v", f"{directory}:/v", "debian", "sh", "-c", f"echo x >> /v/x; {script}"
        )
        assert (done.returncode, done.stderr) == (code, b"")
    assert (directory / "x").read_text() == "x\nx\n"


def test_read_only_means_it(root: Root, directory: Path) -> None:
    (directory / "in").write_text("told\n")
    script = (
        "cat /v/in; for c in 'touch /v/x' 'rm /v/in' 'chmod 777 /v/in'; do $c 2>/dev/null && echo did $c; done; true"
    )
    assert _run(root, f"{directory}:/v:ro", script) == "told\n"
    assert [path.name for path in directory.iterdir()] == ["in"]


def test_a_single_file_and_a_root_that_is_only_read(root: Root, directory: Path) -> None:
    (directory / "one").write_text("alone\n")
    inode = (directory / "one").stat().st_ino
    script = "cat /new/place/one; echo more >> /new/place/one; touch /x 2>/dev/null || echo closed"
    assert _run(root, f"{directory}/one:/new/place/one", script, "--read-only") == "alone\nclosed\n"
    assert (directory / "one").read_text() == "alone\nmore\n"
    assert (directory / "one").stat().st_ino == inode


def test_several_volumes_one_in_the_other_and_behind_a_link_of_the_image(root: Root, directory: Path) -> None:
    for name in ("a", "b", "c"):
        (directory / name).mkdir()
        (directory / name / name).write_text(name)
    words = ("-v", f"{directory}/b:/v/b", "-v", f"{directory}/c:/var/run/c:ro")
    script = "cat /v/a /v/b/b /run/c/c; echo 1 > /v/new; echo 2 > /v/b/new"
    assert _run(root, f"{directory}/a:/v", script, *words) == "abc"
    assert (directory / "a" / "new").read_text() == "1\n"
    assert (directory / "b" / "new").read_text() == "2\n"


def test_what_can_not_be_copied_is_said(root: Root, directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    os.mknod(directory / "null", 0o666 | 0o020000, os.makedev(1, 3))
    done = _cli(root, "run", "--rm", *LAYER, "-v", f"{directory}:/v:ro", "debian", "ls", "/v")
    assert (done.returncode, done.stdout) == (0, b"fifo\n")
    assert b"could be copied in: 0/null: a device or a socket" in done.stderr


def test_set_user_id_is_powerless_in_a_volume(root: Root, directory: Path) -> None:
    shutil.copy("/usr/bin/id", directory / "id")
    (directory / "id").chmod(0o4755)
    assert _run(root, f"{directory}:/v", "/v/id -u", "-u", "1234") == "1234\n"


@pytest.mark.soak
def test_a_big_file_and_many_small_ones(root: Root, directory: Path) -> None:
    (directory / "big").write_bytes(os.urandom(1 << 20) * 64)
    (directory / "many").mkdir()
    for n in range(500):
        (directory / "many" / f"{n}").write_text(f"{n}")
    script = "cat /v/big /v/big > /v/twice; rm /v/many/7; echo changed > /v/many/8; ls /v/many | wc -l"
    assert _run(root, f"{directory}:/v", script, "--disk", "512m") == "499\n"
    data = (directory / "big").read_bytes()
    assert (directory / "twice").read_bytes() == data + data
    assert not (directory / "many" / "7").exists()
    assert (directory / "many" / "8").read_text() == "changed\n"


def test_what_does_not_fit_is_refused_with_its_size(root: Root, directory: Path) -> None:
    with (directory / "big").open("wb") as file:
        file.truncate(100 << 20)
    done = _cli(root, "run", "--rm", *LAYER, "--disk", "64m", "-v", f"{directory}:/v", "debian", "true")
    assert done.returncode == 125
    assert b"they take 101 MiB, and the environment's disk has 64 MiB" in done.stderr
    assert root.environments() == []


def test_what_no_longer_fits_at_the_end_is_said(root: Root, directory: Path) -> None:
    (directory / "in").write_text("as it was")
    # On the machine's disk it is a hole, in an archive it is not.
    script = "truncate -s 200M /v/sparse; echo changed > /v/in"
    words = ("run", "--rm", *LAYER, "--disk", "64m", "-v", f"{directory}:/v", "debian", "sh", "-c", script)
    done = _cli(root, *words)
    assert done.returncode == 0
    assert b"its volumes are as they were" in done.stderr
    assert (directory / "in").read_text() == "as it was"


def test_the_daemon_is_killed_meanwhile(fresh_root: Root, directory: Path) -> None:
    root = fresh_root
    root.start_daemon()
    (directory / "in").write_text("told")
    id = _started(root, f"{directory}:/v", "echo back > /v/out")
    root.kill_daemon()
    root.start_daemon()
    assert _cli(root, "stop", "-t", "1", id).returncode == 0
    assert (directory / "out").read_text() == "back\n"
    found = root.ask("inspect", {"env": id})
    assert not found["reason"]
    assert not list((root.path / "envs" / id).glob("volumes*"))
    _cli(root, "rm", id)


def test_it_ends_while_no_daemon_lives(fresh_root: Root, directory: Path) -> None:
    root = fresh_root
    root.start_daemon()
    (directory / "go").touch()
    script = "until test -e /tmp/go; do sleep 0.1; done; echo back > /v/out; exit 3"
    done = _cli(root, "run", "-d", *LAYER, "-v", f"{directory}:/v", "debian", "sh", "-c", script)
    id = done.stdout.decode().strip()
    _cli(root, "exec", "-d", id, "sh", "-c", "sleep 2; touch /tmp/go")
    root.kill_daemon()
    end = time.monotonic() + 60
    while not (root.path / "envs" / id / "exit.json").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not (directory / "out").exists()
    root.start_daemon()
    assert _cli(root, "wait", id).stdout == b"3\n"
    assert not root.ask("inspect", {"env": id})["reason"]
    assert (directory / "out").read_text() == "back\n"
    _cli(root, "rm", id)


@pytest.mark.soak
def test_a_daemon_killed_while_it_carries_back_leaves_that_to_the_next(fresh_root: Root, directory: Path) -> None:
    root = fresh_root
    n = 0
    while n < 40:
        n += 1
        root.start_daemon()
        for path in directory.iterdir():
            path.unlink()
        (directory / "gone").touch()
        id = _started(root, f"{directory}:/v", "rm /v/gone; echo back > /v/out")
        root.kill_daemon()
        root.start_daemon(ISOLAT_KILL_AT=str(n))
        done = _cli(root, "stop", "-t", "1", id)
        lived = root.daemon_pid() is not None
        root.ensure_daemon()
        if not lived:  # whatever it had done of that
            _cli(root, "stop", "-t", "1", id)
        found = root.until_state(id, "exited")
        assert [path.name for path in directory.iterdir()] == ["out"], (n, done.stderr)
        assert not found["reason"]
        assert not (root.path / "envs" / id / "volumes.tar").exists()
        _cli(root, "rm", id)
        root.kill_daemon()
        if lived and done.returncode == 0:
            break
    assert 3 < n < 40
    root.start_daemon()


def test_stop_gives_time_to_hand_over_and_kills_only_the_application(root: Root, directory: Path) -> None:
    id = _started(root, f"{directory}:/v", "trap '' TERM; echo back > /v/out")
    assert _cli(root, "stop", "-t", "1", id).returncode == 0
    assert (directory / "out").read_text() == "back\n"
    assert root.ask("inspect", {"env": id})["exit"]["signal"] == signal.SIGKILL


def test_a_machine_that_is_killed_copies_nothing_back_and_that_is_said(root: Root, directory: Path) -> None:
    (directory / "in").write_text("as it was")
    id = _started(root, f"{directory}:/v", "echo lost > /v/in; echo lost > /v/out")
    os.kill(qemu(root, id), signal.SIGKILL)
    _cli(root, "wait", id)
    assert (directory / "in").read_text() == "as it was"
    assert not (directory / "out").exists()
    assert "its volumes are as they were" in root.ask("inspect", {"env": id})["reason"]


def test_what_stands_in_the_way_is_said_and_the_rest_comes_back(root: Root, directory: Path) -> None:
    (directory / "d").mkdir()
    id = _started(root, f"{directory}:/v", "rmdir /v/d; echo file > /v/d; echo back > /v/out")
    (directory / "d" / "of somebody").touch()
    _cli(root, "stop", "-t", "1", id)
    assert (directory / "out").read_text() == "back\n"
    assert (directory / "d" / "of somebody").exists()
    assert "not everything in its volumes could be carried back: 0/d:" in root.ask("inspect", {"env": id})["reason"]


@pytest.mark.soak
def test_with_a_full_file_system_nothing_is_forgotten(root: Root, directory: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "volume", str(directory)], check=True)
    try:
        words = (
            "run",
            "--rm",
            *LAYER,
            "-v",
            f"{directory}:/v",
            "debian",
            "sh",
            "-c",
            "head -c 2000000 /dev/zero | tr '\\0' x > /v/big",
        )
        done = _cli(root, *words)
        assert done.returncode == 0
        assert b"could not be carried back: No space left on device" in done.stderr
        (env,) = root.environments()
        archive = root.path / "envs" / env["id"] / "volumes.tar"
        members = subprocess.run(["tar", "-tf", archive], capture_output=True, check=True).stdout
        assert b"0/big" in members
        assert root.ask("inspect", {"env": env["id"]})["state"] == "exited"
        assert [path.name for path in directory.iterdir()] == []
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_what_a_background_process_still_does_is_over(root: Root, directory: Path) -> None:
    script = "(while :; do date +%N > /v/tmp; mv /v/tmp /v/out; done) & sleep 0.5"
    _run(root, f"{directory}:/v", script)
    assert (directory / "out").exists()


def test_a_container_in_a_machine(root: Root, directory: Path) -> None:
    (directory / "in").write_text("told\n")
    layer = ("--layer", "microvm/container", "-m", "192m")
    script = "cat /v/in; echo back > /v/out; stat -c '%u %g' /v/in /v/out"
    assert _run(root, f"{directory}:/v", script, layer=layer) == "told\n0 0\n0 0\n"
    assert (directory / "out").read_text() == "back\n"
    assert (directory / "out").stat().st_uid == 0
    assert _run(root, f"{directory}:/v:ro", "touch /v/x 2>/dev/null || echo closed", layer=layer) == "closed\n"


def test_an_unprivileged_callers_volume_is_theirs_on_both_sides(open_root: Root, directory: Path) -> None:
    os.chown(directory, CALLER, CALLER)
    (directory / "secret").write_text("of root")
    (directory / "secret").chmod(0o600)
    script = "echo back > /v/out; stat -c %u /v /v/out; ls /v"
    words = ("run", "--rm", *LAYER, "-v", f"{directory}:/v", "debian", "sh", "-c", script)
    done = open_root.cli(*words, user=CALLER, group=CALLER, extra_groups=[])
    assert (done.returncode, done.stdout) == (0, b"0\n0\nout\n"), done.stderr
    assert (directory / "out").stat().st_uid == CALLER
    assert (directory / "secret").read_text() == "of root"


def test_a_machine_made_in_advance_gets_its_volumes_when_it_is_taken(fresh_root: Root, directory: Path) -> None:
    root = fresh_root
    root.start_daemon(ISOLAT_WARM="1")
    (directory / "in").write_text("told\n")
    assert _run(root, f"{directory}:/v", "cat /v/in") == "told\n"
    until_warm(root, 1)
    before = time.monotonic()
    assert _run(root, f"{directory}:/v", "cat /v/in; echo back > /v/out") == "told\n"
    print(f"from the pool, with a volume: {time.monotonic() - before:.3f} s")
    assert (directory / "out").read_text() == "back\n"
