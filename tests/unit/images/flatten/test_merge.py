"""Layers on layers: who wins, what goes, where a path leads; and that no byte of what went is left."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolat.images.flatten.bad import Bad, escaped
from isolat.images.flatten.blocks import BLOCK, Blocks, _blocks_of, _plan
from isolat.images.flatten.layout import Layout
from isolat.images.flatten.merge import Merger
from isolat.images.flatten.ondisk import crc32c
from isolat.images.flatten.source import Source
from isolat.images.flatten.tar import Bounds
from isolat.images.flatten.tree import Node, cleaned
from tests.support.layers import Archive

BIG = 5000  # bytes: too large to lie beside its inode


@pytest.fixture
def out(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def merged(out: int, *archives: Archive, entries: int = 1000, most: int = 1 << 30) -> Merger:
    merger = Merger(Blocks(out, most), Bounds(entries, 1 << 40, 10_000))
    for archive in archives:
        stretches = iter([memoryview(archive.bytes()), memoryview(b"")])
        merger.layer(Source(lambda stretches=stretches: next(stretches)))  # type: ignore[misc]
    merger.finish()
    return merger


def found(merger: Merger) -> dict[bytes, Node]:
    """Every path, /dev left out."""
    paths: dict[bytes, Node] = {}
    stack = [(b"", merger.tree.root)]
    while stack:
        path, node = stack.pop()
        for name, child in (node.children or {}).items():
            paths[path + name] = child
            if child.children is not None:
                stack.append((path + name + b"/", child))
    paths.pop(b"dev")
    return paths


def names(out: int, *archives: Archive) -> list[bytes]:
    return sorted(found(merged(out, *archives)))


def content(merger: Merger, node: Node) -> bytes:
    if node.data is not None:
        return node.data
    merger.blocks.flush()
    return os.pread(merger.blocks.descriptor, node.size, node.start * BLOCK)


def wrong(out: int, *archives: Archive) -> str:
    with pytest.raises(Bad) as error:
        merged(out, *archives)
    return error.value.stage


def test_the_last_layer_wins_and_so_does_the_last_entry(out: int) -> None:
    merger = merged(out, Archive().add(b"f", data=b"1").add(b"f", data=b"2"), Archive().add(b"f", data=b"3" * BIG))
    node = found(merger)[b"f"]
    assert content(merger, node) == b"3" * BIG and node.nlink == 1


@pytest.mark.parametrize("order", [1, -1])
def test_a_whiteout_takes_lower_layers_away_whatever_its_place(out: int, order: int) -> None:
    lower = Archive().add(b"d/old").add(b"d/both").add(b"gone/deep/x").symlink(b"link", b"d")
    entries = [b"d/.wh.old", b"d/.wh.both", b"d/both", b".wh.gone", b".wh.link", b"d/.wh.never"][::order]
    upper = Archive()
    for name in entries:
        upper.add(name)
    assert names(out, lower, upper) == [b"d", b"d/both"]


@pytest.mark.parametrize("first", [True, False])
def test_an_opaque_directory_keeps_only_its_own_layers(out: int, first: bool) -> None:
    lower = Archive().add(b"d/old").add(b"d/sub/old").add(b"d/sub/sub/old")
    upper = Archive()
    if first:
        upper.add(b"d/.wh..wh..opq").add(b"d/sub/new")
    else:
        upper.add(b"d/sub/new").add(b"d/.wh..wh..opq")
    assert names(out, lower, upper) == [b"d", b"d/sub", b"d/sub/new"]


def test_an_implicit_parent_is_as_much_a_layers_own_as_a_listed_one(out: int) -> None:
    assert names(out, Archive().add(b"old"), Archive().add(b"a/b/c").add(b".wh..wh..opq")) == [b"a", b"a/b", b"a/b/c"]


def test_whiteouts_of_the_first_layer_and_of_nothing_are_fine(out: int) -> None:
    assert names(out, Archive().add(b".wh.x").add(b"no/such/.wh..wh..opq").add(b"no/.wh.x").add(b"f")) == [b"f"]


def test_a_directory_listed_again_keeps_what_is_in_it(out: int) -> None:
    lower = Archive().directory(b"d", mode=0o700, uid=1, xattrs={b"user.a": b"1"}).add(b"d/f")
    upper = Archive().directory(b"d/", mode=0o1777, uid=2, mtime=(5, 6))
    node = found(merged(out, lower, upper))[b"d"]
    assert node.children and list(node.children) == [b"f"]
    assert (node.mode, node.uid, node.mtime_s, node.mtime_ns, node.xattrs) == (stat.S_IFDIR | 0o1777, 2, 5, 6, b"")


def test_one_kind_gives_way_to_another(out: int) -> None:
    lower = Archive().add(b"a/x").add(b"b").symlink(b"c", b"a").add(b"d")
    upper = Archive().add(b"a").directory(b"b").directory(b"c").symlink(b"d", b"a")
    paths = found(merged(out, lower, upper))
    kinds = {path: stat.filemode(node.mode)[0] for path, node in paths.items()}
    assert kinds == {b"a": "-", b"b": "d", b"c": "d", b"d": "l"}


def test_hard_links_are_one_file(out: int) -> None:
    lower = Archive().add(b"a", data=b"x").symlink(b"s", b"a")
    upper = Archive().link(b"d/b", b"a").link(b"c", b"./d/../a").link(b"t", b"s").link(b"a", b"a")
    paths = found(merged(out, lower, upper))
    assert paths[b"a"] is paths[b"d/b"] is paths[b"c"] and paths[b"a"].nlink == 3
    assert paths[b"s"] is paths[b"t"] and stat.S_ISLNK(paths[b"t"].mode)


def test_a_links_other_name_survives_its_first(out: int) -> None:
    merger = merged(out, Archive().add(b"a", data=b"x" * BIG), Archive().link(b"b", b"a").add(b".wh.a"))
    paths = found(merger)
    assert list(paths) == [b"b"] and paths[b"b"].nlink == 1 and content(merger, paths[b"b"]) == b"x" * BIG


def test_a_way_through_symbolic_links_stays_inside(out: int) -> None:
    lower = (
        Archive().directory(b"usr/bin").symlink(b"bin", b"usr/bin").symlink(b"up", b"../../..").symlink(b"abs", b"/usr")
    )
    upper = Archive().add(b"bin/tool").add(b"up/top").add(b"abs/lib/x").symlink(b"dangling", b"made/../other")
    upper.add(b"dangling/y").add(b"../../etc/passwd").add(b"/absolute")
    assert [name for name in names(out, lower, upper) if not name.startswith((b"up", b"abs/", b"dangling/"))] == [
        b"abs", b"absolute", b"bin", b"dangling", b"etc", b"etc/passwd", b"other", b"other/y", b"top", b"usr",
        b"usr/bin", b"usr/bin/tool", b"usr/lib", b"usr/lib/x",
    ]  # fmt: skip


def test_a_lower_layers_file_gives_way_to_an_implicit_directory(out: int) -> None:
    assert names(out, Archive().add(b"a"), Archive().add(b"a/b")) == [b"a", b"a/b"]


def test_dev_becomes_an_empty_directory_whatever_it_was(out: int, tmp_path: Path) -> None:
    for archive in (
        Archive().add(b"dev/null", "char", device=(1, 3)).add(b"dev/big", data=b"x" * BIG),
        Archive().symlink(b"dev", b"etc").add(b"dev/x"),
        Archive().add(b"dev", data=b"x" * BIG),
        Archive().add(b"f"),
    ):
        merger = merged(out, archive)
        node = (merger.tree.root.children or {})[b"dev"]
        assert node.children == {}


def test_aufs_own_files_are_left_out(out: int) -> None:
    archive = Archive().directory(b".wh..wh.plnk").add(b".wh..wh.plnk/1.2").add(b"d/.wh..wh.orph").add(b"f")
    assert names(out, archive) == [b"f"]


@pytest.mark.parametrize(
    ("archive", "stage"),
    [
        (Archive().add(b".wh."), "bad-path"),
        (Archive().add(b"d/.wh.."), "bad-path"),
        (Archive().add(b"d/.wh..."), "bad-path"),
        (Archive().add(b".wh.../x"), "bad-path"),
        (Archive().add(b".wh.d/x"), "bad-path"),
        (Archive().add(b"f").add(b"f/x"), "bad-path"),
        (Archive().add(b"n" * 256), "bad-path"),
        (Archive().add(b"d/" * 3000 + b"f"), "bad-path"),
        (Archive().add(b"./"), "bad-path"),
        (Archive().add(b""), "bad-path"),
        (Archive().symlink(b"/", b"etc"), "bad-path"),
        (Archive().symlink(b"a", b""), "bad-link"),
        (Archive().symlink(b"a", b"x" * 4096), "bad-link"),
        (Archive().symlink(b"a", b"b").symlink(b"b", b"a").add(b"a/x"), "bad-link"),
        (Archive().link(b"a", b"later").add(b"later"), "bad-link"),
        (Archive().link(b"a", b"../../../etc/passwd"), "bad-link"),
        (Archive().directory(b"d").link(b"a", b"d"), "bad-link"),
        (Archive().add(b"d/f").link(b"d", b"d/f"), "bad-link"),
        (Archive().link(b"a", b"/"), "bad-link"),
    ],
)
def test_what_no_engine_makes_is_refused_by_name(out: int, archive: Archive, stage: str) -> None:
    assert wrong(out, archive) == stage


def test_links_on_links_on_links_are_given_up(out: int) -> None:
    archive = Archive()
    for n in range(300):
        archive.symlink(b"l%d" % (n + 1), b"l%d" % n)
    assert wrong(out, archive.directory(b"l0").add(b"l300/x")) == "bad-link"
    archive = Archive().symlink(b"a", b"d/../" * 800 + b"d").directory(b"d")
    for _ in range(10):
        archive.symlink(b"d/b", b"../a/../a/../a/../a/../a/../a/../a/../a/../a/../a/../a/../a/../a/../a/../a/../a")
    assert wrong(out, archive.add(b"d/b/x")) == "bad-link"


def test_directories_through_links_do_not_get_deeper_than_allowed(out: int) -> None:
    deep = b"/".join([b"d"] * 1500)
    archive = Archive().directory(deep)
    archive.symlink(b"short", deep).directory(b"short/" + deep)
    with pytest.raises(Bad) as error:
        merged(out, archive, entries=5000)
    assert error.value.stage == "bad-path"


def test_too_many_implicit_directories_are_refused(out: int) -> None:
    with pytest.raises(Bad) as error:
        merged(out, Archive().add(b"a/" * 50 + b"f"), entries=10)
    assert error.value.stage == "too-many-entries"


def test_no_byte_of_what_is_hidden_is_left(out: int) -> None:
    """Replaced, whited out, in an opaque directory, in /dev, twice in one layer; the file ends after what is used."""
    secret = b"secret--" * 2000
    lower = Archive()
    for name in (b"replaced", b"removed", b"opaque/f", b"dev/f", b"twice"):
        lower.add(name, data=secret)
    lower.add(b"kept", data=b"k" * 9000).add(b"twice", data=b"t" * BIG)
    upper = Archive().add(b"replaced", data=b"r" * BIG).add(b".wh.removed").add(b"opaque/.wh..wh..opq")
    merger = merged(out, lower, upper)
    Layout(merger.tree, merger.blocks).write()
    whole = os.pread(out, os.fstat(out).st_size, 0)
    assert b"secret" not in whole
    paths = found(merger)
    assert content(merger, paths[b"kept"]) == b"k" * 9000
    assert content(merger, paths[b"twice"]) == b"t" * BIG and content(merger, paths[b"replaced"]) == b"r" * BIG
    assert len(whole) <= (1 + 3 + 2 + 2 + 2) * BLOCK  # superblock, the three files, metadata


def test_gaps_are_filled_from_the_end(out: int) -> None:
    lower = Archive()
    for n in range(40):
        lower.add(b"f%02d" % n, data=bytes([n]) * (BLOCK * (1 + n % 5)))
    upper = Archive()
    for n in range(0, 40, 3):
        upper.add(b".wh.f%02d" % n)
    merger = merged(out, lower, upper)
    paths = found(merger)
    for n in range(40):
        node = paths.get(b"f%02d" % n)
        assert node is None if n % 3 == 0 else node and content(merger, node) == bytes([n]) * node.size
    used = sum(node.blocks for node in paths.values())
    assert merger.blocks.next <= used * 1.25


@pytest.mark.parametrize(
    ("segments", "size", "blocks_most", "map_most"),
    [
        ([], 1 << 40, 0, 1024),
        ([(0, 1)], 1 << 20, 1, 256 * 4),
        ([(1 << 39, 100)], 1 << 40, 2000, 1 << 20),
        ([(0, 10_000)], 10_000, 3, 12),
        ([(n << 20, 4096) for n in range(100)], 100 << 20, 300, 400_000),
    ],
)
def test_chunks_are_of_a_size_that_keeps_data_and_map_small(
    segments: list[tuple[int, int]], size: int, blocks_most: int, map_most: int
) -> None:
    chunks = _plan(segments, size)
    assert _blocks_of(chunks, size) <= blocks_most
    assert 4 * chunks.count <= map_most
    for offset, length in segments:
        first, last = offset >> 12 + chunks.bits, offset + length - 1 >> 12 + chunks.bits
        assert any(start <= first and last < start + count for start, count, _ in chunks.runs)


def test_what_is_too_large_is_refused_before_it_is_written(out: int) -> None:
    with pytest.raises(Bad) as error:
        merged(out, Archive().add(b"f", data=bytes(100_000)), most=50_000)
    assert error.value.stage == "too-large"


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        (b"a", b"a"), (b"./a/b/", b"a/b"), (b"/a", b"a"), (b"a//b", b"a/b"), (b"a/./b", b"a/b"), (b"a/../b", b"b"),
        (b"../../a", b"a"), (b"..", b""), (b".", b""), (b"./", b""), (b"/", b""), (b"a/..", b""), (b"...", b"..."),
        (b"a/.b", b"a/.b"), (b"a/..b/c", b"a/..b/c"), (b"././a", b"a"),
    ],
)  # fmt: skip
def test_paths_are_cleaned_as_seen_from_the_root(path: bytes, clean: bytes) -> None:
    assert cleaned(path) == clean


def test_names_of_strangers_can_be_shown() -> None:
    assert escaped(b"a\x1b[31m\n\\\xff") == "a\\x1b[31m\\x0a\\x5c\\xff"
    assert len(escaped(b"x" * 5000)) < 300


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
