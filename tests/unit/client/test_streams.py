"""The pump against a keeper in the test: bytes, credit, endings, broken outputs."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.client import streams
from isolat.client.streams import Ending, Pump
from isolat.wire import codec
from isolat.wire import kinds as k

from .keeper import Keeper

MIB = 1 << 20


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    one = Keeper()
    yield one
    one.close()


def capture(
    keeper: Keeper, source: bytes | int | None = None, timeout_s: float | None = 20
) -> tuple[Ending, dict[int, bytes]]:
    found: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}

    def take(stream: int, data: bytes) -> None:
        found[stream] += data

    pump = Pump(keeper.client, key="guest/main", source=source, on_output=take, timeout_s=timeout_s)
    return pump.run(), {stream: bytes(data) for stream, data in found.items()}


def exit_at_eof(keeper: Keeper) -> None:
    def finish() -> None:
        keeper.eof.wait(60)
        keeper.exit(0)

    threading.Thread(target=finish, daemon=True).start()


def test_the_repeated_numbers_are_the_protocols() -> None:
    for name in (
        "SIGNAL RESIZE ERROR DATA EOF CREDIT EXITED LOST T_KEY T_ROWS T_COLS T_SIGNAL T_SCOPE T_CODE T_MESSAGE T_TAIL "
        "HEADER_BYTES MAX_BODY_BYTES MAX_DATA_BYTES SCOPE_PROCESS SCOPE_GROUP"
    ).split():
        assert getattr(streams, name) == getattr(k, name), name


@given(st.integers(-(2**63), 2**63 - 1), st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 2**32 - 1))
def test_requests_are_the_codecs(number: int, text: str, id: int) -> None:
    fields = streams.field_text(k.T_KEY, text) + streams.field_int(k.T_SIGNAL, number)
    assert streams.pack(k.SIGNAL, fields, id) == codec.pack(k.SIGNAL, id, [(k.T_KEY, text), (k.T_SIGNAL, number)])


def test_output_arrives_whole_and_apart(keeper: Keeper) -> None:
    keeper.write(1, b"out\0\xff")
    keeper.write(2, b"err")
    keeper.write(1, b"more")
    keeper.exit(3)
    ending, output = capture(keeper)
    assert (ending.kind, ending.code) == ("exited", 3)
    assert output == {1: b"out\0\xffmore", 2: b"err"}


@pytest.mark.parametrize(("code", "signal", "expected"), [(0, 0, 0), (255, 0, 255), (137, 9, 137), (0, 15, 143)])
def test_exit_codes(keeper: Keeper, code: int, signal: int, expected: int) -> None:
    keeper.exit(code, signal)
    assert capture(keeper)[0].code == expected


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=8), st.integers(1, 30))
def test_any_fragmentation_gives_the_same_output(frames: list[tuple[int, bytes]], step: int) -> None:
    a, b = socket.socketpair()
    with a, b:
        found = {1: b"", 2: b""}

        def take(stream: int, data: bytes) -> None:
            found[stream] += data

        pump = Pump(a, on_output=take)
        data = b"".join(codec.pack_data(stream, piece) for stream, piece in frames)
        data += codec.pack(k.EXITED, 0, [(k.T_CODE, 7)])
        for at in range(0, len(data), step):
            pump._decode(memoryview(data)[at : at + step])
        assert pump.ending is not None
        assert pump.ending.code == 7
        for stream in (1, 2):
            assert found[stream] == b"".join(piece for s, piece in frames if s == stream)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_pump_raise(data: bytes) -> None:
    a, b = socket.socketpair()
    with a, b:
        b.sendall(data)
        b.shutdown(socket.SHUT_WR)
        assert Pump(a, on_output=lambda _s, _d: None, source=b"x").run().kind in {"exited", "lost", "failed"}


def test_a_hundred_megabytes_out_through_a_pipe(keeper: Keeper) -> None:
    block = os.urandom(MIB)
    read_end, write_end = os.pipe()
    digest = hashlib.sha256()
    count = 0

    def drain() -> None:
        nonlocal count
        while data := os.read(read_end, MIB):
            digest.update(data)
            count += len(data)

    def produce() -> None:
        for _ in range(100):
            keeper.write(1, block)
        keeper.exit(0)

    threads = [threading.Thread(target=drain), threading.Thread(target=produce)]
    for thread in threads:
        thread.start()
    ending = Pump(keeper.client, targets=(write_end, 2)).run()
    os.close(write_end)
    for thread in threads:
        thread.join()
    os.close(read_end)
    assert ending.kind == "exited"
    assert count == 100 * MIB
    assert digest.digest() == hashlib.sha256(block * 100).digest()


def test_a_hundred_megabytes_in_never_beyond_the_credit(keeper: Keeper) -> None:
    keeper.keep_stdin = False
    read_end, write_end = os.pipe()

    def produce() -> None:
        for _ in range(100):
            block = memoryview(bytes(MIB))
            while block:
                block = block[os.write(write_end, block) :]
        os.close(write_end)

    def finish() -> None:
        keeper.eof.wait(60)
        keeper.exit(0)

    threads = [threading.Thread(target=produce), threading.Thread(target=finish)]
    for thread in threads:
        thread.start()
    ending, _ = capture(keeper, read_end, 60)
    for thread in threads:
        thread.join()
    os.close(read_end)
    assert ending.kind == "exited"
    assert keeper.stdin_bytes == 100 * MIB
    assert not keeper.overrun


def test_given_bytes_are_the_whole_input(keeper: Keeper) -> None:
    data = os.urandom(3 * MIB)
    exit_at_eof(keeper)
    assert capture(keeper, data)[0].kind == "exited"
    assert bytes(keeper.stdin) == data


def test_empty_given_input_is_an_end_of_file(keeper: Keeper) -> None:
    exit_at_eof(keeper)
    assert capture(keeper, b"")[0].kind == "exited"
    assert keeper.stdin == b""


def test_nothing_is_read_without_credit() -> None:
    keeper = Keeper(credit=0)
    read_end, write_end = os.pipe()
    os.write(write_end, b"precious")
    threading.Timer(0.2, keeper.exit).start()
    assert capture(keeper, read_end)[0].kind == "exited"
    assert os.read(read_end, 100) == b"precious"
    keeper.close()
    os.close(read_end)
    os.close(write_end)


def test_nothing_is_read_when_no_input_is_asked_for(keeper: Keeper) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"precious")
    keeper.exit(0)
    capture(keeper, None)
    assert not keeper.eof.is_set()
    assert os.read(read_end, 100) == b"precious"
    os.close(read_end)
    os.close(write_end)


def test_a_slow_reader_slows_the_keeper_down(keeper: Keeper) -> None:
    """What is not read stays with the keeper: the pump holds no more than a read and a pipe."""
    read_end, write_end = os.pipe()
    sent = 0

    def produce() -> None:
        nonlocal sent
        for _ in range(256):
            keeper.write(1, bytes(64 << 10))
            sent += 64 << 10
        keeper.exit(0)

    pump = Pump(keeper.client, targets=(write_end, 2))
    threads = [threading.Thread(target=produce), threading.Thread(target=pump.run)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert sent < 2 * MIB
    left = 256 * (64 << 10)
    while left:
        left -= len(os.read(read_end, MIB))
    for thread in threads:
        thread.join()
    os.close(read_end)
    os.close(write_end)


def test_a_reader_that_goes_away_means_sigpipe_inside_and_the_end(keeper: Keeper) -> None:
    keeper.on_signal = lambda n: keeper.exit(128 + n, n)
    read_end, write_end = os.pipe()
    os.close(read_end)
    keeper.write(1, b"x" * 1000)
    pump = Pump(keeper.client, key="guest/main", targets=(write_end, 2))
    pump.run()
    os.close(write_end)
    assert pump.broken == "pipe"
    assert keeper.signals() == [(13, k.SCOPE_GROUP)]


def test_a_process_that_ignores_sigpipe_is_left_alone_after_a_moment(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_PIPE_GRACE_S", 0.2)
    read_end, write_end = os.pipe()
    os.close(read_end)
    keeper.write(1, b"x")
    pump = Pump(keeper.client, targets=(write_end, 2))
    ending = pump.run()
    os.close(write_end)
    assert (ending.kind, ending.code) == ("pipe", 141)


def test_a_full_disk_is_told(keeper: Keeper, capfd: pytest.CaptureFixture[str]) -> None:
    keeper.on_signal = lambda n: keeper.exit(128 + n, n)
    full = os.open("/dev/full", os.O_WRONLY)
    keeper.write(1, b"x")
    pump = Pump(keeper.client, targets=(full, 2))
    pump.run()
    os.close(full)
    assert pump.broken == "output"
    assert "No space left on device" in capfd.readouterr().err


def test_an_output_that_the_caller_closed_is_dropped(keeper: Keeper) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    keeper.write(1, b"x")
    keeper.exit(5)
    pump = Pump(keeper.client, targets=(fd, 2))
    assert pump.run().code == 5
    assert not pump.broken


def test_a_non_blocking_output_is_waited_for(keeper: Keeper) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    found = bytearray()

    def drain() -> None:
        while data := os.read(read_end, 64 << 10):
            found.extend(data)

    def produce() -> None:
        keeper.write(1, b"y" * MIB)
        keeper.exit(0)

    threads = [threading.Thread(target=drain), threading.Thread(target=produce)]
    for thread in threads:
        thread.start()
    Pump(keeper.client, targets=(write_end, 2)).run()
    os.close(write_end)
    for thread in threads:
        thread.join()
    os.close(read_end)
    assert bytes(found) == b"y" * MIB


def test_a_keeper_that_dies_is_lost(keeper: Keeper) -> None:
    keeper.write(1, b"last words")
    keeper.cut()
    ending, output = capture(keeper)
    assert ending.kind == "lost"
    assert output[1] == b"last words"


def test_a_guest_that_dies_is_lost(keeper: Keeper) -> None:
    keeper.send(codec.pack(k.LOST, 0, [(k.T_KEY, "guest/main")]))
    assert capture(keeper)[0].kind == "lost"


def test_a_failed_start_is_told(keeper: Keeper) -> None:
    keeper.send(codec.pack(k.ERROR, 0, [(k.T_MESSAGE, "no such command"), (k.T_CODE, 127)]))
    ending, _ = capture(keeper)
    assert (ending.kind, ending.code, ending.message) == ("failed", 127, "no such command")


def test_an_answer_to_a_signal_is_no_ending(keeper: Keeper) -> None:
    keeper.send(codec.pack(k.ERROR, 9, [(k.T_MESSAGE, "no such process")]) + codec.pack(k.OK, 10))
    keeper.exit(0)
    assert capture(keeper)[0].kind == "exited"


def test_a_time_limit_ends_the_pump(keeper: Keeper) -> None:
    assert capture(keeper, timeout_s=0.1)[0].kind == "timeout"


@pytest.mark.parametrize(
    ("pieces", "expected", "detached"),
    [
        ([b"a\x10\x11b"], b"a", True),
        ([b"a\x10", b"\x11"], b"a", True),
        ([b"a\x10", b"b"], b"a\x10b", False),
        ([b"\x10", b"\x10", b"\x11"], b"\x10", True),
        ([b"\x11\x10"], b"\x11", False),
    ],
)
def test_detach_keys(keeper: Keeper, pieces: list[bytes], expected: bytes, detached: bool) -> None:
    read_end, write_end = os.pipe()

    def typist() -> None:
        for piece in pieces:
            os.write(write_end, piece)
            time.sleep(0.05)
        if not detached:
            keeper.wait_for(lambda: bytes(keeper.stdin) == expected)
            keeper.exit(0)

    thread = threading.Thread(target=typist)
    thread.start()
    ending = Pump(keeper.client, source=read_end, detach_keys=True, timeout_s=20).run()
    thread.join()
    os.close(read_end)
    os.close(write_end)
    assert ending.kind == ("detached" if detached else "exited")
    keeper.wait_for(lambda: bytes(keeper.stdin) == expected)
