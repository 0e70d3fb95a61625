"""A machine's own pages, found and copied: with a process that maps a memfd as a QEMU does, and no QEMU."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.deadline import NEVER, Deadline
from isolat.errors import DeadlineExceeded, Lost, StartFailed
from isolat.qemu import memory
from isolat.qemu.memory import PAGE, Inode, Mapping, Run

SIZE = 64 * PAGE
INODE = Inode(0, 1, 77)
HOLDER = """
import mmap, sys
fd, size, share, *pages = map(int, sys.argv[1:])
memory = mmap.mmap(fd, size, mmap.MAP_SHARED if share else mmap.MAP_PRIVATE)
for page in range(size // 4096):
    memory[page * 4096]
for page in pages:
    memory[page * 4096] = page % 251 + 1
print("ready", flush=True)
for line in sys.stdin:
    at = int(line)
    print(memory[at : at + 4096].hex(), flush=True)
"""


class Holder:
    """A process that has mapped ``fd`` and written the first byte of some pages."""

    def __init__(self, fd: int, pages: Sequence[int] = (), size: int = SIZE, share: bool = False) -> None:
        words = [str(word) for word in (fd, size, int(share), *pages)]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", HOLDER, *words],
            pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self.process.pid
        self._line()

    def page(self, number: int) -> bytes:
        assert self.process.stdin
        self.process.stdin.write(f"{number * PAGE}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self._line())

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def template() -> Iterator[int]:
    with memfd() as fd:
        os.pwrite(fd, b"".join(bytes([255]) + bytes([page]) * (PAGE - 1) for page in range(SIZE // PAGE)), 0)
        yield fd


@contextlib.contextmanager
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    yield fd
    os.close(fd)


def content(page: int, own: bool) -> bytes:
    return bytes([page % 251 + 1 if own else 255]) + bytes([page]) * (PAGE - 1)


# finding


def line(start: int, end: int, offset: int = 0, mode: str = "rw-p", inode: int = 77, device: str = "00:01") -> str:
    return f"{start:x}-{end:x} {mode} {offset:08x} {device} {inode} /memfd:ram (deleted)\n"


OTHERS = [
    "55d0c0000000-55d0c0001000 r--p 00000000 fe:00 77 /usr/bin/qemu-system-x86_64\n",
    "7f0000000000-7f0000001000 ---p 00000000 00:00 0\n",
    "7f0000001000-7f0000002000 rw-p 00000000 00:01 78 /memfd:other (deleted)\n",
]


def test_the_mapping_is_found_among_others() -> None:
    lines = [*OTHERS, line(0x7F0000100000, 0x7F0008100000), *OTHERS]
    assert memory.parse_maps(lines, INODE) == Mapping(0x7F0000100000, 128 << 20)


def test_pieces_that_follow_one_another_are_one() -> None:
    lines = [line(0x10000, 0x12000), line(0x12000, 0x13000, 0x2000), line(0x13000, 0x20000, 0x3000)]
    assert memory.parse_maps(lines, INODE) == Mapping(0x10000, 0x10000)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        OTHERS,
        [line(0x10000, 0x20000, mode="rw-s")],
        [line(0x10000, 0x20000), line(0x30000, 0x40000)],
        [line(0x10000, 0x20000), line(0x20000, 0x30000)],
        [line(0x10000, 0x20000), line(0x21000, 0x30000, 0x11000)],
        [line(0x10000, 0x20000, 0x1000)],
    ],
    ids=["nothing", "others", "shared", "twice", "twice side by side", "a gap", "not from its beginning"],
)
def test_what_is_not_one_private_mapping_is_refused(lines: list[str]) -> None:
    with pytest.raises(StartFailed):
        memory.parse_maps(lines, INODE)


def test_a_process_that_is_gone_is_lost(template: int) -> None:
    with Holder(template) as holder:
        mapping = memory.guest_ram(holder.pid, Inode.of(template))
    for ask in (
        lambda: memory.guest_ram(holder.pid, Inode.of(template)),
        lambda: memory.private_pages(holder.pid, mapping),
        lambda: memory.copy_out(holder.pid, mapping, [(0, PAGE)], template, NEVER),
    ):
        with pytest.raises(Lost):
            ask()


def test_a_shared_mapping_is_refused(template: int) -> None:
    with Holder(template, share=True) as holder, pytest.raises(StartFailed, match="shares"):
        memory.guest_ram(holder.pid, Inode.of(template))


PAGES = [0, 1, 2, 7, 9, 10, 62, 63]
RUNS = [(0, 3 * PAGE), (7 * PAGE, PAGE), (9 * PAGE, 2 * PAGE), (62 * PAGE, 2 * PAGE)]


def test_what_was_written_is_found_and_what_was_read_is_not(template: int) -> None:
    with Holder(template, PAGES) as holder:
        assert memory.private_pages(holder.pid, memory.guest_ram(holder.pid, Inode.of(template))) == RUNS


def test_a_machine_that_wrote_nothing_has_no_page_of_its_own(template: int) -> None:
    with Holder(template) as holder:
        assert memory.private_pages(holder.pid, memory.guest_ram(holder.pid, Inode.of(template))) == []


def test_both_ways_of_looking_see_the_same(template: int) -> None:
    with Holder(template, PAGES) as holder:
        mapping = memory.guest_ram(holder.pid, Inode.of(template))
        with open(f"/proc/{holder.pid}/pagemap", "rb", buffering=0) as pagemap:
            found = memory.scan(pagemap.fileno(), mapping)
            assert memory.read_pagemap(pagemap.fileno(), mapping) == RUNS
    if found is None:
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    assert found == RUNS


def test_a_scan_goes_on_where_its_answer_was_full(template: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_REGIONS", 3)
    with Holder(template, PAGES) as holder:
        assert memory.private_pages(holder.pid, memory.guest_ram(holder.pid, Inode.of(template))) == RUNS


def test_a_kernel_without_the_scan_is_asked_otherwise(template: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PAGEMAP_SCAN", memory._PAGEMAP_SCAN + 1)
    with Holder(template, PAGES) as holder:
        assert memory.private_pages(holder.pid, memory.guest_ram(holder.pid, Inode.of(template))) == RUNS


PRESENT, SWAPPED, FILE, EXCLUSIVE, SOFT_DIRTY = 1 << 63, 1 << 62, 1 << 61, 1 << 56, 1 << 55


def test_pagemap_words_are_read_as_the_kernel_means_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_READ_BYTES", 16)
    words = [0, PRESENT, PRESENT | FILE, PRESENT | EXCLUSIVE | SOFT_DIRTY | 0xFFFF, SWAPPED | 7, SWAPPED | FILE, FILE]
    with tempfile.TemporaryFile() as file:
        file.write(struct.pack("<9Q", 0, 0, *words))
        file.flush()
        found = memory.read_pagemap(file.fileno(), Mapping(2 * PAGE, len(words) * PAGE))
    assert found == [(PAGE, PAGE), (3 * PAGE, 2 * PAGE)]


def pages_of(runs: Sequence[Run]) -> set[int]:
    return {page for offset, length in runs for page in range(offset // PAGE, (offset + length) // PAGE)}


runs_of_pages = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8))).map(
    lambda pairs: [(start * PAGE, count * PAGE) for start, count in pairs]
)


@given(runs_of_pages, runs_of_pages)
def test_joined_runs_are_the_same_pages_once(one: list[Run], other: list[Run]) -> None:
    found = memory.joined(one, other)
    assert pages_of(found) == pages_of(one) | pages_of(other)
    assert all(offset + length < after for (offset, length), (after, _) in itertools.pairwise(found))


# copying


def test_a_machines_pages_come_into_another_one(template: int) -> None:
    inode = Inode.of(template)
    with Holder(template, PAGES) as parent, Holder(template) as child, memfd() as delta:
        mapping = memory.guest_ram(parent.pid, inode)
        memory.copy_out(parent.pid, mapping, memory.private_pages(parent.pid, mapping), delta, NEVER)
        assert memory.copy_in(child.pid, memory.guest_ram(child.pid, inode), delta, NEVER) == len(PAGES) * PAGE
        for page in range(SIZE // PAGE):
            assert child.page(page) == content(page, page in PAGES)
        assert memory.private_pages(child.pid, memory.guest_ram(child.pid, inode)) == RUNS
        assert os.pread(template, PAGE, 0) == content(0, False)


def test_much_is_copied_in_parts(template: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CHUNK_BYTES", 3 * PAGE)
    monkeypatch.setattr(memory, "_IOV_MAX", 2)
    pages = [*range(20), *range(21, 60, 2)]
    inode = Inode.of(template)
    with Holder(template, pages) as parent, Holder(template) as child, memfd() as delta:
        mapping = memory.guest_ram(parent.pid, inode)
        memory.copy_out(parent.pid, mapping, memory.private_pages(parent.pid, mapping), delta, NEVER)
        memory.copy_in(child.pid, memory.guest_ram(child.pid, inode), delta, NEVER)
        assert [child.page(page) for page in range(64)] == [content(page, page in pages) for page in range(64)]


def test_a_page_that_is_zero_is_copied_too(template: int) -> None:
    """What the guest has zeroed is data: the template's page is another one."""
    with Holder(template) as child, memfd() as delta:
        os.ftruncate(delta, SIZE)
        memory.write_table(delta, SIZE, [(5 * PAGE, PAGE)])
        memory.copy_in(child.pid, memory.guest_ram(child.pid, Inode.of(template)), delta, NEVER)
        assert [child.page(5), child.page(4), child.page(6)] == [bytes(PAGE), content(4, False), content(6, False)]


def test_a_deadline_ends_a_copy(template: int) -> None:
    with Holder(template, PAGES) as parent, memfd() as delta:
        mapping = memory.guest_ram(parent.pid, Inode.of(template))
        with pytest.raises(DeadlineExceeded):
            memory.copy_out(parent.pid, mapping, RUNS, delta, Deadline(0))


def test_what_is_not_there_can_not_be_copied(template: int) -> None:
    with Holder(template) as parent, memfd() as delta:
        mapping = memory.guest_ram(parent.pid, Inode.of(template))
        with memory.filling(parent.pid, mapping, delta) as fill, pytest.raises(StartFailed):
            fill([(1 << 39, PAGE)], NEVER)


# the table


@given(runs_of_pages)
def test_a_table_is_read_as_it_was_written(runs: list[Run]) -> None:
    expected = memory.joined(runs)
    with memfd() as delta:
        memory.write_table(delta, 128 * PAGE, expected)
        assert memory.read_table(delta, 128 * PAGE) == expected


def test_a_longer_table_is_replaced_by_a_shorter_one() -> None:
    with memfd() as delta:
        memory.write_table(delta, SIZE, RUNS)
        memory.write_table(delta, SIZE, RUNS[:1])
        assert memory.read_table(delta, SIZE) == RUNS[:1]


@pytest.mark.parametrize(
    "runs",
    [
        [(0, 0)],
        [(1, PAGE)],
        [(0, PAGE + 1)],
        [(PAGE, PAGE), (0, PAGE)],
        [(0, 2 * PAGE), (PAGE, PAGE)],
        [(SIZE, PAGE)],
        [(0, SIZE + PAGE)],
        [((1 << 64) - PAGE, 2 * PAGE)],
    ],
)
def test_a_damaged_table_is_refused(runs: list[Run]) -> None:
    with memfd() as delta:
        memory.write_table(delta, SIZE, runs)
        with pytest.raises(StartFailed, match="damaged"):
            memory.read_table(delta, SIZE)


@pytest.mark.parametrize("damage", ["empty", "short", "long", "magic", "another size"])
def test_a_file_that_is_no_delta_is_refused(damage: str) -> None:
    with memfd() as delta:
        memory.write_table(delta, SIZE, RUNS)
        length = os.fstat(delta).st_size
        if damage == "magic":
            os.pwrite(delta, b"x", SIZE)
        elif damage != "another size":
            os.ftruncate(delta, {"empty": 0, "short": length - 1, "long": length + 1}[damage])
        with pytest.raises(StartFailed):
            memory.read_table(delta, SIZE // 2 if damage == "another size" else SIZE)
