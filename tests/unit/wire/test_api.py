"""Messages and descriptors arrive as they were sent; whatever else arrives is one ProtocolError."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolat.errors import ProtocolError
from isolat.wire import api

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    a, b = socket.socketpair()
    a.settimeout(10)
    b.settimeout(10)
    with a, b:
        yield a, b


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_messages_and_their_descriptors_stay_together(pair: Pair) -> None:
    a, b = pair
    read_end, write_end = os.pipe()
    api.send(a, {"n": 1})
    api.send(a, {"n": 2}, [read_end, write_end])
    api.send(a, {"n": 3})
    receiver = api.Receiver(b)
    assert receiver.receive() == ({"n": 1}, [])
    message, fds = receiver.receive()
    assert message == {"n": 2}
    assert len(fds) == 2
    os.write(fds[1], b"through")
    assert os.read(read_end, 10) == b"through"
    assert all(not os.get_inheritable(fd) for fd in fds)
    assert receiver.receive() == ({"n": 3}, [])
    for fd in (read_end, write_end, *fds):
        os.close(fd)


def test_a_clean_end_is_an_eof_error(pair: Pair) -> None:
    a, b = pair
    a.close()
    with pytest.raises(EOFError):
        api.Receiver(b).receive()


def test_a_cut_message_is_a_protocol_error_and_its_descriptors_are_closed(pair: Pair) -> None:
    a, b = pair
    before = open_descriptors()
    fd = os.open("/dev/null", os.O_RDONLY)
    data = api.pack({"n": 1})
    socket.send_fds(a, [data[:-1]], [fd])
    os.close(fd)
    a.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="middle of a message"):
        api.Receiver(b).receive()
    assert open_descriptors() == before


def test_descriptors_in_the_middle_of_a_message_are_refused(pair: Pair) -> None:
    a, b = pair
    before = open_descriptors()
    data = api.pack({"n": 1})
    a.sendall(data[:6])
    with Path("/dev/null").open("rb") as null:
        socket.send_fds(a, [data[6:]], [null.fileno()])
    with pytest.raises(ProtocolError, match="descriptors came"):
        api.Receiver(b).receive()
    assert open_descriptors() == before


def test_a_length_beyond_the_limit_is_refused_before_it_is_read(pair: Pair) -> None:
    a, b = pair
    a.sendall((api.MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(ProtocolError, match="longer than"):
        api.Receiver(b).receive()


def test_a_large_message_passes_and_a_larger_one_cannot_be_packed(pair: Pair) -> None:
    a, b = pair
    text = "x" * (api.MAX_MESSAGE_BYTES - 20)
    sender = threading.Thread(target=api.send, args=(a, {"text": text}))
    sender.start()
    message, _ = api.Receiver(b).receive()
    sender.join()
    assert message == {"text": text}
    with pytest.raises(ProtocolError, match="longer than"):
        api.pack({"text": text + "x" * 20})


def test_too_many_descriptors_are_refused(pair: Pair) -> None:
    with pytest.raises(ProtocolError, match="descriptors"):
        api.send(pair[0], {}, [0] * (api.MAX_DESCRIPTORS + 1))


def test_as_many_as_allowed_pass(pair: Pair) -> None:
    a, b = pair
    api.send(a, {}, [0] * api.MAX_DESCRIPTORS)
    _, fds = api.Receiver(b).receive()
    assert len(fds) == api.MAX_DESCRIPTORS
    for fd in fds:
        os.close(fd)


def test_a_time_out_loses_nothing(pair: Pair) -> None:
    a, b = pair
    b.settimeout(0.02)
    data = api.pack({"n": 1})
    receiver = api.Receiver(b)
    a.sendall(data[:7])
    with pytest.raises(TimeoutError):
        receiver.receive()
    a.sendall(data[7:])
    assert receiver.receive() == ({"n": 1}, [])


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b"1 2", b"NaN", b"[" * 100_000, b""])
def test_what_is_no_json_object_is_a_protocol_error(pair: Pair, body: bytes) -> None:
    a, b = pair
    a.sendall(len(body).to_bytes(4, "little") + body)
    if not body:
        a.sendall(b"x")
    with pytest.raises(ProtocolError):
        api.Receiver(b).receive()


@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda b: len(b).to_bytes(4, "little") + b))
@settings(max_examples=200)
def test_no_bytes_make_the_assembler_raise_anything_else(data: bytes) -> None:
    assembler = api.Assembler()
    try:
        while data and assembler.wanted:
            taken, data = data[: assembler.wanted], data[assembler.wanted :]
            message = assembler.feed(taken)
            assert message is None or isinstance(message, dict)
    except ProtocolError:
        pass


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20), max_size=5), st.integers(1, 7))
def test_a_message_survives_any_fragmentation(message: dict[str, Any], step: int) -> None:
    data = api.pack(message)
    assembler = api.Assembler()
    found = []
    while data:
        count = min(step, assembler.wanted)
        whole = assembler.feed(data[:count])
        data = data[count:]
        if whole is not None:
            found.append(whole)
    assert found == [message]
    assert assembler.idle


def test_a_request_is_checked() -> None:
    assert api.parse_request(api.request("ps", {"all": True})) == ("ps", {"all": True})
    for bad in (
        {},
        {"v": 2, "verb": "ps"},
        {"v": True, "verb": "ps"},
        {"v": 1, "verb": 3},
        {"v": 1, "verb": "a", "args": []},
    ):
        with pytest.raises(ProtocolError):
            api.parse_request(bad)
