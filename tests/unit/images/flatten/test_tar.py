"""The reader of archives: every dialect means what its own documents say, and what is wrong has a name."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.images.flatten.bad import Bad
from isolat.images.flatten.numbers import moment, number
from isolat.images.flatten.source import Source
from isolat.images.flatten.tar import DIRECTORY, FILE, SYMLINK, Bounds, Entry, Reader
from tests.support.layers import Archive, extended, header, octal, padded

END = bytes(1024)


def source(data: bytes, step: int = 1000) -> Source:
    stretches = iter([memoryview(data[at : at + step]) for at in range(0, len(data), step)])
    return Source(lambda: next(stretches, memoryview(b"")))


def read(data: bytes, step: int = 1000, **bounds: int) -> list[tuple[Entry, bytes]]:
    """Every entry with its data."""
    limits = {"entries": 10_000, "file_bytes": 1 << 40, "xattr_bytes": 100_000} | bounds
    reader = Reader(source(data, step), Bounds(**limits))
    return [(entry, b"".join(reader.data(entry.stored))) for entry in reader]


def one(data: bytes) -> Entry:
    ((entry, _),) = read(data + END)
    return entry


def wrong(data: bytes, **bounds: int) -> str:
    with pytest.raises(Bad) as found:
        read(data, **bounds)
    return found.value.stage


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("step", [1, 511, 512, 10_240])
def test_what_pythons_tarfile_writes_is_read_the_same(format: int, step: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, content in (("a/" * 40 + "file", b"x" * 1000), ("b", b""), ("dir/" + "n" * 99, b"y" * 512)):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uid, info.gid, info.mtime = len(content), 0o4755, 1234, 77, 1_700_000_000
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "t" * 100
        archive.addfile(link)
    found = read(stream.getvalue(), step)
    assert [(entry.name, content) for entry, content in found] == [
        (b"a/" * 40 + b"file", b"x" * 1000), (b"b", b""), (b"dir/" + b"n" * 99, b"y" * 512), (b"link", b"")
    ]  # fmt: skip
    first, last = found[0][0], found[-1][0]
    assert (first.kind, first.mode, first.uid, first.gid, first.mtime_s) == (FILE, 0o4755, 1234, 77, 1_700_000_000)
    assert (last.kind, last.link) == (SYMLINK, b"t" * 100)


def test_gnu_long_names_and_links_win_over_the_header() -> None:
    name, link = b"n" * 300, b"l" * 3000
    blocks = [header(b"././@LongLink", b"K", len(link) + 1), padded(link + b"\0")]
    blocks += [header(b"././@LongLink", b"L", len(name) + 1), padded(name + b"\0"), header(b"short", b"2")]
    entry = one(b"".join(blocks))
    assert (entry.name, entry.link) == (name, link)


def test_numbers_beyond_octal() -> None:
    entry = one(header(b"f", uid=octal(4_294_967_295, 8), gid=octal(3_000_000_000, 8), mtime=octal(-5, 12)))
    assert (entry.uid, entry.gid, entry.mtime_s) == (4_294_967_295, 3_000_000_000, -5)


def test_pax_wins_over_the_header() -> None:
    values = {
        b"path": b"\xff\xfe/name", b"uid": b"4294967295", b"gid": b"70000", b"mtime": b"1700000000.123456789123",
        b"size": b"3", b"comment": b"nothing", b"atime": b"rubbish",
    }  # fmt: skip
    ((entry, content),) = read(extended(values) + header(b"f") + padded(b"abc") + END)
    assert (entry.name, entry.uid, entry.gid, content) == (b"\xff\xfe/name", 4_294_967_295, 70_000, b"abc")
    assert (entry.mtime_s, entry.mtime_ns) == (1_700_000_000, 123_456_789)


def test_an_extended_header_holds_for_one_entry_and_a_global_one_for_none() -> None:
    data = extended({b"path": b"global"}, b"g") + extended({b"path": b"long"}) + header(b"a") + header(b"b") + END
    assert [entry.name for entry, _ in read(data)] == [b"long", b"b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"0", (0, 0)), (b"1.5", (1, 500_000_000)), (b"-1.5", (-2, 500_000_000)), (b"-3", (-3, 0)), (b"2.", (2, 0))],
)
def test_times(text: bytes, expected: tuple[int, int]) -> None:
    assert moment(text) == expected


@given(st.integers(-(1 << 88), (1 << 88) - 1))
def test_base_256_is_twos_complement(value: int) -> None:
    assert number(octal(value, 12)) == value


def test_ustars_prefix_is_ustars_alone() -> None:
    assert one(header(b"name", prefix=b"some/where")).name == b"some/where/name"
    assert one(header(b"name", prefix=b"some/where", magic=b"ustar  \0")).name == b"name"


def test_old_directories_are_files_with_a_slash() -> None:
    assert one(header(b"dir/", b"\0")).kind == DIRECTORY


def test_links_and_directories_have_no_data_whatever_their_size_says() -> None:
    data = header(b"d", b"5", 4096) + header(b"l", b"1", 10_000, link=b"x") + header(b"f") + END
    assert [entry.name for entry, _ in read(data)] == [b"d", b"l", b"f"]


def test_data_that_nobody_takes_is_skipped() -> None:
    archive = Archive().add(b"a", data=b"x" * 5000).add(b"b", data=b"y")
    reader = Reader(source(archive.bytes()), Bounds(10, 1 << 30, 1000))
    assert [entry.name for entry in reader] == [b"a", b"b"]


def test_an_archive_may_be_empty_or_lack_its_end() -> None:
    assert read(b"") == []
    assert [entry.name for entry, _ in read(header(b"f"))] == [b"f"]
    assert [entry.name for entry, _ in read(header(b"f") + bytes(512))] == [b"f"]
    assert [entry.name for entry, _ in read(header(b"f") + END + b"rubbish")] == [b"f"]


def gnu_sparse(pieces: list[tuple[int, int]], size: int, data: bytes, more: bytes = b"") -> bytes:
    table = b"".join(octal(offset, 12) + octal(length, 12) for offset, length in pieces[:4]).ljust(96, b"\0")
    block = header(b"sparse", b"S", len(data))
    block = block[:386] + table + (b"\1" if more else b"\0") + octal(size, 12) + bytes(17)
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:] + more + padded(data)


def test_sparse_files_of_all_four_formats() -> None:
    content, pieces = b"a" * 1000 + b"b" * 512, [(0, 1000), (1 << 20, 512)]
    old = gnu_sparse(pieces, 2 << 20, content)
    size = b"%d" % (2 << 20)
    records_00 = b"".join(
        b"%d %s=%s\n" % (len(name) + len(value) + 5, name, value)
        for name, value in (
            (b"GNU.sparse.size", size), (b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"1000"),
            (b"GNU.sparse.offset", b"%d" % (1 << 20)), (b"GNU.sparse.numbytes", b"512"),
        )
    )  # fmt: skip
    first = header(b"PaxHeaders", b"x", len(records_00)) + padded(records_00) + header(b"sparse", size=1512)
    second = extended({b"GNU.sparse.size": size, b"GNU.sparse.map": b"0,1000,1048576,512"})
    third = extended({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": size,
                      b"GNU.sparse.name": b"sparse"})  # fmt: skip
    table = padded(b"2\n0\n1000\n1048576\n512\n")
    forms = [
        old,
        first + padded(content),
        second + header(b"sparse", size=1512) + padded(content),
        third + header(b"GNUSparseFile.1/sparse", size=1512 + 512) + table + padded(content),
    ]
    for form in forms:
        ((entry, data), (after, _)) = read(form + header(b"after") + END)
        assert (entry.name, entry.size, entry.segments, data) == (b"sparse", 2 << 20, pieces, content)
        assert after.name == b"after"


def test_an_old_sparse_map_goes_on_in_further_blocks() -> None:
    pieces = [(n * 8192, 100) for n in range(30)]
    tables = [pieces[4:25], pieces[25:]]
    more = b""
    for index, table in enumerate(tables):
        text = b"".join(octal(offset, 12) + octal(length, 12) for offset, length in table).ljust(504, b"\0")
        more += (text + (b"\1" if index == 0 else b"\0")).ljust(512, b"\0")
    ((entry, _),) = read(gnu_sparse(pieces, 1 << 20, bytes(3000), more) + END)
    assert entry.segments == pieces


@pytest.mark.parametrize(
    "pieces", [[(0, 100), (50, 100)], [(200, 10), (0, 10)], [(1 << 62, 1 << 62)], [(0, 5000)], [(0, 1)]]
)
def test_sparse_maps_that_lie_are_refused(pieces: list[tuple[int, int]]) -> None:
    assert wrong(gnu_sparse(pieces, 4096, bytes(1024)) + END) == "bad-size"


@pytest.mark.parametrize(
    ("data", "stage"),
    [
        (b"rubbish" * 100, "bad-header"),
        (header(b"f", sum=b"000001\0 "), "bad-header"),
        (header(b"f", size=100)[:300], "truncated"),
        (header(b"f", size=5000) + bytes(512), "truncated"),
        (header(b"f", size=100) + bytes(50), "truncated"),
        (extended({b"path": b"x"}), "truncated"),
        (header(b"f", b"x", 2 << 20), "too-large"),
        (header(b"f", b"V"), "bad-header"),
        (header(b"f", uid=b"12x4567\0"), "bad-header"),
        (header(b"f", uid=b"\x80" + b"\xff" * 7), "bad-header"),
        (octal(0, 8) * 64, "bad-header"),
        (bytes(512) + header(b"f"), "bad-header"),
        (header(b"x", b"x", 10) + padded(b"5 a=b\n1234"), "bad-header"),
        (header(b"x", b"x", 6) + padded(b"99 a=b"), "bad-header"),
        (header(b"x", b"x", 6) + padded(b"6 abc\n"), "bad-header"),
        (header(b"x", b"x", 7) + padded(b"7 a\0=b\n"), "bad-header"),
        (extended({b"size": b"-1"}) + header(b"f"), "bad-header"),
        (extended({b"size": b"9" * 19}) + header(b"f"), "bad-size"),
        (extended({b"size": b"9" * 30}) + header(b"f"), "bad-header"),
        (extended({b"size": b"2000000000000"}) + header(b"f"), "too-large"),
        (extended({b"mtime": b"now"}) + header(b"f"), "bad-header"),
        (extended({b"uid": b"4294967296"}) + header(b"f"), "bad-size"),
        (extended({b"SCHILY.xattr.user.": b"x"}) + header(b"f"), "bad-header"),
        (extended({b"SCHILY.xattr.user.x": bytes(70_000)}) + header(b"f"), "too-large"),
        (extended({b"LIBARCHIVE.xattr.user.x": b"!!"}) + header(b"f"), "bad-header"),
    ],
)  # fmt: skip
def test_what_is_wrong_has_a_name(data: bytes, stage: str) -> None:
    assert wrong(data) == stage


def test_a_negative_size_is_refused() -> None:
    block = header(b"f")
    block = block[:124] + octal(-1, 12) + block[136:148] + b" " * 8 + block[156:]
    assert wrong(block[:148] + b"%06o\0 " % sum(block) + block[156:]) == "bad-size"


def test_extended_headers_count_as_entries() -> None:
    assert wrong(extended({b"a": b"b"}) * 20 + header(b"f") + END, entries=10) == "too-many-entries"


def test_xattrs_of_both_families() -> None:
    values = {
        b"SCHILY.xattr.user.a": b"\0\xff=\n",
        b"LIBARCHIVE.xattr.user.b%2Fc": b"aGk",
        b"SCHILY.xattr.other.x": b"y",
        b"SCHILY.xattr.trusted.overlay.opaque": b"y",
        b"SCHILY.xattr.user.overlay.redirect": b"/etc",
    }
    body = one(extended(values) + header(b"f")).xattrs
    assert body[12:] == b"\1\1\4\0a\0\xff=\n\0\0\0" + b"\3\1\2\0b/chi\0\0\0"


@given(st.binary(max_size=3000), st.integers(1, 700))
def test_no_bytes_lead_to_anything_but_entries_or_a_named_error(data: bytes, step: int) -> None:
    try:
        read(data, step)
    except Bad as bad:
        assert bad.stage


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    archive = Archive().directory(b"d/").add(b"d/f", data=b"x" * 700, mtime=(1, 5), xattrs={b"user.a": b"b"})
    archive.symlink(b"s", b"d/f").link(b"h", b"d/f").add(b"n" * 120, "char", device=(1, 3))
    data = bytearray(archive.raw(gnu_sparse([(0, 10), (4096, 10)], 8192, bytes(20))).bytes())
    for _ in range(draw(st.integers(1, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    fixed = bytearray()
    for at in range(0, len(data), 512):  # right sums let what is wrong get further
        block = bytes(data[at : at + 512])
        if draw(st.booleans()):
            block = block[:148] + b" " * 8 + block[156:]
            block = block[:148] + b"%06o\0 " % sum(block) + block[156:]
        fixed += block
    return bytes(fixed)


@given(mutated())
def test_mutations_lead_to_entries_or_a_named_error(data: bytes) -> None:
    try:
        for entry, content in read(data):
            assert len(content) == entry.stored <= 1 << 40 and 0 <= entry.uid < 1 << 32
    except Bad as bad:
        assert bad.stage
