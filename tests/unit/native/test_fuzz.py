"""Nobody who speaks to a keeper, an init or an agent can crash it. Under the sanitizers, where they have been built."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.native.wireside import (
    AGENT,
    INIT,
    KEEPER,
    SANITIZED,
    Client,
    Controller,
    Gone,
    Held,
    Line,
    Refused,
    spawn_fields,
    start_init,
    start_keeper,
    wait_for,
)

from isolat.wire import codec
from isolat.wire import kinds as k

SAFE = settings(
    max_examples=120, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def built(name: str, otherwise: Path) -> Path:
    binary = SANITIZED / name
    return binary if binary.exists() else otherwise


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Held]:
    held = start_keeper(tmp_path / "env", binary=built("isolat-keeper", KEEPER))
    held.c.hello()
    yield held
    held.stop()


@pytest.fixture
def init(tmp_path: Path) -> Iterator[Held]:
    held = start_init(tmp_path / "init", binary=built("isolat-init", INIT))
    yield held
    held.stop()


def start_agent(directory: Path) -> Held:
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    held = Held([str(built("isolat-agent", AGENT)), "--fd", "3"], 3, directory / "stderr", env)
    held.c.hello()
    return held


def connect(held: Held) -> Controller:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(held.log.parent / "keeper.sock"))
    return Controller(sock)


KINDS = sorted(k.KIND_NAMES)
TAGS = st.integers(0, 51)
# Everything but what would do harm to this machine: no TO to nowhere is needed, no path outside of nowhere.
WORDS = st.sampled_from(
    [b"", b"p", b"q", b"guest", b"guest/p", b"/nowhere/isolat/x", b"a/b", b"/", b"//", b"\0", b"x" * 300]
)
NUMBERS = st.one_of(
    st.integers(0, 130), st.sampled_from([-1, k.F_APART | k.F_MAIN | k.F_LOG, 511, 512, 1 << 31, 1 << 62, -(1 << 63)])
)
RAW = st.binary(max_size=40)


def value(tag: int) -> st.SearchStrategy[codec.Value]:
    return st.one_of(WORDS, RAW, NUMBERS)


FLAT = st.lists(TAGS.flatmap(lambda t: st.tuples(st.just(t), value(t))), max_size=8)
NESTED = st.lists(
    st.one_of(
        TAGS.flatmap(lambda t: st.tuples(st.just(t), value(t))),
        st.tuples(st.sampled_from([k.T_STEP, k.T_WRITE, k.T_LINE, k.T_PROC]), FLAT),
    ),
    max_size=6,
)
HARMFUL = {k.QUIT, k.SIGNAL, k.WRITE, k.STEP, k.SPAWN}


@st.composite
def well_formed(draw: st.DrawFn, kinds: list[int]) -> bytes:
    kind, id = draw(st.sampled_from(kinds)), draw(st.sampled_from([0, 1, 2, 3, 1 << 31]))
    if kind in k.RAW_KINDS or draw(st.integers(0, 9)) == 0:
        return codec.pack_raw(kind, draw(st.one_of(RAW, st.just(bytes(70000)))), id)
    return codec.pack(kind, id, draw(NESTED))


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    frame = bytearray(draw(well_formed([kind for kind in KINDS if kind not in HARMFUL])))
    for _ in range(draw(st.integers(1, 3))):
        frame[draw(st.integers(0, min(len(frame), 24) - 1))] = draw(st.integers(0, 255))
    return bytes(frame[: draw(st.integers(1, len(frame)))])


HARMLESS = [kind for kind in KINDS if kind not in HARMFUL]
FRAMES = st.lists(st.one_of(broken(), well_formed(HARMLESS), st.binary(max_size=60)), max_size=6)


def throw(line: Line, data: list[bytes], fds: list[int]) -> None:
    with contextlib.suppress(OSError, Gone):
        for part in data:
            line.send_bytes(part, fds)
    with contextlib.suppress(OSError):
        line.sock.shutdown(socket.SHUT_WR)
    line.sock.settimeout(5)
    with contextlib.suppress(OSError):
        while line.sock.recv(1 << 16):
            pass
    line.close()


def harmless(data: list[bytes]) -> bool:
    """Mutation may turn a frame into a request that does something."""
    with contextlib.suppress(Exception):
        return not any(f.kind in HARMFUL for f in codec.Decoder().feed(b"".join(data)))
    return not any(kind in b"".join(data)[4:5] for kind in HARMFUL)


@SAFE
@given(data=FRAMES, descriptor=st.booleans())
def test_controllers(keeper: Held, data: list[bytes], descriptor: bool) -> None:
    if not harmless(data):
        return
    null = os.open("/dev/null", os.O_RDONLY)
    throw(connect(keeper), data, [null] if descriptor else [])
    os.close(null)
    keeper.c.hello()


@SAFE
@given(data=st.lists(st.one_of(broken(), well_formed(KINDS), st.binary(max_size=60)), max_size=6), stdin=st.booleans())
def test_clients(keeper: Held, data: list[bytes], stdin: bool) -> None:
    keeper.c.spawn("p", ["cat"], flags=k.F_STDIN)
    client = keeper.c.adopt("p", stdin=stdin)
    throw(client, data, [])
    with contextlib.suppress(Refused):
        keeper.c.ask(k.SIGNAL, [(k.T_KEY, "p"), (k.T_SIGNAL, 9)])
    keeper.c.exited("p")
    keeper.c.ask(k.FORGET, [(k.T_KEY, "p")])


GUEST = """
import os, socket, sys
s = socket.socket(fileno=3)
s.sendall(bytes.fromhex(sys.argv[1]))
null = os.open('/dev/null', 0)
for part in sys.argv[2:]:
    s.recv(1 << 16)
    socket.send_fds(s, [bytes.fromhex(part) or b'x'], [null] * 3)
"""
HELLO = codec.pack(k.HELLO, 0, [(k.T_VERSION, 1), (k.T_ROLE, "init")])


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from([k.OK, k.ERROR, k.EXITED, k.HELLO, k.LOST, k.SPAWN]))
    exited: codec.Fields = [(k.T_KEY, "p"), (k.T_CODE, 3), (k.T_SIGNAL, 0)]
    started: codec.Fields = [(k.T_PID, 7)]
    fields: codec.Fields = draw(st.one_of(NESTED, st.just(exited), st.just(started)))
    return codec.pack(kind, draw(st.integers(0, 4)), fields, draw(st.integers(0, 4)))


@settings(SAFE, max_examples=25)
@given(first=st.one_of(st.just(HELLO), broken(), answers()), parts=st.lists(st.one_of(answers(), broken()), max_size=3))
def test_guests(keeper: Held, first: bytes, parts: list[bytes]) -> None:
    c = keeper.c
    argv = ["/usr/bin/python3", "-IS", "-c", GUEST, first.hex(), *(p.hex() for p in parts)]
    with contextlib.suppress(Refused, TimeoutError):
        c.answer(c.send(k.SPAWN, spawn_fields("guest", argv, k.F_CONTROL)), 0.2)
    asked = [
        c.send(k.SPAWN, spawn_fields("p", ["true"], to="guest")),
        c.send(k.SPAWN, spawn_fields("t", ["true"], k.F_TTY, to="guest")),
        c.send(k.READ, [(k.T_TO, "guest"), (k.T_PATH, b"/x")]),
    ]
    for id in asked:
        with contextlib.suppress(Refused, TimeoutError):
            c.answer(id, 0.03)
    with contextlib.suppress(Refused):
        c.ask(k.SIGNAL, [(k.T_KEY, "guest"), (k.T_SIGNAL, 9)])
    wait_for(lambda: all(p.int(k.T_STATE) for p in c.procs().values()), "the guest's end")
    for name in c.procs():
        to, _, key = name.rpartition("/")
        c.ask(k.FORGET, [(k.T_KEY, key), *([(k.T_TO, to)] if to else [])])
    c.events.clear()


@settings(SAFE, max_examples=25)
@given(data=FRAMES)
def test_the_controller_of_an_init(tmp_path_factory: pytest.TempPathFactory, data: list[bytes]) -> None:
    if not harmless(data):
        return
    init = start_init(tmp_path_factory.mktemp("init"), binary=built("isolat-init", INIT))
    throw(init.c, data, [])
    assert init.process.wait(10) == 0, init.words()


# Requests are answered and streams are fed by their real numbers where the drawn one is 1, or nothing would get far.
SERIAL_GUEST = """
import socket, sys
sys.path.insert(0, sys.argv[1])
from isolat.wire import codec, kinds as k
s = socket.socket(fileno=3)
decoder, request, stream = codec.Decoder(), 0, 0
def listen():
    global request, stream
    for f in decoder.feed(s.recv(1 << 16)):
        if f.kind not in k.RAW_KINDS:
            request, stream = f.id, f.int(k.T_STREAM, stream)
for part in sys.argv[2:]:
    data = bytearray.fromhex(part)
    if request == 0 or data[4:5] in (b"\\x20", b"\\x21"):
        listen()
    if data[8:12] == b"\\1\\0\\0\\0":
        data[8:12] = (stream if data[4] in k.RAW_KINDS else request).to_bytes(4, "little")
    s.sendall(data)
listen()
"""
SOURCE = str(Path(codec.__file__).parents[2])
GREETING = codec.pack(k.OK, 1, [(k.T_VERSION, 1), (k.T_ROLE, "agent")])


@st.composite
def stream_frames(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(sorted(k.RAW_KINDS)))
    plain = bytes([draw(st.integers(0, 3))])
    size = draw(st.sampled_from([0, 1, 4, 5, 40, 65536, 65537]))
    credit = draw(st.sampled_from([0, 1, 1 << 18, (1 << 32) - 1])).to_bytes(4, "little")
    body = draw(st.sampled_from([plain, plain + credit, plain + bytes(size)]))
    return codec.pack_raw(kind, body, draw(st.sampled_from([1, 1, 1, 0, 2])))


@st.composite
def serial_answers(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from([k.OK, k.OK, k.ERROR, k.EXITED]))
    exited: codec.Fields = [(k.T_KEY, draw(st.sampled_from(["p", "t"]))), (k.T_CODE, 3), (k.T_SIGNAL, 0)]
    fields: codec.Fields = draw(st.one_of(st.just(exited), st.just([(k.T_PID, 7), (k.T_COUNT, -1)]), NESTED))
    return codec.pack(kind, 0 if kind == k.EXITED else draw(st.integers(0, 2)), fields)


@settings(SAFE, max_examples=40)
@given(
    first=st.one_of(st.just(GREETING), broken(), serial_answers()),
    parts=st.lists(st.one_of(serial_answers(), stream_frames(), broken()), max_size=6),
    apart=st.booleans(),
)
def test_guests_without_descriptors(keeper: Held, first: bytes, parts: list[bytes], apart: bool) -> None:
    c = keeper.c
    argv = ["/usr/bin/python3", "-IS", "-c", SERIAL_GUEST, SOURCE, first.hex(), *(part.hex() for part in parts)]
    more: codec.Fields = [(k.T_PARK, 20), (k.T_GRACE, 20)]
    with contextlib.suppress(Refused, TimeoutError):
        c.answer(c.send(k.SPAWN, spawn_fields("guest", argv, k.F_CONTROL | k.F_SERIAL, more=more)), 0.3)
    client: Client = c.adopt("guest/p", stdin=True)
    client.send_bytes(codec.pack_eof(k.STDIN))
    flags, home = (k.F_STDIN | k.F_APART | k.F_MAIN | k.F_LOG, bytes(keeper.log.parent)) if apart else (k.F_STDIN, b"")
    asked = [
        c.send(k.SPAWN, spawn_fields("p", ["true"], flags, to="guest", more=[(k.T_HOME, home)])),
        c.send(k.SPAWN, spawn_fields("t", ["true"], k.F_TTY, to="guest")),
        c.send(k.RESIZE, [(k.T_KEY, "guest/t"), (k.T_ROWS, 1), (k.T_COLS, 1)]),
    ]
    for id in asked:
        with contextlib.suppress(Refused, TimeoutError):
            c.answer(id, 0.03)
    client.close()
    with contextlib.suppress(Refused):
        c.ask(k.SIGNAL, [(k.T_KEY, "guest"), (k.T_SIGNAL, 9)])
    wait_for(lambda: all(p.int(k.T_STATE) == 1 for p in c.procs().values()), "the guest's end")
    for name in c.procs():
        to, _, key = name.rpartition("/")
        c.ask(k.FORGET, [(k.T_KEY, key), *([(k.T_TO, to)] if to else [])])
    c.events.clear()


@settings(SAFE, max_examples=25)
@given(data=FRAMES)
def test_the_controller_of_an_agent(tmp_path_factory: pytest.TempPathFactory, data: list[bytes]) -> None:
    if not harmless(data):
        return
    agent = start_agent(tmp_path_factory.mktemp("agent"))
    throw(agent.c, data, [])
    assert agent.process.wait(10) == 0, agent.words()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Held]:
    held = start_agent(tmp_path)
    yield held
    held.stop()


@SAFE
@given(data=st.lists(stream_frames(), max_size=20), flags=st.sampled_from([k.F_STDIN, k.F_STDIN | k.F_TTY, 0]))
def test_streams_of_any_form_to_an_agent(agent: Held, data: list[bytes], flags: int) -> None:
    c = agent.c
    c.spawn("p", ["sleep", "60"], flags=flags, more=[(k.T_STREAM, 1)])
    c.spawn("q", ["head", "-c", "100000"], flags=flags, more=[(k.T_STREAM, 2)])
    for part in data:
        if part[8:12] != bytes(4):  # a stream without a number is the end of the connection
            c.send_bytes(part)
    for key in ("p", "q"):
        c.ask(k.SIGNAL, [(k.T_KEY, key), (k.T_SIGNAL, 9)])
    wait_for(lambda: all(p.int(k.T_STATE) == 1 for p in c.procs().values()), "their end")
    for key in ("p", "q"):
        c.ask(k.FORGET, [(k.T_KEY, key)])
    c.events.clear()


def test_steps_and_spawns_of_any_form(keeper: Held) -> None:
    @SAFE
    @given(
        kind=st.sampled_from([k.SPAWN, k.STEP, k.WRITE, k.SIGNAL]),
        fields=NESTED,
        op=st.integers(0, 9),
        nfds=st.integers(0, 4),
    )
    def check(kind: int, fields: codec.Fields, op: int, nfds: int) -> None:
        # a directory that does not exist, a command that does not exist: nothing of it can come to pass
        if any(tag in {k.T_SCOPE, k.T_INVERSE, k.T_ARGV} for tag, _ in fields):
            return
        own: codec.Fields = [(k.T_KEY, "p"), (k.T_PATH, b"/nowhere/y"), (k.T_ARGV, b"/nowhere/x"), (k.T_OP, op % 2)]
        nested: codec.Fields = [(k.T_OP, op), (k.T_PATH, b"/proc/isolat/none"), (k.T_SOURCE, b"/nowhere"),
                                (k.T_TARGET, b"/proc/isolat/none"), *fields]  # fmt: skip
        null = os.open("/dev/null", os.O_RDONLY)
        other = connect(keeper)
        with contextlib.suppress(Refused, Gone, OSError):
            other.send_bytes(codec.pack(kind, 9, [*own, *fields, (k.T_STEP, nested)], nfds), [null] * nfds)
            other.answer(9)
        os.close(null)
        other.close()
        assert keeper.process.poll() is None, keeper.words()

    check()


def test_a_frame_with_more_descriptors_than_allowed(keeper: Held) -> None:
    other = connect(keeper)
    null = os.open("/dev/null", os.O_RDONLY)
    with contextlib.suppress(OSError):
        for _ in range(10):
            other.send_bytes(codec.pack(k.PROCS, 1), [null] * 200)
    other.close()
    os.close(null)
    keeper.c.hello()


def test_a_controller_that_never_reads_is_cut_off(keeper: Held) -> None:
    other = connect(keeper)
    keeper.c.hello()
    other.sock.settimeout(10)
    path = keeper.log.parent / "big"
    path.write_bytes(bytes(300_000))
    with pytest.raises(OSError, match=r"reset|pipe"):
        for i in range(1, 2000):
            other.send_bytes(codec.pack(k.READ, i, [(k.T_PATH, bytes(path)), (k.T_COUNT, 256 << 10)]))
    other.close()
    keeper.c.hello()


def test_credit_is_a_bound(keeper: Held) -> None:
    keeper.c.spawn("p", ["sleep", "60"], flags=k.F_STDIN)
    client: Client = keeper.c.adopt("p", stdin=True)
    with contextlib.suppress(OSError):
        for _ in range(10):
            client.send_bytes(codec.pack_data(0, bytes(k.MAX_DATA_BYTES)))
    assert client.gone()
    client.close()
