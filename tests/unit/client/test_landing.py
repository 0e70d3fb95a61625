"""What comes from inside lands where Docker's rules say, and nowhere else, whatever the archive says."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from isolat.client.landing import Landing, Wanted
from isolat.errors import CopyFailed, IsolatError, NotFound, UsageError
from isolat.images.flatten.source import Source
from isolat.images.flatten.tar import Bounds, Reader

Member = tuple[str, str, str | bytes]  # a kind, a name, a target or content

_TYPES = {
    "dir": tarfile.DIRTYPE, "file": tarfile.REGTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE,
}  # fmt: skip


def _archive(*members: Member, mode: int = 0o755) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for kind, name, rest in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime, info.uid = _TYPES[kind], mode, 1_000_000_000, 77
            if kind == "file":
                assert isinstance(rest, bytes)
                info.size = len(rest)
                tar.addfile(info, io.BytesIO(rest))
            else:
                info.linkname = str(rest)
                tar.addfile(info)
    return out.getvalue()


def _land(data: bytes, target: str | Path, name: str = "it", **how: bool) -> list[str]:
    left: list[str] = []
    pieces = iter([data])
    reader = Reader(Source(lambda: memoryview(next(pieces, b""))), Bounds(1 << 40, 1 << 62, 1 << 20))
    Landing(Wanted(str(target), name, **how), left.append).take(reader)
    return left


FILE = _archive(("file", "0", b"words"))
TREE = _archive(("dir", "0", ""), ("file", "0/f", b"words"), ("dir", "0/d", ""), ("link", "0/d/l", "/etc/passwd"))


@pytest.fixture
def at(tmp_path: Path) -> Path:
    """A directory with a file and a directory in it, beside something that nobody may touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/canary").write_text("sings\n")
    here = tmp_path / "here"
    (here / "there").mkdir(parents=True)
    (here / "file").write_text("old")
    return here


def _canary_sings(at: Path) -> None:
    outside = at.parent / "outside"
    assert [path.name for path in outside.iterdir()] == ["canary"]
    assert (outside / "canary").read_text() == "sings\n"
    assert stat.S_IMODE((outside / "canary").stat().st_mode) == 0o644
    assert sorted(path.name for path in at.parent.iterdir()) == ["here", "outside"]


@pytest.mark.parametrize(
    ("target", "lands"),
    [("new", "new"), ("file", "file"), ("there", "there/it"), ("there/", "there/it"), ("there/x", "there/x")],
)
def test_a_file_lands_where_docker_puts_it(at: Path, target: str, lands: str) -> None:
    _land(FILE, f"{at}/{target}")
    assert (at / lands).read_bytes() == b"words"
    assert (at / lands).stat().st_mtime_ns == 10**18


@pytest.mark.parametrize(
    ("target", "error"), [("new/", NotFound), ("no/new", NotFound), ("file/", UsageError), ("file/x", NotFound)]
)
def test_a_file_that_has_no_place_is_refused(at: Path, target: str, error: type[IsolatError]) -> None:
    with pytest.raises((error, UsageError)):
        _land(FILE, f"{at}/{target}")
    assert (at / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("target", "contents", "lands"),
    [("new", False, "new"), ("new", True, "new"), ("new/", False, "new"), ("there", False, "there/it"),
     ("there", True, "there")],
)  # fmt: skip
def test_a_directory_lands_where_docker_puts_it(at: Path, target: str, contents: bool, lands: str) -> None:
    _land(TREE, f"{at}/{target}", contents=contents)
    assert (at / lands / "f").read_bytes() == b"words"
    assert (at / lands / "d/l").readlink() == Path("/etc/passwd")


def test_a_directory_does_not_replace_a_file(at: Path) -> None:
    with pytest.raises(UsageError, match="to a file"):
        _land(TREE, at / "file")
    (at / "there/it").write_text("a file")
    with pytest.raises(CopyFailed, match="it can't be made"):
        _land(TREE, at / "there")


def test_a_file_does_not_replace_a_directory_and_replaces_all_else(at: Path) -> None:
    (at / "there/it").mkdir()
    with pytest.raises(CopyFailed, match="a directory is there"):
        _land(FILE, at / "there")
    (at / "there/it").rmdir()
    (at / "there/it").symlink_to(at.parent / "outside/canary")
    _land(FILE, at / "there")
    assert not (at / "there/it").is_symlink()
    assert (at / "there/it").read_bytes() == b"words"
    assert [path.name for path in (at / "there").iterdir()] == ["it"]
    _canary_sings(at)


def test_a_link_that_the_caller_names_is_followed(at: Path) -> None:
    (at / "way").symlink_to("there")
    (at / "to-file").symlink_to("file")
    _land(FILE, at / "way")
    _land(FILE, at / "to-file")
    assert (at / "there/it").read_bytes() == (at / "file").read_bytes() == b"words"
    assert (at / "to-file").is_symlink()


def test_what_is_merged_keeps_what_was_there(at: Path) -> None:
    (at / "there/it/d").mkdir(parents=True)
    (at / "there/it/d/own").write_text("mine")
    _land(TREE, at / "there")
    assert (at / "there/it/d/own").read_text() == "mine"
    assert (at / "there/it/f").read_bytes() == b"words"


# hostile


@pytest.mark.parametrize(
    "name",
    ["../outside/canary", "0/../../outside/canary", "/etc/canary", "0/./x", "0//x", "1/x", "1", "0", ".", "..", "0/..",
     "0/" + "x" * 256],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_ends_it(at: Path, name: str) -> None:
    with pytest.raises(CopyFailed):
        _land(_archive(("dir", "0", ""), ("file", name, b"evil")), at / "there")
    _canary_sings(at)
    assert not [path for path in at.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


@pytest.mark.parametrize("top", ["..", "/", "../outside", "", "."])
def test_a_first_name_that_leads_elsewhere_lands_as_what_was_asked_for(at: Path, top: str) -> None:
    try:
        _land(_archive(("file", top, b"evil")), at / "there")
    except CopyFailed:
        assert list((at / "there").iterdir()) == []
    _canary_sings(at)


@pytest.mark.parametrize("to", ["../../outside", "/", "../../../outside", "."])
def test_nothing_is_reached_through_a_link_of_the_archive(at: Path, to: str) -> None:
    target = to if to != "/" else str(at.parent / "outside")
    members = (("dir", "0", ""), ("link", "0/l", target), ("file", "0/l/canary", b"evil"))
    with pytest.raises(CopyFailed):
        _land(_archive(*members), at / "there")
    _canary_sings(at)


def test_a_link_that_becomes_a_directory_stays_a_link(at: Path) -> None:
    members = (("dir", "0", ""), ("link", "0/l", str(at.parent / "outside")), ("dir", "0/l", ""))
    with pytest.raises(CopyFailed):
        _land(_archive(*members, mode=0o777), at / "there")
    _canary_sings(at)
    assert stat.S_IMODE((at.parent / "outside").stat().st_mode) == 0o755


def test_nothing_is_reached_through_a_link_that_was_there(at: Path) -> None:
    (at / "there/it").mkdir()
    (at / "there/it/d").symlink_to(at.parent / "outside")
    with pytest.raises(CopyFailed):
        _land(_archive(("dir", "0", ""), ("file", "0/d/canary", b"evil")), at / "there")
    _canary_sings(at)


def test_a_directory_that_is_exchanged_for_a_link_is_not_followed_when_it_gets_its_mode(at: Path) -> None:
    """The archive exchanges what it made itself: a file for the directory can't be, so neither can a link."""
    members = (("dir", "0", ""), ("dir", "0/d", ""), ("link", "0/d", "../../outside"))
    with pytest.raises(CopyFailed, match="a directory is there"):
        _land(_archive(*members, mode=0o777), at / "there")
    _canary_sings(at)


@pytest.mark.parametrize("to", ["../outside/canary", "0/../../outside/canary", "/etc/passwd", "0/own", "0/missing"])
def test_a_further_name_is_only_of_what_came(at: Path, to: str) -> None:
    (at / "there/it").mkdir()
    (at / "there/it/own").write_text("mine")
    members = (("dir", "0", ""), ("hard", "0/h", to), ("file", "0/h", b"evil"))
    with pytest.raises(CopyFailed):
        _land(_archive(*members), at / "there")
    assert (at / "there/it/own").read_text() == "mine"
    assert (at / "there/it/own").stat().st_nlink == 1
    _canary_sings(at)


def test_a_further_name_of_a_link_leads_to_the_link(at: Path) -> None:
    outside = str(at.parent / "outside/canary")
    members = (("dir", "0", ""), ("link", "0/l", outside), ("hard", "0/h", "0/l"), ("file", "0/h", b"evil"))
    _land(_archive(*members), at / "there")
    assert (at / "there/it/h").read_bytes() == b"evil"
    assert not (at / "there/it/h").is_symlink()
    _canary_sings(at)


def test_nothing_becomes_set_user_id_or_a_device(at: Path) -> None:
    members = (("dir", "0", ""), ("file", "0/f", b"#!"), ("device", "0/null", ""), ("fifo", "0/p", ""))
    left = _land(_archive(*members, mode=0o7777), at / "new")
    assert left == ["new/null: it is a device"]
    assert {path.name for path in (at / "new").iterdir()} == {"f", "p"}
    assert stat.S_IMODE((at / "new/f").stat().st_mode) == 0o777
    assert stat.S_IMODE((at / "new").stat().st_mode) == 0o1777


def test_owners_are_the_callers_or_the_archives(at: Path) -> None:
    _land(FILE, at / "mine")
    assert (at / "mine").stat().st_uid == os.geteuid()
    if os.geteuid() == 0:
        _land(TREE, at / "theirs", owners=True)
        assert {path.lstat().st_uid for path in (at / "theirs").rglob("*")} == {77}


def test_holes_are_holes(at: Path) -> None:
    data = b"end"
    body = b"2\n0\n0\n1073741824\n3\n".ljust(512, b"\0") + data
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0")
        info.size = len(body)
        info.pax_headers = {
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0",
            "GNU.sparse.realsize": str((1 << 30) + 3),
        }  # fmt: skip
        tar.addfile(info, io.BytesIO(body))
    _land(out.getvalue(), at / "holes")
    st = (at / "holes").stat()
    assert (st.st_size, st.st_blocks < 100) == ((1 << 30) + 3, True)


@pytest.mark.parametrize("cut", [0, 100, 512, 1024, 1500, len(TREE) - 1100])
def test_what_is_cut_off_is_told_or_whole(at: Path, cut: int) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        _land(TREE[:cut], at / "new")
        raise CopyFailed("at the border of two entries nothing is missing: the exit code tells")
    assert type(caught.value).__name__ in ("CopyFailed", "Bad")


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("data", [TREE, FILE, _archive(("dir", "0", ""), ("file", "../x", b"")), b"nonsense" * 100])
def test_no_descriptor_is_lost(at: Path, data: bytes) -> None:
    before = _descriptors()
    for _ in range(3):
        try:
            _land(data, at / "there")
        except Exception as error:
            assert type(error).__name__ in ("CopyFailed", "Bad"), error
    assert _descriptors() == before


def test_a_reader_of_pieces_gives_the_same(at: Path) -> None:
    pieces: Callable[[], memoryview]
    rest = [TREE[n : n + 7] for n in range(0, len(TREE), 7)]
    pieces = lambda: memoryview(rest.pop(0) if rest else b"")  # noqa: E731
    Landing(Wanted(f"{at}/new", "it"), lambda _: None).take(Reader(Source(pieces), Bounds(1 << 40, 1 << 62, 1 << 20)))
    assert (at / "new/f").read_bytes() == b"words"
