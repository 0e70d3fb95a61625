"""`cp` and `export`: what goes in comes out the same, where Docker puts it; nobody inside reaches what is outside."""

from __future__ import annotations

import io
import os
import shutil
import signal
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from isolat.client.sdk import Client
from isolat.errors import CopyFailed, NotFound, Refused, UsageError
from tests.support import traces
from tests.support.roots import Root

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

MIB = 1 << 20
SOAK = pytest.mark.soak
MACHINE = ("--layer", "microvm", "-m", "128m")
STACK = ("--layer", "microvm/container", "-m", "192m")
LAYERS = {"host": ("--layer", "host"), "container": (), "microvm": MACHINE, "microvm/container": STACK}
EVERY = [
    pytest.param(name, marks=SOAK) if name in ("host", "microvm/container") else name
    for name in ("host", "container", "microvm", "microvm/container")
]


def _start(root: Root, layer: str, *options: str, script: str = "exec sleep 600") -> str:
    return root.ok("run", "-d", *LAYERS[layer], *options, "debian", "sh", "-c", script)


def _ended(root: Root, layer: str, script: str, *options: str) -> str:
    id = _start(root, layer, *options, script=script)
    assert root.ok("wait", id) == "0"
    return id


def _cp(root: Root, *words: str, code: int = 0, input: bytes = b"") -> str:
    done = root.cli("cp", *words, input=input)
    assert done.returncode == code, done.stderr.decode()
    return done.stderr.decode()


def _fill(at: Path) -> None:
    """One of everything that may go along."""
    at.mkdir()
    (at / "plain").write_bytes(bytes(range(256)) * 1000)
    os.link(at / "plain", at / "second")
    (at / "away").symlink_to("../../../../../../etc/shadow")
    (at / "absolute").symlink_to("/etc/passwd")
    (at / "dangling").symlink_to("no/where")
    (at / "odd\n\\ \t'name\"").write_text("odd")
    (at / os.fsdecode(b"not-utf8-\xff\xfe")).write_text("bytes")
    (at / ("long" * 60)).mkdir()
    (at / ("long" * 60) / ("deeper" * 40)).touch()
    (at / "-dash").touch()
    (at / "closed").mkdir(0o700)
    (at / "closed" / "secret").touch(0o400)
    (at / "sticky").mkdir()
    (at / "sticky").chmod(0o1777)
    os.mkfifo(at / "fifo", 0o600)
    with (at / "holes").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(700 * MIB)
        file.write(b"here")
    deep = at.joinpath(*["d"] * 150)
    deep.mkdir(parents=True)
    (deep / "end").write_text("deep")
    os.chown(at / "plain", 1000, 2000)
    os.chown(at / "away", 7, 7, follow_symlinks=False)
    for n, path in enumerate(sorted(at.rglob("*"), reverse=True)):
        os.utime(path, ns=(0, n * 10**9 + 123_456_789), follow_symlinks=False)
    os.utime(at / "plain", ns=(0, -1_500_000_000))
    os.utime(at, ns=(0, 55))


def _what(path: Path, owners: bool) -> tuple[object, ...]:
    st = path.lstat()
    kind = stat.S_IFMT(st.st_mode)
    rest: object = path.readlink() if kind == stat.S_IFLNK else None
    if kind == stat.S_IFREG and st.st_size < MIB:
        rest = path.read_bytes()
    links = st.st_nlink if kind == stat.S_IFREG else 0
    return kind, st.st_mode, *((st.st_uid, st.st_gid) if owners else ()), st.st_mtime_ns, links, rest


def _compare(one: Path, other: Path, owners: bool = True) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*"))
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*"))
    for name in (".", *names):
        assert _what(one / name, owners) == _what(other / name, owners), name


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    _fill(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.mark.parametrize("layer", EVERY)
def test_what_goes_in_comes_out_the_same(root: Root, tree: Path, tmp_path: Path, layer: str) -> None:
    id = _start(root, layer)
    _cp(root, "-a", str(tree), f"{id}:/srv")
    _cp(root, str(tree), f"{id}:/srv/plain-owners")
    script = "cd /srv/tree; stat -c %u:%g plain away; stat -c %h second; head -c 4 absolute; stat -c %u:%g ."
    assert root.ok("exec", id, "sh", "-c", script) == "1000:2000\n7:7\n2\nroot0:0"
    script = "find /srv/plain-owners ! -user 0 -o ! -group 0 | wc -l; du -k /srv/tree/holes | cut -f 1"
    others, size = root.ok("exec", id, "sh", "-c", script).split()
    assert (others, int(size) < 200) == ("0", True)
    _cp(root, "-a", f"{id}:/srv/tree", str(tmp_path / "back"))
    _compare(tree, tmp_path / "back")
    assert (tmp_path / "back/holes").stat().st_blocks < 1000
    _cp(root, f"{id}:/srv/tree/.", str(tmp_path / "mine"))
    assert {path.lstat().st_uid for path in (tmp_path / "mine").rglob("*")} == {0}
    _compare(tree, tmp_path / "mine", owners=False)


@pytest.mark.parametrize("layer", ["container", pytest.param("microvm", marks=SOAK)])
def test_a_big_file_goes_there_and_back(root: Root, tmp_path: Path, layer: str) -> None:
    id = _start(root, layer)
    big = tmp_path / "big"
    big.write_bytes(os.urandom(50 * MIB))
    assert "50.0 MiB" in _cp(root, str(big), f"{id}:/big")
    assert "50.0 MiB" in _cp(root, f"{id}:/big", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == big.read_bytes()


@pytest.mark.parametrize("layer", EVERY)
def test_of_one_that_has_ended(root: Root, tree: Path, tmp_path: Path, layer: str) -> None:
    id = _ended(root, layer, "mkdir /srv/x; echo words > /srv/x/f; chown -R 1000:1000 /srv/x; ln -s / /srv/root")
    _cp(root, "-a", f"{id}:/srv/x", str(tmp_path / "x"))
    assert (tmp_path / "x/f").read_text() == "words\n"
    assert (tmp_path / "x/f").stat().st_uid == 1000
    _cp(root, "-a", str(tree), f"{id}:/srv/tree")
    _cp(root, "-a", f"{id}:/srv/tree", str(tmp_path / "back"))
    _compare(tree, tmp_path / "back")
    if layer != "microvm":  # each time a machine is booted
        _cp(root, str(tree / "plain"), f"{id}:/srv/root/srv/through")
        assert {"C /srv", "A /srv/tree/plain", "A /srv/through"} <= set(root.ok("diff", id).splitlines())
    assert not Path("/srv/through").exists()
    directory = Path(root.ask("inspect", {"env": id})["directory"])
    assert not (directory / "opened").exists()
    assert not traces.processes(str(directory))
    assert not traces.mounts(id)


def test_where_it_goes_is_where_docker_puts_it(root: Root, tmp_path: Path) -> None:
    """`docker cp`'s table, row by row, in both directions."""
    id = _start(root, "container")
    here = tmp_path / "here"
    (here / "dir/sub").mkdir(parents=True)
    (here / "dir/f").write_text("f")
    (here / "file").write_text("file")

    def inside(path: str) -> str:
        return root.ok("exec", id, "sh", "-c", f"cd {path} && find . | sort | tr '\\n' ' '").strip()

    root.ok("exec", id, "mkdir", "/t", "/t/dir")
    for words, fails in (
        ((f"{here}/file", f"{id}:/t/new"), ""),
        ((f"{here}/file", f"{id}:/t/no/"), "no such directory"),
        ((f"{here}/file", f"{id}:/t/no/new"), "No such file"),
        ((f"{here}/file", f"{id}:/t/dir"), ""),
        ((f"{here}/dir", f"{id}:/t/new"), "can't be copied to a file"),
        ((f"{here}/dir", f"{id}:/t/made"), ""),
        ((f"{here}/dir", f"{id}:/t/dir"), ""),
        ((f"{here}/dir/.", f"{id}:t/dir"), ""),
        ((f"{here}/none", f"{id}:/t"), "No such file"),
        ((f"{here}/file/", f"{id}:/t"), "Not a directory"),
        ((f"{id}:/t/none", str(here)), "No such file"),
        ((f"{id}:/t/new/", str(here)), "Not a directory"),
    ):
        assert fails in _cp(root, *words, code=125 if fails else 0)
    assert inside("/t") == ". ./dir ./dir/dir ./dir/dir/f ./dir/dir/sub ./dir/f ./dir/file ./dir/sub " + (
        "./made ./made/f ./made/sub ./new"
    )
    out = tmp_path / "out"
    out.mkdir()
    for words, fails in (
        ((f"{id}:/t/new", f"{out}/file"), ""),
        ((f"{id}:/t/new", f"{out}/no/"), "no such directory"),
        ((f"{id}:/t/new", f"{out}/no/new"), "no such directory"),
        ((f"{id}:/t/new", f"{out}/"), ""),
        ((f"{id}:/t/made", f"{out}/file"), "can't be copied to a file"),
        ((f"{id}:/t/made", f"{out}/dir"), ""),
        ((f"{id}:/t/made", f"{out}/dir"), ""),
        ((f"{id}:/t/made/.", f"{out}/dir/sub"), ""),
    ):
        assert fails in _cp(root, *words, code=125 if fails else 0)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == [
        "dir", "dir/f", "dir/made", "dir/made/f", "dir/made/sub", "dir/sub", "dir/sub/f", "dir/sub/sub", "file", "new",
    ]  # fmt: skip


def test_archives_go_through_pipes(root: Root, tree: Path, tmp_path: Path) -> None:
    one, other = _start(root, "container"), _start(root, "container")
    argv = ["tar", "-cz", "-C", str(tree.parent), "tree/plain", "tree/closed"]
    packed = subprocess.run(argv, capture_output=True, check=True)
    _cp(root, "-", f"{one}:/srv", input=packed.stdout)
    assert root.ok("exec", one, "stat", "-c", "%u", "/srv/tree/plain") == "1000"
    assert "No such file" in _cp(root, "-", f"{one}:/none", input=packed.stdout, code=125)
    assert "ends too early" in _cp(root, "-", f"{one}:/srv", input=packed.stdout[:-100], code=125)
    out = root.cli("cp", f"{one}:/srv/tree", "-")
    with tarfile.open(fileobj=io.BytesIO(out.stdout)) as tar:
        assert sorted(tar.getnames()) == ["tree", "tree/closed", "tree/closed/secret", "tree/plain"]
    _cp(root, "-", f"{other}:/", input=out.stdout)
    assert root.ok("exec", other, "stat", "-c", "%u", "/tree/plain") == "1000"
    with root.popen("cp", f"{one}:/usr", "-", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(100)
        process.stdout.close()
        assert process.wait(20) == 141


def test_what_goes_to_a_volume_is_in_the_volume(root: Root, tmp_path: Path) -> None:
    root.ok("volume", "create", "data", "--size", "32m")
    id = _start(root, "container", "-v", "data:/data", "--tmpfs", "/scratch", "--read-only")
    (tmp_path / "f").write_text("words")
    _cp(root, str(tmp_path / "f"), f"{id}:/data")
    _cp(root, str(tmp_path / "f"), f"{id}:/scratch/")
    assert (root.path / "pool/volumes/data/f").read_text() == "words"
    assert "Read-only file system" in _cp(root, str(tmp_path / "f"), f"{id}:/etc", code=125)
    root.ok("rm", "-f", id)
    root.ok("volume", "rm", "data")


def test_what_is_full_is_told(root: Root, tmp_path: Path) -> None:
    id = _start(root, "container", "--disk", "32m")
    (tmp_path / "big").write_bytes(os.urandom(60 * MIB))
    assert "quota" in _cp(root, str(tmp_path / "big"), f"{id}:/big", code=125).lower()


def test_export_is_everything_but_what_is_mounted(root: Root) -> None:
    id = _start(root, "container", "--tmpfs", "/scratch", script="echo x > /scratch/x; echo y > /y; exec sleep 600")
    archive = root.cli("export", id)
    assert archive.returncode == 0, archive.stderr
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        names = set(tar.getnames())
    assert {"./y", "./etc/passwd", "./usr/bin/env", "./proc", "./dev", "./scratch"} <= names
    assert not {name for name in names if name.startswith(("./proc/", "./sys/", "./dev/", "./scratch/"))}
    root.ok("kill", id)
    root.ok("wait", id)
    ended = root.cli("export", id)
    with tarfile.open(fileobj=io.BytesIO(ended.stdout)) as tar:
        assert names <= set(tar.getnames())


@SOAK
def test_an_export_is_an_image_again(fresh_root: Root, tmp_path: Path) -> None:
    root = fresh_root
    id = _ended(root, "container", "echo y > /y; chown 1000 /y; rm /etc/debian_version")
    root.ok("export", "-o", str(tmp_path / "all.tar"), id)
    root.ok("import", str(tmp_path / "all.tar"), "again")
    script = "stat -c %u /y; test -e /etc/debian_version || echo gone; cmp /bin/sh /bin/sh && echo same"
    assert root.ok("run", "--rm", "again", "sh", "-c", script) == "1000\ngone\nsame"


def test_from_python(root: Root, tree: Path, tmp_path: Path) -> None:
    client, heard = Client(root.path), list[int]()
    with client.run("debian", ["sleep", "600"], detach=True) as env:
        copied = env.copy_in(tree, "/srv", owners=True, on_progress=heard.append)
        assert copied.left == ()
        assert heard[-1] == copied.bytes > 256000
        assert env.copy_out("/srv/tree", tmp_path / "back", owners=True).bytes > 256000
        _compare(tree, tmp_path / "back")
        with (tmp_path / "a.tar").open("wb") as file:
            env.copy_out_archive("/srv/tree/plain", file)
        with (tmp_path / "a.tar").open("rb") as file:
            env.copy_in_archive(file, "/tmp")
        assert env.exec(["stat", "-c", "%u", "/tmp/plain"]).text == "1000\n"
        assert {"kind": "A", "path": "/tmp/plain"} in env.diff()
        for wrong, error in (("/none", NotFound), ("/etc/passwd/", UsageError)):
            with pytest.raises(error):
                env.copy_out(wrong, tmp_path / "x")
        left = env.copy_out("/dev", tmp_path / "dev").left
        assert "/dev/null: it is a device" in [line.replace('"', "") for line in left]
    with pytest.raises(NotFound):
        env.copy_in(tree, "/srv")


def test_what_was_not_to_be_written_is_not_when_it_has_ended(root: Root, tmp_path: Path) -> None:
    id = _ended(root, "container", "true", "--read-only")
    with pytest.raises(Refused):
        root.ask("copy_in", {"env": id, "path": "/etc", "name": "0"})
    _cp(root, f"{id}:/etc/passwd", str(tmp_path))


def test_into_one_that_is_in_another(root: Root, tmp_path: Path) -> None:
    outer = _start(root, "microvm")
    inner = root.ok("run", "-d", "--in", outer, "debian", "sh", "-c", "echo own > /own; exec sleep 600")
    (tmp_path / "f").write_text("words")
    _cp(root, str(tmp_path / "f"), f"{inner}:/f")
    _cp(root, f"{inner}:/own", str(tmp_path / "own"))
    assert (tmp_path / "own").read_text() == "own\n"
    assert root.ok("diff", inner) == "A /f\nA /own"
    root.ok("kill", inner)
    root.ok("wait", inner)
    _cp(root, f"{inner}:/f", str(tmp_path / "back"))
    _cp(root, str(tmp_path / "f"), f"{inner}:/after")
    assert root.ok("diff", inner) == "A /after\nA /f\nA /own"
    root.ok("rm", "-f", outer)
    assert "is gone" in _cp(root, f"{inner}:/f", str(tmp_path / "back"), code=125)


# hostile


SWAP = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    mkdir("/swap", 0755);
    mkdir("/swap/d", 0755);
    FILE *canary = fopen("/swap/d/canary", "w");
    fputs("of the inside", canary);
    fclose(canary);
    if (argc != 2 || symlink(argv[1], "/swap/link"))
        return 1;
    int at = open("/swap", O_RDONLY);
    puts("ready");
    fflush(stdout);
    for (;;)
        syscall(SYS_renameat2, at, "d", at, "link", 2);
}
"""


@pytest.fixture(scope="module")
def swapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that exchanges a directory for a link, and back, as quickly as it can be."""
    at = tmp_path_factory.mktemp("swap")
    (at / "swap.c").write_text(SWAP)
    compiler = shutil.which("musl-gcc") or "gcc"
    subprocess.run([compiler, "-static", "-O1", "-o", at / "swapper", at / "swap.c"], check=True)
    return at / "swapper"


@pytest.fixture
def outside() -> Iterator[Path]:
    """What is on this machine, and nobody inside may see or change, at a path that is not there inside."""
    path = Path(tempfile.mkdtemp(prefix="isolat-canary-", dir="/tmp"))
    path.chmod(0o777)
    (path / "canary").write_text("of the host")
    (path / "canary").chmod(0o666)
    yield path
    shutil.rmtree(path)


def _canary_sings(outside: Path) -> None:
    assert [path.name for path in outside.iterdir()] == ["canary"]
    assert (outside / "canary").read_text() == "of the host"


@pytest.mark.parametrize("layer", ["container", pytest.param("host", marks=SOAK), pytest.param("microvm", marks=SOAK)])
def test_who_exchanges_directories_for_links_reaches_nothing(
    root: Root, outside: Path, swapper: Path, tmp_path: Path, layer: str
) -> None:
    """CVE-2018-15664 and its like: a path that is checked, and another one by the time that it is used."""
    id = _start(root, layer)
    _cp(root, str(swapper), f"{id}:/")
    stream = root.exec(id, ["/swapper", str(outside)])
    stream.until_out(b"ready")
    env, codes = Client(root.path).get(id), set[str]()
    (tmp_path / "new").touch()
    for n in range(6):
        for path in ("/swap/d/canary", "/swap/d/", "/swap"):
            target = tmp_path / f"{n}{path.replace('/', '-')}"
            codes.add(_try(lambda p=path, t=target: env.copy_out(p, t)))  # type: ignore[misc]
        for path in ("/swap/d/new", "/swap/d/", "/swap/d/canary"):
            codes.add(_try(lambda p=path: env.copy_in(tmp_path / "new", p)))  # type: ignore[misc]
        assert "of the host" not in root.cli("cp", f"{id}:/swap", "-").stdout.decode(errors="replace")
    root.ok("diff", id)
    _canary_sings(outside)
    found = [path.read_text() for path in tmp_path.rglob("canary") if path.is_file() and not path.is_symlink()]
    assert set(found) <= {"of the inside", ""}
    assert found
    assert "copied" in codes


def _try(work: Callable[[], object]) -> str:
    try:
        work()
    except (NotFound, UsageError, CopyFailed) as error:
        return error.code
    return "copied"


def test_links_of_one_that_has_ended_lead_nowhere(root: Root, outside: Path, tmp_path: Path) -> None:
    id = _ended(root, "container", f"ln -s {outside} /away; ln -s {outside}/canary /canary; ln -s /proc/1/root /magic")
    (tmp_path / "new").touch()
    for path in ("/away/canary", "/away/", "/magic/etc/", "/canary/"):
        _cp(root, f"{id}:{path}", str(tmp_path / "x"), code=125)
    _cp(root, "-L", f"{id}:/canary", str(tmp_path / "x"), code=125)
    for path in ("/away/", "/away/new", "/magic/new", "/canary/"):
        _cp(root, str(tmp_path / "new"), f"{id}:{path}", code=125)
    _canary_sings(outside)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def _evil(name: str, away: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as tar:
        for member, kind, data in (
            ("0", tarfile.DIRTYPE, b""),
            ("0/l", tarfile.SYMTYPE, b""),
            (name, tarfile.REGTYPE, b"evil"),
        ):
            info = tarfile.TarInfo(member)
            info.type, info.size, info.mode = kind, len(data), 0o6777
            info.linkname = str(away) if kind == tarfile.SYMTYPE else ""
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("name", ["0/l/new", "../new", "0/../../new", "/tmp/new", "0/l"])
def test_who_exchanges_the_program_that_copies_reaches_nothing(
    root: Root, outside: Path, tmp_path: Path, name: str
) -> None:
    """CVE-2019-14271 and its like: what copies is taken over. It runs inside, and nobody believes what it says."""
    script = "mv /dev/.isolat /dev/other; mkdir /tmp/evil; ln -s /tmp/evil /dev/.isolat; exec sleep 600"
    id = _start(root, "container", script=f"printf '#!/bin/sh\ncat /tmp/archive' > /tmp/program; {script}")
    program = "cat > /tmp/archive; chmod 755 /tmp/program; mv /tmp/program /tmp/evil/isolat-init"
    root.ok("exec", "-i", id, "sh", "-c", program, input=_evil(name, outside))
    assert root.ok("exec", id, "head", "-c", "2", "/dev/.isolat/isolat-init") == "#!"
    (tmp_path / "out").mkdir()
    done = root.cli("cp", f"{id}:/anything", str(tmp_path / "out"))
    assert done.returncode == (0 if name == "0/l" else 125), done.stderr
    _canary_sings(outside)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not Path("/tmp/new").exists()
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_symlink() or not path.lstat().st_mode & 0o6000


def test_who_says_nothing_is_not_waited_for_longer_than_the_caller_likes(root: Root, tmp_path: Path) -> None:
    id = _start(root, "container", script="mkfifo /f; mkdir /d; exec sleep 600")
    with root.popen("cp", f"{id}:/", str(tmp_path / "all"), stderr=subprocess.PIPE) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130)
    assert _settled(root, id)


def _settled(root: Root, id: str) -> bool:
    """Nothing that copies runs inside any more."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if "--copy" not in root.ok("exec", id, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"):
            return True
        time.sleep(0.1)
    return False


# killed


def test_a_killed_daemon_cuts_nothing_off_that_runs(fresh_root: Root, tmp_path: Path) -> None:
    root = fresh_root
    root.start_daemon()
    id = _start(root, "container", script="head -c 30000000 /dev/zero | tr '\\0' x > /big; exec sleep 600")
    while root.ok("exec", id, "stat", "-c", "%s", "/big") != "30000000":
        time.sleep(0.05)
    with root.popen("cp", f"{id}:/big", "-", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1000)
        root.kill_daemon()
        rest = process.stdout.read()
        assert process.wait(30) == 0
    with tarfile.open(fileobj=io.BytesIO(first + rest)) as tar:
        assert tar.getmember("big").size == 30_000_000
    root.start_daemon()
    assert _settled(root, id)


@pytest.mark.parametrize(
    ("layer", "moments"),
    [
        ("container", (2, 4)),
        pytest.param("container", range(1, 40), marks=SOAK),
        pytest.param("microvm", range(1, 40), marks=SOAK),
    ],
)
def test_a_killed_daemon_leaves_nothing_open(
    fresh_root: Root, tmp_path: Path, layer: str, moments: Sequence[int]
) -> None:
    """Killed while it copies from and to one that has ended: at every moment that it has there, or two of them."""
    root = fresh_root
    root.start_daemon()
    id = _ended(root, layer, "echo words > /f")
    directory = Path(root.ask("inspect", {"env": id})["directory"])
    (tmp_path / "f").write_text("new")
    for n in moments:
        root.kill_daemon()
        root.start_daemon(ISOLAT_KILL_AT=str(n))
        codes = [root.cli("cp", f"{id}:/f", str(tmp_path / "out")).returncode]
        codes.append(root.cli("cp", str(tmp_path / "f"), f"{id}:/f{n}").returncode)
        if root.daemon_pid() is None:
            root.start_daemon()
        root.ask("ps")
        assert not (directory / "opened").exists()
        assert not traces.processes(str(directory / "opened"))
        assert not traces.mounts(f"{id}/rootfs")
        if codes == [0, 0]:
            break
    assert n > 2
    assert root.ok("diff", id).splitlines()[-1].startswith("A /f")
    root.ok("rm", id)


def test_one_that_is_copied_from_is_not_removed_meanwhile(root: Root) -> None:
    id = _ended(root, "container", "head -c 9000000 /dev/zero > /big")
    with root.popen("cp", f"{id}:/big", "-", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        done = root.cli("rm", id)
        assert (done.returncode, b"busy" in done.stderr) == (125, True)
        process.stdout.read()
        assert process.wait(20) == 0
    root.ok("rm", id)


def test_one_that_ends_meanwhile_is_told(root: Root) -> None:
    id = _start(root, "container")
    with root.popen("cp", f"{id}:/usr", "-", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        root.ok("rm", "-f", id)
        process.stdout.read()
        assert process.wait(20) == 125
        said = process.stderr.read()
        assert b"it ended while" in said or b"killed by signal 9" in said, said
