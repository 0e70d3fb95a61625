"""What an overlay's upper directory says, as a list and as a layer: against overlays that the kernel made."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
AGENT = REPOSITORY / "native/build/isolat-agent"
SHIFT = 1 << 30
FAILED = 1
NOBODY = 0xFFFFFFFF

pytestmark = pytest.mark.root


class Overlay:
    """Mounted in a mount namespace for each script; the directories stay."""

    def __init__(self, at: Path) -> None:
        self.lower, self.upper, self.work, self.at = (at / name for name in ("lower", "upper", "work", "merged"))
        for path in (self.lower, self.upper, self.work, self.at):
            path.mkdir()

    def change(self, script: str) -> None:
        options = f"lowerdir={self.lower},upperdir={self.upper},workdir={self.work}"
        program = f"mount -t overlay x -o {options} {self.at} && cd {self.at} && {{ {script}\n}}"
        subprocess.run(["unshare", "-m", "bash", "-ec", program], check=True, timeout=60)

    def _run(self, how: str, *options: str) -> bytes:
        argv = [str(AGENT), how, *options, str(self.upper), str(self.lower)]
        done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def changes(self, *options: str) -> list[str]:
        entries = self._run("--changes", *options).decode().split("\0")[:-1]
        return sorted((f"{entry[:1]} {entry[1:]}" for entry in entries), key=lambda line: line[2:])

    def layer(self, *options: str) -> dict[str, tarfile.TarInfo]:
        with tarfile.open(fileobj=io.BytesIO(self._run("--layer", *options))) as tar:
            return {member.name: member for member in tar}


@pytest.fixture
def overlay(tmp_path: Path) -> Overlay:
    made = Overlay(tmp_path)
    for name in ("etc", "etc/default", "var", "var/lib", "usr/share"):
        (made.lower / name).mkdir(parents=True, exist_ok=True)
    for name in ("etc/passwd", "etc/group", "etc/default/one", "etc/default/two", "var/lib/data"):
        (made.lower / name).write_text(f"{name}\n")
    return made


def test_nothing_is_changed_by_looking(overlay: Overlay) -> None:
    overlay.change("cat etc/passwd >/dev/null; ls -lR >/dev/null")
    assert overlay.changes() == []
    assert set(overlay.layer()) == {"."}


def test_added_changed_deleted_as_docker_tells_it(overlay: Overlay) -> None:
    overlay.change("echo new > etc/new; echo more >> etc/group; rm etc/passwd; mkdir -p srv/deep; touch srv/deep/f")
    assert overlay.changes() == [
        "C etc", "C etc/group", "A etc/new", "D etc/passwd", "A srv", "A srv/deep", "A srv/deep/f",
    ]  # fmt: skip


def test_what_was_only_copied_up_is_not_changed(overlay: Overlay) -> None:
    """Opened for writing and not written; a directory whose time alone is another."""
    overlay.change(": >> etc/passwd; touch -d @5 var; touch etc/x; rm etc/x")
    assert overlay.changes() == []


def test_modes_and_owners_are_changes_of_directories_too(overlay: Overlay) -> None:
    overlay.change("chmod 700 var/lib; chown 5 usr")
    assert overlay.changes() == ["C usr", "C var", "C var/lib"]


def test_a_directory_that_was_made_anew(overlay: Overlay) -> None:
    overlay.change("rm -r etc/default; mkdir etc/default; echo only > etc/default/only; echo again > etc/default/two")
    assert overlay.changes() == [
        "C etc", "C etc/default", "D etc/default/one", "A etc/default/only", "A etc/default/two",
    ]  # fmt: skip
    found = overlay.layer()
    assert found["etc/default/.wh..wh..opq"].size == 0
    assert "etc/default/.wh.one" not in found


def test_kinds_that_were_exchanged(overlay: Overlay) -> None:
    overlay.change("rm -r etc/default; echo f > etc/default; rm etc/group; mkdir etc/group; touch etc/group/x")
    assert overlay.changes() == ["C etc", "C etc/default", "C etc/group", "A etc/group/x"]
    found = overlay.layer()
    assert (found["etc/default"].isreg(), found["etc/group"].isdir()) == (True, True)


def test_a_layer_has_everything(overlay: Overlay) -> None:
    overlay.change(
        "rm etc/passwd; echo x > var/a; ln var/a var/b; ln -s ../away var/l; mkfifo var/p; mknod var/n c 1 3;"
        "truncate -s 1G var/holes; chown 1000:2000 var/a; chmod 4755 var/a; touch -d @1500000000.123456789 var/a"
    )
    found = overlay.layer()
    assert found["etc/.wh.passwd"].isreg()
    assert (found["var/a"].mode, found["var/a"].uid, found["var/a"].gid) == (0o4755, 1000, 2000)
    assert found["var/a"].pax_headers["mtime"] == "1500000000.123456789"
    assert (found["var/b"].islnk(), found["var/b"].linkname) == (True, "var/a")
    assert found["var/l"].linkname == "../away"
    assert found["var/p"].isfifo()
    assert (found["var/n"].ischr(), found["var/n"].devmajor, found["var/n"].devminor) == (True, 1, 3)
    assert found["var/holes"].size == 1 << 30
    names = list(found)
    assert names.index("etc") < names.index("etc/.wh.passwd")


def test_owners_and_capabilities_are_those_of_the_inside(overlay: Overlay) -> None:
    """A capability for root of the environment (version 3) becomes one for root."""
    overlay.change("echo x > var/a; echo y > var/b; setfacl -m u:1000:r var/b 2>/dev/null || true")
    for path in (overlay.upper, *overlay.upper.rglob("*")):
        os.chown(path, SHIFT, SHIFT)
    os.chown(overlay.upper / "var/a", SHIFT + 1000, SHIFT + 1)
    third = struct.pack("<6I", 0x03000001, 1 << 10, 0, 0, 0, SHIFT)
    os.setxattr(overlay.upper / "var/a", "security.capability", third)
    entries = ((1, 6, NOBODY), (2, 4, SHIFT + 7), (4, 4, NOBODY), (16, 4, NOBODY), (32, 4, NOBODY))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(overlay.upper / "var/b", "system.posix_acl_access", acl)
    found = overlay.layer("--shift", str(SHIFT))
    assert (found["var/a"].uid, found["var/a"].gid, found["var"].uid) == (1000, 1, 0)
    raw = found["var/a"].pax_headers["SCHILY.xattr.security.capability"].encode("utf-8", "surrogateescape")
    assert raw == struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
    kept = found["var/b"].pax_headers["SCHILY.xattr.system.posix_acl_access"].encode("utf-8", "surrogateescape")
    assert struct.unpack_from("<HHI", kept, 12) == (2, 4, 7)
    assert not [key for member in found.values() for key in member.pax_headers if "overlay" in key]


def test_what_belongs_to_nobody_inside_ends_it(overlay: Overlay) -> None:
    overlay.change("echo x > var/a")
    argv = [str(AGENT), "--layer", "--shift", str(SHIFT), str(overlay.upper), str(overlay.lower)]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    assert done.returncode == FAILED
    assert b"belongs to nobody inside" in done.stderr


def test_what_was_moved_and_not_copied_ends_it(overlay: Overlay) -> None:
    overlay.change("mkdir srv")
    os.setxattr(overlay.upper / "srv", "trusted.overlay.redirect", b"/etc")
    argv = [str(AGENT), "--layer", str(overlay.upper), str(overlay.lower)]
    assert subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode == FAILED


def test_what_was_put_there_from_outside_is_not_told(overlay: Overlay) -> None:
    own = [word for name in ("etc/hostname", "etc/hosts") for word in ("--own", name)]
    mounts = [word for name in ("etc/resolv.conf", "data/a/b", "var/lib/mnt", "srv/x") for word in ("--mount", name)]
    overlay.change(
        "echo h > etc/hostname; echo h > etc/hosts; : > etc/resolv.conf; mkdir -p data/a/b var/lib/mnt srv/x;"
        " echo own > srv/own"
    )
    assert overlay.changes(*own, *mounts) == ["A srv", "A srv/own"]
    assert set(overlay.layer(*own, *mounts)) == {".", "etc", "var", "var/lib", "srv", "srv/own"}
    overlay.change("echo data > data/a/b/kept")
    assert "A data/a/b/kept" in overlay.changes(*own, *mounts)


def test_names_that_a_layer_can_not_have_are_left_out(overlay: Overlay) -> None:
    overlay.change("touch var/.wh.evil; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"var/s\")'")
    argv = [str(AGENT), "--layer", str(overlay.upper), str(overlay.lower)]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=True)
    assert done.stderr.count(b"left out: ") == 2
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert tar.getnames() == [".", "var"]


def test_directories_that_a_layer_can_not_have_are_left_out_with_all_that_is_in_them(overlay: Overlay) -> None:
    """Else whoever may make one beside a file of the image has it removed from the next one."""
    overlay.change("mkdir -p etc/.wh.passwd var/.wh.d/deep; echo words > var/.wh.d/deep/x; ln var/.wh.d/deep/x var/y")
    found = overlay.layer()
    assert set(found) == {".", "etc", "var", "var/y"}
    assert (found["var/y"].isreg(), found["var/y"].size) == (True, 6)


def test_a_files_first_name_that_is_kept_has_its_content(overlay: Overlay) -> None:
    """Whatever the others are called; of what is left out under each of its names nothing is there."""
    overlay.change(
        "echo words > var/.wh.a; ln var/.wh.a var/.wh.b; ln var/.wh.a var/x; ln var/x var/y; mkfifo var/.wh.p;"
        "ln var/.wh.p var/q; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"var/s\")'; ln var/s var/t"
    )
    found = overlay.layer()
    assert set(found) == {".", "var", "var/q", "var/x", "var/y"}
    assert (found["var/x"].isreg(), found["var/x"].size) == (True, 6)
    assert (found["var/y"].islnk(), found["var/y"].linkname) == (True, "var/x")
    assert found["var/q"].isfifo()


def test_the_same_content_is_the_same_layer(overlay: Overlay) -> None:
    overlay.change("for n in $(seq 200); do echo $n > var/$n; done; touch -d @7 var/* var .; rm etc/passwd")
    one = overlay._run("--layer")
    assert one == overlay._run("--layer")


def test_links_of_the_upper_directory_are_never_followed(overlay: Overlay, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/canary").write_text("sings")
    overlay.change(f"ln -s {tmp_path}/outside away; ln -s {tmp_path}/outside/canary etc/link; rm -r var")
    assert overlay.changes() == ["A away", "C etc", "A etc/link", "D var"]
    assert b"sings" not in overlay._run("--layer")


# standing still


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with a process that counts."""
    v1, v2 = Path("/sys/fs/cgroup/freezer"), Path("/sys/fs/cgroup")
    parent = v1 if v1.is_dir() else v2
    path = parent / f"isolat-test-{os.getpid()}"
    path.mkdir()
    yield path
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the group is not empty")


def _file(group: Path) -> Path:
    return next(file for name in ("freezer.state", "cgroup.freeze") if (file := group / name).exists())


def test_who_writes_stands_still_meanwhile_and_goes_on_afterwards(overlay: Overlay, group: Path) -> None:
    overlay.change("head -c 30000000 /dev/urandom > big")
    counting = f"echo $$ > {group}/cgroup.procs; n=0; while :; do n=$((n+1)); echo $n > {overlay.upper}/count; done"
    with subprocess.Popen(["bash", "-c", counting], stderr=subprocess.DEVNULL) as counter:
        while not (overlay.upper / "count").exists():
            time.sleep(0.01)
        argv = [str(AGENT), "--layer", "--freeze", str(_file(group)), str(overlay.upper), str(overlay.lower)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as layer:
            assert layer.stdout is not None
            first = layer.stdout.read(1)
            at = (overlay.upper / "count").read_text()
            time.sleep(0.2)
            assert (overlay.upper / "count").read_text() == at
            rest = layer.stdout.read()
        with tarfile.open(fileobj=io.BytesIO(first + rest)) as tar:
            count = tar.extractfile("count")
            assert count is not None
            assert count.read().decode() == at
        end = time.monotonic() + 10
        while (overlay.upper / "count").read_text() in (at, ""):
            assert time.monotonic() < end
        counter.kill()
    (overlay.upper / "count").unlink()


def test_nobody_stays_frozen_when_nobody_reads_any_more(overlay: Overlay, group: Path) -> None:
    overlay.change("head -c 3000000 /dev/urandom > big")
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        (group / "cgroup.procs").write_text(str(sleeper.pid))
        argv = [str(AGENT), "--layer", "--freeze", str(_file(group)), str(overlay.upper), str(overlay.lower)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as layer:
            assert layer.stdout is not None
            layer.stdout.read(1)
            layer.stdout.close()
            assert layer.wait(20) == FAILED
        assert _file(group).read_text().strip() in ("THAWED", "0")
        sleeper.kill()


def test_who_exchanges_directories_meanwhile_gets_nothing_of_others_in(overlay: Overlay, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/canary").write_text("sings")
    overlay.change(f"mkdir d; echo own > d/canary; ln -s {tmp_path}/outside l")
    over = threading.Event()

    def exchange() -> None:
        while not over.is_set():
            (overlay.upper / "d").rename(overlay.upper / "x")
            (overlay.upper / "l").rename(overlay.upper / "d")
            (overlay.upper / "d").rename(overlay.upper / "l")
            (overlay.upper / "x").rename(overlay.upper / "d")

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(50):
            assert b"sings" not in overlay._run("--layer")
    finally:
        over.set()
        thread.join()
