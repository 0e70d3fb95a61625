"""Frames survive the way to bytes and back in any fragmentation; whatever else comes is one ProtocolError."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolat.errors import ProtocolError
from isolat.wire import codec
from isolat.wire import kinds as k

TAGS = st.integers(1, 255)
VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.binary(max_size=40),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
FIELDS = st.lists(st.tuples(TAGS, VALUES), max_size=8)
KINDS = st.sampled_from([kind for kind in k.KIND_NAMES if kind not in k.RAW_KINDS])
IDS = st.integers(0, 2**32 - 1)


def as_bytes(value: codec.Value) -> bytes:
    if isinstance(value, int):
        return value.to_bytes(8, "little", signed=True)
    if isinstance(value, str):
        return value.encode()
    assert isinstance(value, bytes)
    return value


def grouped(fields: list[tuple[int, codec.Value]]) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    for tag, value in fields:
        found.setdefault(tag, []).append(as_bytes(value))
    return found


@given(st.lists(st.tuples(KINDS, IDS, FIELDS, st.integers(0, k.MAX_DESCRIPTORS)), max_size=5), st.integers(1, 50))
def test_frames_survive_any_fragmentation(
    frames: list[tuple[int, int, list[tuple[int, codec.Value]], int]], step: int
) -> None:
    data = b"".join(codec.pack(kind, id, fields, nfds) for kind, id, fields, nfds in frames)
    decoder = codec.Decoder()
    found = [frame for at in range(0, len(data), step) for frame in decoder.feed(data[at : at + step])]
    assert [(f.kind, f.id, f.nfds, f.fields) for f in found] == [
        (kind, id, nfds, grouped(fields)) for kind, id, fields, nfds in frames
    ]


@given(TAGS, st.integers(-(2**63), 2**63 - 1), st.text(st.characters(exclude_categories=["Cs"])))
def test_values_read_back_by_their_type(tag: int, number: int, text: str) -> None:
    frame = codec.Frame(0, 0, codec.pack_fields([(tag, number), (tag, number)]))
    assert (frame.int(tag), frame.ints(tag)) == (number, [number, number])
    assert codec.Frame(0, 0, codec.pack_fields([(tag, text)])).text(tag) == text


@given(FIELDS, FIELDS)
def test_nested_fields_read_like_frames(
    first: list[tuple[int, codec.Value]], second: list[tuple[int, codec.Value]]
) -> None:
    frame = codec.Frame(0, 0, codec.pack_fields([(k.T_STEP, first), (k.T_STEP, second)]))
    assert [inner.fields for inner in frame.nested(k.T_STEP)] == [grouped(first), grouped(second)]


@given(st.sampled_from([0, 1, 2]), st.binary(max_size=100))
def test_raw_frames(stream: int, data: bytes) -> None:
    decoder = codec.Decoder()
    one, two = decoder.feed(codec.pack_data(stream, data) + codec.pack_eof(stream))
    assert (one.kind, one.body) == (k.DATA, bytes((stream,)) + data)
    assert (two.kind, two.body) == (k.EOF, bytes((stream,)))


def test_what_is_absent_has_a_default() -> None:
    frame = codec.Frame(0, 0, b"")
    assert (frame.int(1), frame.int(1, 7), frame.text(1), frame.bytes(1), frame.all(1)) == (0, 7, "", b"", [])


def test_an_undecodable_argument_survives() -> None:
    argument = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert codec.Frame(0, 0, codec.pack_fields([(k.T_ARGV, argument)])).bytes(k.T_ARGV) == b"\xff\xfe"


@given(st.binary(max_size=120))
def test_no_bytes_make_the_decoder_raise_anything_else(data: bytes) -> None:
    try:
        for frame in codec.Decoder().feed(data):
            _ = frame.fields
    except ProtocolError:
        pass


@given(st.binary(max_size=60))
def test_no_body_makes_the_fields_raise_anything_else(body: bytes) -> None:
    try:
        fields = codec.parse_fields(body)
    except ProtocolError:
        return
    assert sum(5 + len(value) for values in fields.values() for value in values) == len(body)


@pytest.mark.parametrize(
    "header",
    [
        (k.MAX_BODY_BYTES + 1).to_bytes(4, "little") + bytes((k.OK, 0, 0, 0)),
        bytes(4) + bytes((k.OK, 1, 0, 0)),
        bytes(4) + bytes((k.OK, 0, k.MAX_DESCRIPTORS + 1, 0)),
    ],
)
def test_a_malformed_header_ends_the_connection(header: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        list(codec.Decoder().feed(header + bytes(4)))


def test_a_frame_that_is_too_long_is_not_packed() -> None:
    with pytest.raises(ProtocolError, match="longer than"):
        codec.pack(k.OK, 1, [(k.T_DATA, bytes(k.MAX_BODY_BYTES))])


def test_an_integer_of_another_length_is_refused() -> None:
    with pytest.raises(ProtocolError, match="8"):
        codec.read_int(b"1234")


def test_a_number_that_does_not_fit_is_no_silent_wrap() -> None:
    with pytest.raises(OverflowError):
        codec.pack(k.OK, 1, [(k.T_CODE, 2**63)])
