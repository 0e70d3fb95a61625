"""A tree as a layer's archive, read again by Python's own tar."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import tarfile
from collections.abc import Collection
from pathlib import Path

import pytest

from isolat.images.flatten.pack import pack

ODD = "\udcff\udcfe odd \n name"


def packed(tree: Path, skip: Collection[str] = ()) -> bytes:
    out = io.BytesIO()
    digest = pack(tree, out, skip=skip)
    assert digest == f"sha256:{hashlib.sha256(out.getvalue()).hexdigest()}"
    return out.getvalue()


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        return {member.name: member for member in tar}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    at = tmp_path / "tree"
    (at / "b" / "deep").mkdir(parents=True)
    (at / "b" / "file").write_text("words\n")
    (at / "b" / "file").chmod(0o4751)
    os.utime(at / "b" / "file", ns=(0, 1_600_000_000_123_456_789))
    os.link(at / "b" / "file", at / "c")
    (at / "link").symlink_to("x" * 300)
    (at / ("long" * 50)).write_bytes(b"1")
    (at / ODD).write_bytes(b"2")
    os.mkfifo(at / "fifo")
    return at


def test_everything_is_there_once_and_in_order(tree: Path) -> None:
    found = members(packed(tree))
    assert list(found) == [".", "b", "b/deep", "b/file", "c", "fifo", "link", "long" * 50, ODD]
    assert found["b/file"].mode == 0o4751
    assert found["b/file"].pax_headers["mtime"] == "1600000000.123456789"
    assert (found["c"].type, found["c"].linkname) == (tarfile.LNKTYPE, "b/file")
    assert found["link"].linkname == "x" * 300
    assert found["fifo"].isfifo()
    assert found["b/file"].uid == os.geteuid()


def test_the_same_tree_is_the_same_archive_and_a_part_can_be_left_out(tree: Path) -> None:
    assert packed(tree) == packed(tree)
    assert set(members(packed(tree))) - set(members(packed(tree, skip=["b/deep", "c"]))) == {"b/deep", "c"}
    assert members(packed(tree, skip=["b/file"]))["c"].isreg()  # what is left out is nobody's first name


def test_holes_stay_holes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"middle")
        file.truncate(1 << 30)
    data = packed(tree)
    assert len(data) < 1 << 17
    found = members(data)["sparse"]
    assert found.issparse()
    assert found.size == 1 << 30
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        stream = tar.extractfile("sparse")
        assert stream is not None
        stream.seek((1 << 20) - 1)
        assert stream.read(8) == b"\0middle\0"


def test_user_attributes_are_kept_and_the_overlays_own_are_not(tree: Path) -> None:
    try:
        os.setxattr(tree / "b" / "file", "user.some", b"\x00\xff\n")
        os.setxattr(tree / "b", "user.overlay.opaque", b"y")
    except OSError:
        pytest.skip("the file system has no user attributes")
    found = members(packed(tree))
    assert not any("overlay" in name for name in found["b"].pax_headers)
    assert b"SCHILY.xattr.user.some=\x00\xff\n\n" in packed(tree)


def test_a_tree_deeper_than_there_are_descriptors(tmp_path: Path) -> None:
    """Siblings on the way back up show that each directory was found again."""
    names, here = [], tmp_path
    for depth in range(100):
        here /= "d"
        here.mkdir()
        (here / "later").touch()
        names.append("/".join(["d"] * (depth + 1)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, len(os.listdir("/proc/self/fd")) + 20), hard))  # noqa: PTH208
    try:
        data = packed(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(members(data)) == sorted([".", *names, *(f"{name}/later" for name in names)])
