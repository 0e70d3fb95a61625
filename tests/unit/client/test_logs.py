"""Logs are read whole, in order, over rotations, and followed to the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.cli.logs import Printer
from isolat.client import logs
from isolat.client.logs import LogRecord


def record(data: bytes, stream: int = 1, time_ns: int = 5) -> bytes:
    return time_ns.to_bytes(8, "little") + len(data).to_bytes(4, "little") + bytes((stream, 0, 0, 0)) + data


class Directory:
    """An environment's directory, written as the keeper writes it."""

    def __init__(self, path: Path, files: int = 3) -> None:
        self.path = path
        self.files = files
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def write(self, data: bytes, stream: int = 1, time_ns: int = 5) -> None:
        (self.path / "log").mkdir(exist_ok=True)
        with (self.path / "log" / "0").open("ab", buffering=0) as file:
            file.write(record(data, stream, time_ns))

    def rotate(self) -> None:
        for number in range(self.files - 1, 0, -1):
            older = self.path / "log" / str(number - 1)
            if older.exists():
                older.rename(self.path / "log" / str(number))

    def end(self) -> None:
        (self.path / "exit.json.tmp").write_text("{}")
        (self.path / "exit.json.tmp").rename(self.path / "exit.json")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    one = Directory(tmp_path)
    yield one
    os.close(one.fd)


def data(found: Iterator[LogRecord]) -> list[bytes]:
    return [one.data for one in found]


def test_records_with_time_and_stream(directory: Directory) -> None:
    directory.write(b"a\n", 1, 7)
    directory.write(b"\0\xff", 2, 8)
    assert list(logs.read(directory.fd)) == [LogRecord(7, "stdout", b"a\n"), LogRecord(8, "stderr", b"\0\xff")]


def test_without_any_log_there_is_nothing(directory: Directory) -> None:
    assert list(logs.read(directory.fd)) == []


def test_rotated_files_are_read_oldest_first(directory: Directory) -> None:
    for n in range(5):
        directory.write(b"%d" % n)
        directory.rotate()
    directory.write(b"5")
    assert data(logs.read(directory.fd)) == [b"3", b"4", b"5"]


def test_an_unfinished_record_is_left_out(directory: Directory) -> None:
    directory.write(b"whole")
    with (directory.path / "log" / "0").open("ab") as file:
        file.write(record(b"half")[:-1])
    assert data(logs.read(directory.fd)) == [b"whole"]


def test_following_ends_with_the_environment_and_misses_nothing(directory: Directory) -> None:
    """Written and rotated as quickly as can be, far more often than there are files kept behind."""
    count = 400

    def writer() -> None:
        time.sleep(0.1)
        for n in range(count):
            directory.write(b"%d" % n)
            if n % 40 == 39:
                directory.rotate()
                time.sleep(0.05)
        directory.end()

    thread = threading.Thread(target=writer)
    thread.start()
    found = data(logs.read(directory.fd, follow=True))
    thread.join()
    assert found == [b"%d" % n for n in range(count)]


def test_following_is_quick(directory: Directory) -> None:
    arrived: list[float] = []

    def reader() -> None:
        for _ in logs.read(directory.fd, follow=True):
            arrived.append(time.monotonic())

    directory.write(b"first")
    thread = threading.Thread(target=reader)
    thread.start()
    time.sleep(0.3)
    written = time.monotonic()
    directory.write(b"second")
    time.sleep(0.3)
    directory.end()
    thread.join(10)
    assert not thread.is_alive()
    assert arrived[1] - written < 0.1


def test_following_ends_when_the_directory_goes(directory: Directory) -> None:
    directory.write(b"x")

    def remove() -> None:
        time.sleep(0.2)
        (directory.path / "log" / "0").unlink()
        (directory.path / "log").rmdir()
        directory.path.rmdir()

    thread = threading.Thread(target=remove)
    thread.start()
    assert data(logs.read(directory.fd, follow=True)) == [b"x"]
    thread.join()
    directory.path.mkdir()


def test_following_ends_when_it_is_told(directory: Directory) -> None:
    directory.write(b"x")
    read_end, write_end = os.pipe()
    threading.Timer(0.2, lambda: os.close(write_end)).start()
    assert data(logs.read(directory.fd, follow=True, ended=read_end)) == [b"x"]
    os.close(read_end)


def test_following_begins_with_the_last_lines(directory: Directory) -> None:
    directory.write(b"a\nb\nc\n")

    def more() -> None:
        time.sleep(0.2)
        directory.write(b"d\n")
        directory.end()

    thread = threading.Thread(target=more)
    thread.start()
    assert b"".join(data(logs.read(directory.fd, follow=True, lines=1))) == b"c\nd\n"
    thread.join()


def test_since(directory: Directory) -> None:
    for n in (10, 20, 30):
        directory.write(b"%d\n" % n, time_ns=n)
    assert data(logs.read(directory.fd, since_ns=20)) == [b"20\n", b"30\n"]
    assert data(logs.read(directory.fd, since_ns=20, lines=1)) == [b"30\n"]


@given(st.lists(st.text(alphabet="ab\n", max_size=6).map(str.encode), max_size=8), st.integers(0, 6))
def test_tail_is_the_tail_of_all_bytes(pieces: list[bytes], count: int) -> None:
    whole = b"".join(pieces)
    lines = whole.splitlines(keepends=True)
    expected = b"".join(lines[max(0, len(lines) - count) :]) if count else b""
    found = logs.tail([LogRecord(1, "stdout", piece) for piece in pieces], count)
    assert b"".join(one.data for one in found) == expected


@given(st.binary(max_size=80))
def test_no_bytes_make_the_reader_raise(data: bytes) -> None:
    rest = bytearray(data)
    list(logs.take(rest))
    assert len(rest) <= len(data)


def test_timestamps_begin_lines_of_their_stream(tmp_path: Path) -> None:
    out = os.open(tmp_path / "out", os.O_CREAT | os.O_RDWR)
    err = os.open(tmp_path / "err", os.O_CREAT | os.O_RDWR)
    printer = Printer(True, {"stdout": out, "stderr": err})
    for one in (
        LogRecord(1, "stdout", b"a"), LogRecord(2, "stderr", b"E\r\n"), LogRecord(3, "stdout", b"b\nc\nd"),
        LogRecord(4, "stdout", b"e\n"),
    ):  # fmt: skip
        printer.put(one)
    os.close(out)
    os.close(err)
    at = "1970-01-01T00:00:00.00000000"
    assert (tmp_path / "out").read_text() == f"{at}1Z ab\n{at}3Z c\n{at}3Z de\n"
    assert (tmp_path / "err").read_bytes() == f"{at}2Z E\r\n".encode()
