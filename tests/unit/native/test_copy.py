"""An environment's files as an archive and back: where things go, and that links of the inside lead nowhere else.

The root is a directory here, and the program changes its root to that, as it does for one that has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import random
import socket
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
BUILD = REPOSITORY / "native" / "build"
FAILED, ABSENT, REFUSED = 1, 3, 4  # native/copy.h
RENAME_EXCHANGE = 2
RENAMEAT2 = {"x86_64": 316, "aarch64": 276}

pytestmark = pytest.mark.root  # chroot(2)


def _run(*words: object, input: bytes = b"", build: Path = BUILD) -> subprocess.CompletedProcess[bytes]:
    argv = [str(build / "isolat-agent"), *(str(word) for word in words)]
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(argv, input=input, capture_output=True, timeout=60, check=False, env=env)


def _out(root: Path, path: str, *options: str, name: str = "0") -> tuple[bytes, list[tarfile.TarInfo]]:
    done = _run("--copy-out", "--root", root, *options, path, name)
    assert done.returncode == 0, done.stderr
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        return done.stdout, tar.getmembers()


def _in(root: Path, path: str, data: bytes, *options: str, name: str = "it", code: int = 0) -> str:
    done = _run("--copy-in", "--root", root, *options, path, name, input=data)
    assert done.returncode == code, done.stderr
    return done.stderr.decode()


def _archive(fill: Callable[[tarfile.TarFile], None], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=form) as tar:
        fill(tar)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", target: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.uid, info.mode = kind, len(data), target, 77, 0o750
    tar.addfile(info, io.BytesIO(data))


FILE = _archive(lambda tar: _add(tar, "0", data=b"words"))


def _tree_members(tar: tarfile.TarFile) -> None:
    _add(tar, "0", tarfile.DIRTYPE)
    _add(tar, "0/f", data=b"words")
    _add(tar, "0/d", tarfile.DIRTYPE)
    _add(tar, "0/d/l", tarfile.SYMTYPE, target="/etc/passwd")


TREE = _archive(_tree_members)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An environment's root, beside something that nobody may touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/canary").write_text("sings\n")
    at = tmp_path / "root"
    (at / "etc").mkdir(parents=True)
    (at / "etc/passwd").write_text("of the inside")
    (at / "there").mkdir()
    (at / "file").write_text("old")
    return at


def _canary_sings(root: Path) -> None:
    outside = root.parent / "outside"
    assert [path.name for path in outside.iterdir()] == ["canary"]
    assert (outside / "canary").read_text() == "sings\n"


# where things go


@pytest.mark.parametrize(
    ("path", "lands"),
    [("/new", "new"), ("/file", "file"), ("/there", "there/it"), ("/there/", "there/it"), ("there/x", "there/x")],
)
def test_a_file_goes_where_docker_puts_it(root: Path, path: str, lands: str) -> None:
    _in(root, path, FILE)
    assert (root / lands).read_bytes() == b"words"
    assert ((root / lands).stat().st_uid, (root / lands).stat().st_mode & 0o777) == (0, 0o750)


@pytest.mark.parametrize(
    ("path", "data", "code", "why"),
    [
        ("/new/", FILE, ABSENT, "no such directory"),
        ("/no/new", FILE, ABSENT, "No such file"),
        ("/file/", FILE, REFUSED, "Not a directory"),
        ("/file/x", FILE, REFUSED, "Not a directory"),
        ("/file", TREE, REFUSED, "can't be copied to a file"),
        ("/no/new", TREE, ABSENT, "No such file"),
    ],
)
def test_what_has_no_place_is_refused(root: Path, path: str, data: bytes, code: int, why: str) -> None:
    before = sorted(str(one) for one in root.rglob("*"))
    assert why in _in(root, path, data, code=code)
    assert sorted(str(one) for one in root.rglob("*")) == before
    assert (root / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("path", "options", "lands"),
    [("/new", (), "new"), ("/new", ("--contents",), "new"), ("/new/", (), "new"), ("/there", (), "there/it"),
     ("/there", ("--contents",), "there"), ("/", (), "it"), ("/", ("--contents",), "")],
)  # fmt: skip
def test_a_directory_goes_where_docker_puts_it(root: Path, path: str, options: tuple[str, ...], lands: str) -> None:
    mode = stat.S_IMODE(root.stat().st_mode)
    _in(root, path, TREE, *options)
    assert (root / lands / "f").read_bytes() == b"words"
    assert (root / lands / "d/l").readlink() == Path("/etc/passwd")
    assert stat.S_IMODE(root.stat().st_mode) == mode


def test_what_is_there_is_replaced_and_a_directory_stays_one(root: Path) -> None:
    _in(root, "/there", TREE)
    (root / "there/it/own").write_text("mine")
    (root / "there/it/f").unlink()
    (root / "there/it/f").symlink_to("../../file")
    _in(root, "/there", TREE)
    assert (root / "there/it/f").read_bytes() == b"words"
    assert not (root / "there/it/f").is_symlink()
    assert (root / "file").read_text() == "old"
    assert (root / "there/it/own").read_text() == "mine"
    (root / "there/it/f").unlink()
    (root / "there/it/f").mkdir()
    assert "Is a directory" in _in(root, "/there", TREE, code=FAILED)


def test_owners_are_roots_or_the_archives(root: Path) -> None:
    _in(root, "/a", TREE)
    _in(root, "/b", TREE, "--owners")
    for name, uid in (("a", 0), ("b", 77)):
        assert {path.lstat().st_uid for path in ((root / name), *(root / name).rglob("*"))} == {uid}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_of_somebodys_own_goes_below_a_directory(root: Path, form: int) -> None:
    long = "/".join(["long" * 20] * 8)

    def fill(tar: tarfile.TarFile) -> None:
        _add(tar, "./", tarfile.DIRTYPE)
        _add(tar, "./bin/tool", data=b"tool")
        _add(tar, "/absolute", data=b"inside all the same")
        _add(tar, long, data=b"far")
        _add(tar, "further", tarfile.LNKTYPE, target="./bin/tool")

    (root / "bin").symlink_to("/there")
    before = root.stat().st_mode
    _in(root, "/", _archive(fill, form), "--archive", "--owners", name="")
    assert (root / "there/tool").read_bytes() == (root / "further").read_bytes() == b"tool"
    assert (root / "bin").is_symlink()
    assert (root / long).read_bytes() == b"far"
    assert (root / "absolute").stat().st_uid == 77
    assert root.stat().st_mode == before
    assert "No such file" in _in(root, "/no", _archive(fill, form), "--archive", name="", code=ABSENT)


def test_gnu_tars_archives_are_read(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / ("x" * 120)).mkdir(parents=True)
    with (source / ("x" * 120) / "holes").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"here")
    for words in (["--format=gnu", "--exclude=holes"], ["--format=pax", "-S"]):
        argv = ["tar", "-c", "-C", str(source), *words, "."]
        made = subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout
        _in(root, "/there", made, "--archive", name="")
        assert (root / "there" / ("x" * 120)).is_dir()
    st = (root / "there" / ("x" * 120) / "holes").stat()
    assert (st.st_size, st.st_blocks < 100) == (1 << 30, True)


@pytest.mark.parametrize(("link", "lands"), [("new", "new"), ("second/", "there/new"), ("there//second", "there/new")])
def test_slashes_behind_a_link_change_nothing_about_where_it_leads(root: Path, link: str, lands: str) -> None:
    (root / "first").symlink_to(link)
    (root / "second").symlink_to("there/second")
    (root / "there/second").symlink_to("new")
    _in(root, "/first//", TREE)
    assert (root / lands / "f").read_bytes() == b"words"
    assert len(list(root.iterdir())) == 5 + (lands == "new")


def test_names_with_more_slashes_and_dots_than_they_need_are_names(root: Path) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        for name in ("d//", "d//.///a", ".//d/./b/."):
            _add(tar, name, *((b"0", name.encode()) if "a" in name else (tarfile.DIRTYPE,)))
        _add(tar, "//.hidden", tarfile.LNKTYPE, target="d/.//a")
        _add(tar, "..a", data=b"no parent")

    _in(root, "/there", _archive(fill), "--archive", name="")
    assert (root / "there/d/b").is_dir()
    assert (root / "there/.hidden").read_bytes() == (root / "there/d/a").read_bytes() == b"d//.///a"
    assert (root / "there/..a").exists()
    _in(root, "/there", _archive(lambda tar: _add(tar, "d/../x")), "--archive", name="", code=FAILED)


def test_devices_of_an_archive_are_left_out_and_told(root: Path) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        _add(tar, "null", tarfile.CHRTYPE)
        _add(tar, "disk", tarfile.BLKTYPE)
        _add(tar, "after", data=b"words")

    told = _in(root, "/there", _archive(fill), "--archive", name="")
    assert told == 'left out: "null": it is a device\nleft out: "disk": it is a device\n'
    assert [path.name for path in (root / "there").iterdir()] == ["after"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("id", [2**32 - 1, 2**32, 2**32 + 5])
@pytest.mark.parametrize("which", ["uid", "gid"])
def test_what_is_no_owner_does_not_become_roots(root: Path, form: int, id: int, which: str) -> None:
    info = tarfile.TarInfo("x")
    info.mode = 0o4755
    setattr(info, which, id)
    archive = _archive(lambda tar: tar.addfile(info), form)
    assert "damaged" in _in(root, "/there", archive, "--archive", "--owners", name="", code=FAILED)
    assert not list((root / "there").iterdir())


@pytest.mark.parametrize(("kind", "words"), [(b"S", "--format=pax"), (b"Z", "no such kind")])
def test_kinds_that_are_not_read_are_named(root: Path, kind: bytes, words: str) -> None:
    archive = _archive(lambda tar: _add(tar, "x", kind))
    assert words in _in(root, "/there", archive, "--archive", name="", code=FAILED)


@pytest.mark.parametrize("length", [150, 2000])
def test_records_of_an_entry_stay_its_own_beside_a_long_name(root: Path, length: int) -> None:
    """Of two headers before an entry the second took the first one's memory, or gave it back."""
    build = BUILD / "sanitize" if (BUILD / "sanitize/isolat-agent").exists() else BUILD
    info = tarfile.TarInfo("x")
    info.pax_headers = {"SCHILY.xattr.user.note": "kept" * 20}
    name = "/".join(["d" * 50] * (length // 50))
    both = info.tobuf(tarfile.PAX_FORMAT)[:1024] + _archive(lambda tar: _add(tar, name), tarfile.GNU_FORMAT)
    done = _run("--copy-in", "--root", root, "--archive", "--owners", "/", "", input=both, build=build)
    assert done.returncode == 0, done.stderr
    assert (root / name).is_file()
    if _has_attributes(root):
        assert os.getxattr(root / name, "user.note") == b"kept" * 20


def _has_attributes(root: Path) -> bool:
    try:
        os.setxattr(root / "file", "user.note", b"")
    except OSError:
        return False
    return True


def test_a_directory_that_is_no_more_leaves_the_others_no_less_open(root: Path) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        _add(tar, "first", tarfile.DIRTYPE)
        _add(tar, "way", tarfile.SYMTYPE, target="first")
        _add(tar, "way/sub", tarfile.DIRTYPE)
        _add(tar, "way", tarfile.SYMTYPE, target="nowhere")

    assert "way/sub" in _in(root, "/there", _archive(fill), "--archive", name="", code=FAILED)
    assert stat.S_IMODE((root / "there/first").stat().st_mode) == 0o750


# whole or not at all


def _again(tar: tarfile.TarFile) -> None:
    _add(tar, "a", data=b"words")
    _add(tar, "a", tarfile.LNKTYPE, target="./a")
    _add(tar, "b", tarfile.LNKTYPE, target="a")
    _add(tar, "b", tarfile.LNKTYPE, target="a")


def test_a_name_that_is_a_further_name_of_itself_stays(root: Path) -> None:
    _in(root, "/there", _archive(_again), "--archive", name="")
    assert (root / "there/a").read_bytes() == (root / "there/b").read_bytes() == b"words"
    assert sorted(os.listdir(root / "there")) == ["a", "b"]  # noqa: PTH208
    assert (root / "there/a").stat().st_nlink == 2


def _one_big(tar: tarfile.TarFile) -> None:
    _add(tar, "0", data=os.urandom(3 << 20))


BIG = _archive(_one_big)


@pytest.fixture(params=["of proc", "without proc"])
def without_proc(request: pytest.FixtureRequest) -> list[str]:
    """Words in front of the program. Files without a name get one through /proc, where there is one."""
    if request.param == "of proc":
        return []
    return ["unshare", "-m", "sh", "-c", 'mount -t tmpfs x /proc && exec "$@"', "sh"]


def test_what_is_cut_off_leaves_what_was_there(root: Path, without_proc: list[str]) -> None:
    before = (root / "file").stat().st_ino
    for path, cut in (("/file", 1 << 20), ("/new", 1 << 20), ("/there", 2 << 20)):
        argv = [*without_proc, str(BUILD / "isolat-agent"), "--copy-in", "--root", str(root), path, "it"]
        done = subprocess.run(argv, input=BIG[:cut], capture_output=True, timeout=60, check=False)
        assert (done.returncode, b"ends too early" in done.stderr or b"Bad message" in done.stderr) == (FAILED, True)
    assert ((root / "file").read_text(), (root / "file").stat().st_ino) == ("old", before)
    assert sorted(path.name for path in root.iterdir()) == ["etc", "file", "there"]
    assert not list((root / "there").iterdir())
    argv = [*without_proc, str(BUILD / "isolat-agent"), "--copy-in", "--root", str(root), "/file", "it"]
    subprocess.run(argv, input=BIG, capture_output=True, timeout=60, check=True)
    assert ((root / "file").stat().st_size, (root / "file").stat().st_mode & 0o777) == (3 << 20, 0o750)
    assert sorted(path.name for path in root.iterdir()) == ["etc", "file", "there"]


def test_who_kills_it_finds_what_was_there_and_nothing_else(root: Path) -> None:
    argv = [str(BUILD / "isolat-agent"), "--copy-in", "--root", str(root), "/file", "it"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(BIG[: 2 << 20])
        process.stdin.flush()
        end = time.monotonic() + 20
        while not any("root/#" in target or "(deleted)" in target for target in _open_files(process.pid)):
            assert time.monotonic() < end
        process.kill()
    assert (root / "file").read_text() == "old"
    assert sorted(path.name for path in root.iterdir()) == ["etc", "file", "there"]


def _open_files(pid: int) -> list[str]:
    return [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]


@pytest.mark.parametrize("old", [200, 2])
def test_where_there_is_no_room_left_nothing_is_lost(root: Path, old: int) -> None:
    """Neither what is old and large, which would make some room, nor what is small."""
    data = root.parent / "data"
    data.write_bytes(BIG)
    program = (
        f"mount -t tmpfs -o size=1m x {root}/there && head -c {old}k /dev/zero | tr '\\0' x > {root}/there/it;"
        f" {BUILD}/isolat-agent --copy-in --root {root} /there it < {data}; echo $?;"
        f" stat -c %s {root}/there/it; ls -A {root}/there"
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", program], capture_output=True, timeout=60, check=True)
    assert done.stdout.decode().split() == ["1", str(old << 10), "it"], done.stderr
    assert b"No space left" in done.stderr


def test_what_is_mounted_on_is_written_to(root: Path) -> None:
    (root.parent / "hosts").write_text("a long line that was there before\n")
    data = root.parent / "data"
    data.write_bytes(FILE)
    copying = f"{BUILD}/isolat-agent --copy-in --root {root} /file it < {data}"
    program = f"mount --bind {root.parent}/hosts {root}/file && {copying}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (root.parent / "hosts").read_text() == "words"
    assert (root / "file").read_text() == "old"
    assert sorted(path.name for path in root.iterdir()) == ["etc", "file", "there"]


def test_in_an_overlay_names_are_taken_as_anywhere(root: Path) -> None:
    for name in ("up", "work", "merged"):
        (root.parent / name).mkdir()
    data, at = root.parent / "data", root.parent
    data.write_bytes(_archive(_again))
    program = (
        f"mount -t overlay x -o lowerdir={root},upperdir={at}/up,workdir={at}/work {at}/merged &&"
        f" echo o > {at}/merged/b;"
        f" for n in 1 2; do {BUILD}/isolat-agent --copy-in --root {at}/merged --archive / '' < {data} || exit; done;"
        f" cat {at}/merged/a {at}/merged/b; ls -A {at}/merged"
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.decode()) == (0, "wordswordsa\nb\netc\nfile\nthere\n"), done.stderr


# what comes out


def _fill(at: Path) -> None:
    """One of everything."""
    at.mkdir()
    (at / "plain").write_text("words\n")
    os.link(at / "plain", at / "second")
    (at / "link").symlink_to("../../../../../../etc/passwd")
    (at / "odd\n\\ name").write_text("")
    (at / "closed").mkdir(0o700)
    os.mkfifo(at / "fifo", 0o600)
    (at / "set").touch()
    (at / "set").chmod(0o6755)
    with (at / "holes").open("wb") as file:
        file.truncate(3 << 30)
        file.seek(1 << 30)
        file.write(b"here" * 5000)
    deep = at
    for _ in range(200):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "end").write_text("deep")
    os.chown(at / "plain", 1000, 2000)
    for n, path in enumerate(sorted(at.rglob("*"), reverse=True)):
        os.utime(path, ns=(0, n * 10**9 + 123_456_789), follow_symlinks=False)
    os.utime(at / "plain", ns=(0, -123_456_789))
    os.utime(at, ns=(0, 55))


def _what(path: Path) -> tuple[object, ...]:
    st = path.lstat()
    kind = stat.S_IFMT(st.st_mode)
    rest: object = path.readlink() if kind == stat.S_IFLNK else None
    if kind == stat.S_IFREG and st.st_size < 1 << 20:
        rest = path.read_bytes()
    return kind, st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns, st.st_nlink if kind == stat.S_IFREG else 0, rest


def _compare(one: Path, other: Path) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*"))
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*"))
    for name in (".", *names):
        assert _what(one / name) == _what(other / name), name


def test_what_comes_out_and_goes_in_again_is_the_same(root: Path) -> None:
    _fill(root / "tree")
    data, _ = _out(root, "/tree")
    assert len(data) < 2 << 20
    _in(root, "/other", data, "--owners")
    _compare(root / "tree", root / "other")
    st = (root / "other/holes").stat()
    assert (st.st_size, st.st_blocks < 200) == (3 << 30, True)
    with (root / "other/holes").open("rb") as file:
        file.seek(1 << 30)
        assert file.read(20008) == b"here" * 5000 + bytes(8)


def test_attributes_go_along(root: Path) -> None:
    (root / "file").write_text("#!")
    try:
        os.setxattr(root / "file", "user.note", b"kept\0\n=")
    except OSError:
        pytest.skip("this file system has no attributes of users")
    os.setxattr(root / "file", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    data, _ = _out(root, "/file")
    _in(root, "/there", data, "--owners")
    for name in ("user.note", "security.capability"):
        assert os.getxattr(root / "there/it", name) == os.getxattr(root / "file", name)
    _in(root, "/plain", data)
    assert os.listxattr(root / "plain") == []


def test_no_number_of_attributes_ends_it(root: Path) -> None:
    """As many as a file may have: their names are more than 16 KiB, and all of it is more than a header may have."""
    names = [f"user.{n:03}{'n' * 200}" for n in range(100)]
    script = (
        "import os, sys\n"
        "for n in range(100):\n os.setxattr(sys.argv[1], f'user.{n:03}' + 'n' * 200, b'v' * int(sys.argv[2]))"
    )
    for size in (20, 12000):
        program = (
            f'mount -t tmpfs x {root}/there && touch {root}/there/f && python3 -c "{script}" {root}/there/f {size} ||'
            f" exit 9; {BUILD}/isolat-agent --copy-out --root {root} /there/f 0"
        )
        done = subprocess.run(["unshare", "-m", "sh", "-c", program], capture_output=True, timeout=60, check=False)
        if done.returncode == 9:
            pytest.skip("tmpfs has no attributes of users")
        assert done.returncode == 0, done.stderr
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            found = {key.removeprefix("SCHILY.xattr.") for key in tar.getmembers()[0].pax_headers if "xattr" in key}
        assert (found == set(names)) == (size == 20)
        assert found
        assert (b"some of its attributes" in done.stderr) == (size != 20)
        _in(root, "/new", done.stdout)  # without: not every file system has room for so many


def test_attributes_of_directories_go_along(root: Path) -> None:
    (root / "there/deep").mkdir()
    if not _has_attributes(root):
        pytest.skip("this file system has no attributes of users")
    for name in ("there", "there/deep"):
        os.setxattr(root / name, "user.note", name.encode())
    data, _ = _out(root, "/there")
    (root / "etc/it/deep").mkdir(parents=True)
    for path, lands in (("/new", "new"), ("/etc", "etc/it")):
        _in(root, path, data, "--owners")
        assert os.getxattr(root / lands, "user.note") == b"there"
        assert os.getxattr(root / lands / "deep", "user.note") == b"there/deep"
    _in(root, "/plain", data)
    assert os.listxattr(root / "plain/deep") == []


@pytest.mark.parametrize(
    ("path", "options", "kind", "link"),
    [("/way", (), tarfile.SYMTYPE, "there"), ("/way/", (), tarfile.DIRTYPE, ""), ("/", (), tarfile.DIRTYPE, ""),
     ("/way", ("--follow",), tarfile.DIRTYPE, ""), ("/to-file", ("--follow",), tarfile.REGTYPE, "")],
)  # fmt: skip
def test_links_are_followed_where_that_is_asked_for(
    root: Path, path: str, options: tuple[str, ...], kind: bytes, link: str
) -> None:
    (root / "way").symlink_to("there")
    (root / "to-file").symlink_to("/there/../there/second")
    (root / "there/second").symlink_to("../file")
    first = _out(root, path, *options)[1][0]
    assert (first.name, first.type, first.linkname) == ("0", kind, link)


@pytest.mark.parametrize("path", ["/no", "/no/x", "/file/", "/file/x", "/dangling/", "/there/no"])
def test_what_is_not_there_is_told(root: Path, path: str) -> None:
    (root / "dangling").symlink_to("/outside")
    done = _run("--copy-out", "--root", root, path, "0")
    assert done.returncode in (ABSENT, REFUSED), done.stderr
    assert done.stdout == b""
    assert path.encode() in done.stderr


def test_devices_and_sockets_are_left_out_and_told(root: Path) -> None:
    os.mknod(root / "there/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    for path in ("/there", "/"):
        done = _run("--copy-out", "--root", root, path, "0")
        assert done.returncode == 0
        assert done.stderr == b'left out: "/there/null": it is a device\n'
    alone = _run("--copy-out", "--root", root, "/there/null", "0")
    assert (alone.returncode, alone.stderr) == (FAILED, b'"/there/null": it is a device\n')


def test_what_is_left_out_is_so_under_each_of_its_names(root: Path) -> None:
    at = root / "there"
    os.mknod(at / "a", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(str(at / "c"))
    os.link(at / "a", at / "b")
    os.link(at / "c", at / "d")
    done = _run("--copy-out", "--root", root, "/there", "0")
    assert done.stderr.count(b"left out: ") == 4
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert tar.getnames() == ["0"]
    _in(root, "/back", done.stdout)


def test_the_whole_is_without_what_is_mounted_in_it(root: Path) -> None:
    os.mknod(root / "there/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    program = (
        f"mount -t tmpfs x {root}/etc && touch {root}/etc/hidden && mount --bind {root}/there {root}/file 2>/dev/null;"
        f" {BUILD}/isolat-agent --copy-out --root {root} --whole / ."
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", program], capture_output=True, timeout=60, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        found = {member.name: member.type for member in tar}
    assert found["./etc"] == tarfile.DIRTYPE
    assert "./etc/hidden" not in found
    assert found["./there/null"] == tarfile.CHRTYPE


# hostile


@pytest.mark.parametrize("link", ["/{0}", "../../../../../../../../..{0}", "{0}"])
def test_no_link_of_the_inside_leads_out(root: Path, link: str) -> None:
    outside = str(root.parent / "outside")
    (root / "away").symlink_to(link.format(outside))
    (root / "canary").symlink_to(f"{outside}/canary")
    for path in ("/away/canary", "/away/", "/canary/"):
        done = _run("--copy-out", "--root", root, path, "0")
        assert (done.returncode in (ABSENT, REFUSED), done.stdout) == (True, b""), path
    assert _run("--copy-out", "--root", root, "--follow", "/canary", "0").returncode == ABSENT
    assert _out(root, "/canary")[1][0].type == tarfile.SYMTYPE
    for path in ("/away/new", "/away", "/away/", "/canary"):
        done = _run("--copy-in", "--root", root, path, "it", input=FILE)
        assert done.returncode in (0, ABSENT, REFUSED)
    _canary_sings(root)


def test_what_is_inside_at_the_same_place_is_what_is_meant(root: Path) -> None:
    outside = root.parent / "outside"
    (root / str(outside)[1:]).mkdir(parents=True)
    (root / "away").symlink_to(outside)
    _in(root, "/away", FILE)
    assert (root / str(outside)[1:] / "it").read_bytes() == b"words"
    _canary_sings(root)


def test_the_links_of_proc_lead_nowhere(root: Path) -> None:
    (root / "proc").mkdir()
    (root / "to-root").symlink_to("/proc/self/root")
    program = (
        f"mount -t proc proc {root}/proc && for p in /proc/1/root/etc/passwd /proc/self/cwd/ /to-root/ /proc/1/root/;"
        f" do {BUILD}/isolat-agent --copy-out --root {root} $p 0 && exit 9; done; exit 0"
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr


@pytest.mark.parametrize("name", ["../evil", "0/../../evil", "/evil", "0//evil", "0/./evil", "0", "0/" + "x" * 300])
def test_a_name_that_leads_elsewhere_ends_it(root: Path, name: str) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        _add(tar, "0", tarfile.DIRTYPE)
        _add(tar, name, data=b"evil")

    assert _run("--copy-in", "--root", root, "/there", "it", input=_archive(fill)).returncode in (0, FAILED)
    found = [path for path in root.parent.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]
    assert all(root / "there/it" in path.parents for path in found)
    _canary_sings(root)


@pytest.fixture
def swapped(root: Path) -> Iterator[Path]:
    """In the root ``swap/d`` is a directory and a link to what is outside, in turns, as quickly as it can be."""
    swap, outside = root / "swap", root.parent / "outside"
    (swap / "d").mkdir(parents=True)
    (swap / "d/canary").write_text("of the inside\n")
    (swap / "link").symlink_to(outside)
    over = threading.Event()
    libc = ctypes.CDLL(None)

    def exchange() -> None:
        at = os.open(swap, os.O_RDONLY)
        while not over.is_set():
            libc.syscall(RENAMEAT2[os.uname().machine], at, b"d", at, b"link", RENAME_EXCHANGE)
        os.close(at)

    thread = threading.Thread(target=exchange)
    thread.start()
    yield root
    over.set()
    thread.join()


def test_who_exchanges_directories_for_links_gets_nothing_out_and_nothing_in(swapped: Path) -> None:
    results = set()
    for _ in range(60):
        for path in ("/swap/d/canary", "/swap/d/", "/swap"):
            done = _run("--copy-out", "--root", swapped, path, "0")
            assert b"sings" not in done.stdout
            results.add(done.returncode)
        for path in ("/swap/d/new", "/swap/d/", "/swap/d"):
            results.add(_run("--copy-in", "--root", swapped, path, "it", input=FILE).returncode)
    _canary_sings(swapped)
    assert 0 in results


def test_who_renames_all_the_time_keeps_nobody_from_following_links(swapped: Path) -> None:
    for _ in range(100):
        assert _out(swapped, "/" + "there/../" * 20 + "file")[1][0].size == 3


def test_damaged_archives_harm_nothing_but_themselves(root: Path, tmp_path: Path) -> None:
    build = BUILD / "sanitize" if (BUILD / "sanitize/isolat-agent").exists() else BUILD
    _fill(tmp_path / "source")
    whole = _run("--copy-out", "--root", tmp_path / "source", "/", "0").stdout
    holes = b"3\n0\n4\n65536\n4\n1048576\n0\n".ljust(512, b"\0") + b"datadata"
    sparse = _archive(lambda tar: tar.addfile(_sparse("0", len(holes), 1 << 20), io.BytesIO(holes)))
    source, generator = (whole[:60000], sparse), random.Random(7)
    for n in range(150):
        data = bytearray(source[n % 2])
        for _ in range(generator.randint(1, 12)):
            byte = generator.choice(b"\0\n 01789x/.\xff") if n % 3 else generator.randrange(256)
            data[generator.randrange(len(data))] = byte
        if n % 5 == 0:
            del data[generator.randrange(len(data)) :]
        options = ("--archive", "--owners") if n % 4 == 0 else ("--owners",)
        done = _run("--copy-in", "--root", root, *options, "/there", "it", input=bytes(data), build=build)
        assert done.returncode in (0, FAILED, ABSENT, REFUSED), done.stderr[-2000:]
        assert b"Sanitizer" not in done.stderr, done.stderr[-2000:]
    _canary_sings(root)


def _sparse(name: str, size: int, real: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.pax_headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name, "GNU.sparse.realsize": str(real),
    }  # fmt: skip
    return info


@pytest.mark.parametrize(
    "numbers",
    ["1\n0\n9\n", "2\n4\n4\n0\n4\n", "1\n5\n8\n", "1\n0\n7\n", "x\n", "99999999\n", "1\n18446744073709551615\n8\n",
     "1\n0\n", "-1\n", "1\n0\n8"],
)  # fmt: skip
def test_a_map_of_holes_that_does_not_fit_ends_it(root: Path, numbers: str) -> None:
    data = numbers.encode().ljust(512, b"\0") + b"datadata"
    archive = _archive(lambda tar: tar.addfile(_sparse("0", len(data), 10), io.BytesIO(data)))
    assert _run("--copy-in", "--root", root, "/new", "it", input=archive).returncode == FAILED


def test_what_is_cut_off_is_told(root: Path) -> None:
    for cut in (0, 1, 511, 512, 1600, 2048, len(TREE) - 10000):
        assert "ends too early" in _in(root, "/new", TREE[:cut], code=FAILED)


def test_ids_of_an_environment_are_those_of_its_root(root: Path) -> None:
    """In a user namespace like the environment's: what belongs to nobody inside is nobody's there."""
    first = 1 << 30
    for path in (root, *root.rglob("*")):
        os.chown(path, first, first, follow_symlinks=False)
    os.chown(root / "file", first + 1000, first + 2000)
    (root / "file").chmod(0o400)
    (root / "etc/ours").write_text("of this machine")
    (root / "etc/ours").chmod(0o600)
    for parent in root.parents:
        if parent.stat().st_mode & 0o1 == 0 and parent.stat().st_uid == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o111)
    done = _run("--copy-out", "--root", root, "--ids", f"{first}:65536", "/", "0")
    assert done.returncode == 0, done.stderr
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        found = {member.name: (member.uid, member.gid) for member in tar}
    assert found["0/file"] == (1000, 2000)
    assert "0/etc/ours" not in found
    assert b"/etc/ours" in done.stderr
    done = _run("--copy-in", "--root", root, "--ids", f"{first}:65536", "--owners", "/there", "it", input=TREE)
    assert done.returncode == 0, done.stderr
    assert (root / "there/it/f").stat().st_uid == first + 77
    done = _run("--copy-in", "--root", root, "--ids", f"{first}:65536", "/etc/ours", "it", input=FILE)
    assert (root / "etc/ours").stat().st_uid in (0, first)
