"""The agent's archives, against Python's own, both ways; and hostile ones against a build that watches its memory."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
BUILD = REPOSITORY / "native" / "build"
LIMIT = 64 << 20


def _agent(*words: object, build: Path = BUILD) -> subprocess.CompletedProcess[bytes]:
    argv = [str(build / "isolat-agent"), *(str(word) for word in words)]
    return subprocess.run(argv, capture_output=True, timeout=60, check=False)


def _unpack(archive: Path, into: Path, build: Path = BUILD) -> subprocess.CompletedProcess[bytes]:
    return _agent("--unpack", archive, into, build=build)


def _pack(source: Path, archive: Path, *names: str, limit: int = LIMIT) -> list[tarfile.TarInfo]:
    archive.write_bytes(b"")
    done = _agent("--pack", archive, source, limit, "", *names)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive, "r:") as tar:
        return tar.getmembers()


def _archive(path: Path, fill: Callable[[tarfile.TarFile], None], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w:", format=form) as tar:
        fill(tar)
    return path


def _tree(at: Path) -> None:
    """One of everything that an archive may hold."""
    at.mkdir()
    (at / "plain").write_text("words\n")
    (at / "plain").chmod(0o640)
    (at / "empty").touch()
    (at / ("long" * 60)).mkdir()
    (at / ("long" * 60) / ("deeper" * 40)).write_bytes(bytes(range(256)) * 5000)
    (at / "link").symlink_to("x" * 3000)
    (at / "ümläut").write_text("ß")
    os.link(at / "plain", at / "second")
    os.mkfifo(at / "fifo", 0o600)
    with (at / "sparse").open("wb") as file:
        file.write(b"a")
        file.seek(20 << 20)
        file.write(b"z")
    (at / "closed").mkdir(0o700)
    os.utime(at / "plain", ns=(5, 1_234_567_890_123_456_789))
    os.utime(at / "closed", ns=(5, 1_000_000_007))


def _what(path: Path) -> tuple[object, ...]:
    st = path.lstat()
    kind = stat.S_IFMT(st.st_mode)
    if kind == stat.S_IFLNK:
        return kind, path.readlink()
    content = path.read_bytes() if kind == stat.S_IFREG else None
    return kind, st.st_mode & 0o7777, st.st_mtime_ns, st.st_uid, st.st_gid, content


def _names(at: Path) -> list[str]:
    found = [f"{where}/{name}" for where, dirs, files in os.walk(at) for name in (*dirs, *files)]
    return sorted(os.path.relpath(path, at) for path in found)


def _compare(one: Path, other: Path) -> None:
    names = _names(one)
    assert names == _names(other)
    for name in names:
        assert _what(one / name) == _what(other / name), name


def test_what_was_packed_is_unpacked_the_same(tmp_path: Path) -> None:
    _tree(_made(tmp_path / "in") / "0")
    _pack(tmp_path / "in", tmp_path / "archive", "0")
    # The marker in front is an entry as well, so unpacking it again is possible.
    assert _unpack(tmp_path / "archive", tmp_path / "out").returncode == 0
    _compare(tmp_path / "in" / "0", tmp_path / "out" / "0")
    out = tmp_path / "out" / "0"
    assert (out / "plain").stat().st_ino == (out / "second").stat().st_ino
    assert (out / "sparse").stat().st_blocks < 100


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_python_reads_what_was_packed(tmp_path: Path) -> None:
    _tree(_made(tmp_path / "in") / "0")
    members = {member.name: member for member in _pack(tmp_path / "in", tmp_path / "archive", "0")}
    assert next(iter(members)) == "isolat-out"
    assert members["0/link"].linkname == "x" * 3000
    assert {members["0/plain"].type, members["0/second"].type} == {tarfile.REGTYPE, tarfile.LNKTYPE}
    long = f"0/{'long' * 60}/{'deeper' * 40}"
    with tarfile.open(tmp_path / "archive") as tar:
        file = tar.extractfile(long)
        assert file is not None
        assert file.read() == bytes(range(256)) * 5000
    assert members["0/plain"].mtime == pytest.approx(1_234_567_890.123456789)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_what_python_wrote_is_unpacked(tmp_path: Path, form: int) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        directory = tarfile.TarInfo("0")
        directory.type, directory.mode, directory.mtime = tarfile.DIRTYPE, 0o755, 77
        tar.addfile(directory)
        for name, size in (("0/small", 5), ("0/" + "n" * 90 + "/file", 0), ("0/large", 1_000_000)):
            if name.count("/") == 2:
                above = tarfile.TarInfo(name.rpartition("/")[0])
                above.type, above.mode = tarfile.DIRTYPE, 0o700
                tar.addfile(above)
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = size, 123, 0o604
            tar.addfile(info, io.BytesIO(b"x" * size))

    archive = _archive(tmp_path / "archive", fill, form)
    assert _unpack(archive, tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "0").stat().st_mtime == 77
    assert (tmp_path / "out" / "0" / "large").read_bytes() == b"x" * 1_000_000
    assert (tmp_path / "out" / "0" / "small").stat().st_mode & 0o7777 == 0o604


def test_what_has_not_been_touched_goes_out_as_a_name_only(tmp_path: Path) -> None:
    _tree(_made(tmp_path / "in") / "0")
    _pack(tmp_path / "in", tmp_path / "archive", "0")
    _unpack(tmp_path / "archive", tmp_path / "out")
    out = tmp_path / "out" / "0"
    before = (out / "plain").stat()
    (out / "empty").write_text("more")
    with (out / "sparse").open("r+b") as file:  # content that changes while size and mtime do not
        file.write(b"b")
    os.utime(out / "sparse", ns=(5, (tmp_path / "in" / "0" / "sparse").stat().st_mtime_ns))
    members = {member.name: member for member in _pack(tmp_path / "out", tmp_path / "back", "0")}
    changed = {name for name, member in members.items() if member.isfile() and "ISOLAT.same" not in member.pax_headers}
    assert changed == {"isolat-out", "0/empty", "0/sparse"}
    assert before.st_size


def test_more_than_the_limit_is_no_archive(tmp_path: Path) -> None:
    (_made(_made(tmp_path / "in") / "0") / "file").write_bytes(b"x" * 100_000)
    archive = tmp_path / "archive"
    archive.touch()
    done = _agent("--pack", archive, tmp_path / "in", 50_000, "", "0")
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert archive.read_bytes()[:512] == bytes(512)


HOSTILE = {
    "upwards": ("../escaped", tarfile.REGTYPE, ""),
    "upwards in the middle": ("0/../../escaped", tarfile.REGTYPE, ""),
    "absolute": ("/escaped", tarfile.REGTYPE, ""),
    "through a link": ("0/link/escaped", tarfile.REGTYPE, ""),
    "over a link": ("0/link", tarfile.REGTYPE, ""),
    "a directory over a link": ("0/link", tarfile.DIRTYPE, ""),
    "a name of what is outside": ("0/x", tarfile.LNKTYPE, "../outside/secret"),
    "a name through a link": ("0/x", tarfile.LNKTYPE, "0/link/secret"),
    "a device": ("0/x", tarfile.CHRTYPE, ""),
    "nothing": ("", tarfile.REGTYPE, ""),
    "a long part": ("0/" + "x" * 256, tarfile.REGTYPE, ""),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_nothing_leaves_the_directory(tmp_path: Path, name: str) -> None:
    outside = _made(tmp_path / "outside")
    (outside / "secret").write_text("secret")

    def fill(tar: tarfile.TarFile) -> None:
        top = tarfile.TarInfo("0")
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        link = tarfile.TarInfo("0/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        bad = tarfile.TarInfo(HOSTILE[name][0])
        bad.type, bad.linkname = HOSTILE[name][1:]
        for info in (top, link, bad):
            tar.addfile(info)

    done = _unpack(_archive(tmp_path / "archive", fill), tmp_path / "out")
    assert done.returncode == 1, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "out", "outside"]
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").stat().st_nlink == 1
    assert outside.stat().st_mode & 0o777 != 0


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 8))])
def test_whatever_is_in_an_archive_the_agent_stays_sound(tmp_path: Path, seed: int) -> None:
    build = BUILD / "sanitize"
    if not (build / "isolat-agent").exists():
        subprocess.run(["make", "-C", str(REPOSITORY / "native"), "sanitize"], check=True, capture_output=True)
    source = _made(tmp_path / "in") / "0"
    source.mkdir()
    (source / "a").write_bytes(b"q" * 3000)
    (source / ("n" * 120)).symlink_to("a" * 150)
    _pack(tmp_path / "in", tmp_path / "good", "0")
    good = (tmp_path / "good").read_bytes()
    chance = random.Random(seed)
    for n in range(60):
        bad = bytearray(good[: chance.randrange(512, len(good) + 1)] if chance.random() < 0.3 else good)
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(bad))
            bad[at] = chance.choice((0, 0x20, 0x30, 0x39, 0x3D, 0x80, 0xFF, chance.randrange(256)))
        _mend(bad)
        (tmp_path / "bad").write_bytes(bad)
        done = _unpack(tmp_path / "bad", tmp_path / f"out{n}", build)
        assert done.returncode in (0, 1), (n, done.stderr)
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "good", "bad", *(f"out{n}" for n in range(60))}


def _mend(archive: bytearray) -> None:
    """Right checksums, or nothing behind them would ever be read."""
    for at in range(0, len(archive) - 511, 512):
        if archive[at + 257 : at + 262] == b"ustar":
            block = archive[at : at + 512]
            block[148:156] = b" " * 8
            archive[at + 148 : at + 156] = b"%06o\0 " % sum(block)
