"""A link answers every asker exactly once, whatever the other end does."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolat.deadline import Deadline
from isolat.errors import (
    CommandNotFound,
    DeadlineExceeded,
    IsolatError,
    Lost,
    NotExecutable,
    NotFound,
    ProtocolError,
    StartFailed,
)
from isolat.places.base import CgroupFacts, CgroupMode, Command, Exit, Facts, Io
from isolat.places.link import Link, Reactor
from isolat.places.steps import Idmap, MakeDir
from isolat.places.wired import WiredPlace
from isolat.wire import kinds as k
from isolat.wire.codec import Decoder, Fields, Frame, pack

FACTS = Facts("6.12", "x86_64", CgroupFacts(CgroupMode.NONE))


class Peer:
    """The other end of a link, under the test's control."""

    def __init__(self, reactor: Reactor) -> None:
        ours, self.sock = socket.socketpair()
        self.link = Link(ours, reactor, "calm_teal")
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        self.sock.settimeout(5)

    def frame(self) -> Frame:
        while not self._frames:
            self._frames += list(self._decoder.feed(self.sock.recv(65536)))
        return self._frames.pop(0)

    def reply(self, kind: int = k.OK, fields: Fields | None = None) -> Frame:
        asked = self.frame()
        self.sock.sendall(pack(kind, asked.id, fields or []))
        return asked

    def in_background(self, kind: int = k.OK, fields: Fields | None = None) -> SimpleQueue[Frame]:
        asked: SimpleQueue[Frame] = SimpleQueue()
        threading.Thread(target=lambda: asked.put(self.reply(kind, fields)), daemon=True).start()
        return asked


@pytest.fixture(scope="module")
def reactor() -> Iterator[Reactor]:
    found = Reactor("test")
    yield found
    found.stop()


@pytest.fixture
def peer(reactor: Reactor) -> Iterator[Peer]:
    found = Peer(reactor)
    yield found
    found.sock.close()
    found.link.close()


def test_two_askers_get_their_own_replies_in_whatever_order(peer: Peer) -> None:
    answers: dict[int, int] = {}

    def ask(n: int) -> None:
        frame, _ = peer.link.request(k.PROCS, [(k.T_COUNT, n)], Deadline(5))
        answers[n] = frame.int(k.T_COUNT)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    first, second = peer.frame(), peer.frame()
    for frame in (second, first):
        peer.sock.sendall(pack(k.OK, frame.id, [(k.T_COUNT, frame.int(k.T_COUNT))]))
    for thread in threads:
        thread.join(5)
    assert answers == {0: 0, 1: 1}


def test_everybody_who_waits_is_told_when_the_keeper_dies(peer: Peer) -> None:
    told: list[str] = []

    def wait() -> None:
        try:
            peer.link.wait_exit("main", Deadline(10))
        except Lost:
            told.append("exit")

    thread = threading.Thread(target=wait)
    thread.start()
    threading.Timer(0.05, peer.sock.close).start()
    with pytest.raises(Lost):
        peer.link.request(k.PROCS, [], Deadline(10))
    thread.join(5)
    assert told == ["exit"]
    with pytest.raises(Lost):
        peer.link.request(k.PROCS, [], Deadline(10))


def test_a_reply_that_does_not_come_is_a_deadline(peer: Peer) -> None:
    with pytest.raises(DeadlineExceeded):
        peer.link.request(k.PROCS, [], Deadline(0.05))


@pytest.mark.parametrize(
    ("fields", "cls"),
    [
        ([(k.T_STAGE, "exec"), (k.T_CODE, 127), (k.T_ERRNO, errno.ENOENT)], CommandNotFound),
        ([(k.T_STAGE, "exec"), (k.T_CODE, 126), (k.T_ERRNO, errno.EACCES)], NotExecutable),
        ([(k.T_STAGE, "key"), (k.T_ERRNO, errno.ENOENT)], NotFound),
        ([(k.T_STAGE, "cwd"), (k.T_ERRNO, errno.ENOTDIR), (k.T_TAIL, b"one\ntwo\n")], StartFailed),
    ],
)
def test_an_error_becomes_its_exception(peer: Peer, fields: Fields, cls: type[IsolatError]) -> None:
    peer.in_background(k.ERROR, fields)
    with pytest.raises(IsolatError) as caught:
        peer.link.request(k.SPAWN, [], Deadline(5))
    assert type(caught.value) is cls
    assert caught.value.details in ((), ("one", "two"))


def test_an_exit_is_kept_for_who_asks_later(peer: Peer) -> None:
    times: Fields = [(k.T_TIME, 5), (k.T_TIME, 9)]
    peer.sock.sendall(pack(k.EXITED, 0, [(k.T_KEY, "guest/main"), (k.T_CODE, 137), (k.T_SIGNAL, 9), *times]))
    assert peer.link.wait_exit("guest/main", Deadline(5)) == Exit(137, 9, 5, 9)


def test_a_key_is_routed_to_the_innermost_place(peer: Peer) -> None:
    place = WiredPlace(lambda _: peer.link, FACTS).inside("guest", FACTS).inside("guest", FACTS)
    asked = peer.in_background(fields=[(k.T_PID, 7)])
    command = Command(("sh", "-c", "x"), (("A", "b"),), "/w", "1:2")
    assert place.spawn("main", command, Io(tty=True, stdin=True, main=True, rows=5), Deadline(5)).pid == 7
    frame = asked.get(timeout=5)
    assert (frame.text(k.T_TO), frame.text(k.T_KEY)) == ("guest/guest", "main")
    assert frame.all(k.T_ARGV) == [b"sh", b"-c", b"x"] and frame.all(k.T_ENV) == [b"A=b"]
    assert frame.int(k.T_FLAGS) == k.F_TTY | k.F_STDIN | k.F_MAIN


def test_every_step_is_tried_when_reverting_and_the_first_failure_is_told(peer: Peer) -> None:
    place = WiredPlace(lambda _: peer.link, FACTS)
    failed: list[IsolatError] = []

    def revert() -> None:
        try:
            place.revert([MakeDir("/a"), MakeDir("/b"), MakeDir("/c")], Deadline(5))
        except IsolatError as error:
            failed.append(error)

    thread = threading.Thread(target=revert)
    thread.start()
    order = []
    for n in range(3):
        asked = peer.reply(k.ERROR if n == 0 else k.OK, [(k.T_STAGE, "dir"), (k.T_MESSAGE, "no")])
        order.append(asked.nested(k.T_STEP)[0].bytes(k.T_PATH))
    thread.join(5)
    assert order == [b"/c", b"/b", b"/a"] and "dir: no" in failed[0].message


def test_descriptors_that_nobody_asked_for_are_closed(peer: Peer) -> None:
    read, write = os.pipe()
    socket.send_fds(peer.sock, [pack(k.LOST, 0, [], nfds=1)], [write])
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200))
def test_garbage_from_a_keeper_ends_in_an_error_of_the_tree(reactor: Reactor, garbage: bytes) -> None:
    peer = Peer(reactor)

    def spoil() -> None:
        peer.sock.sendall(garbage)
        peer.sock.close()

    threading.Timer(0.005, spoil).start()
    with pytest.raises(IsolatError):
        peer.link.request(k.PROCS, [], Deadline(2))
    peer.link.close()


def test_a_step_that_came_with_a_descriptor_is_undone_without(peer: Peer) -> None:
    asked = peer.in_background()
    WiredPlace(lambda _: peer.link, FACTS).revert([Idmap("/a", "/b", ((0, 5, 1),), descriptor=3)], Deadline(5))
    assert asked.get(timeout=5).nfds == 0


def served(peer: Peer, chunk: int, times: int) -> SimpleQueue[int]:
    """Answer so many READs with so many bytes each, whatever was asked. How many bytes each of them asked for."""
    counts: SimpleQueue[int] = SimpleQueue()

    def serve() -> None:
        for _ in range(times):
            counts.put(peer.reply(k.OK, [(k.T_DATA, b"x" * chunk)]).int(k.T_COUNT))

    threading.Thread(target=serve, daemon=True).start()
    return counts


def test_a_file_without_an_end_is_read_as_far_as_was_asked(peer: Peer) -> None:
    counts, fd = served(peer, 4096, 3), os.memfd_create("text", os.MFD_CLOEXEC)
    WiredPlace(lambda _: peer.link, FACTS).get("/sys/endless", fd, 3 * 4096, Deadline(5))
    assert os.fstat(fd).st_size == 3 * 4096
    assert [counts.get(timeout=5) for _ in range(3)] == [3 * 4096, 2 * 4096, 4096]
    os.close(fd)


def test_more_than_was_asked_for_is_not_taken(peer: Peer) -> None:
    served(peer, 4097, 1)
    fd = os.memfd_create("text", os.MFD_CLOEXEC)
    with pytest.raises(ProtocolError):
        WiredPlace(lambda _: peer.link, FACTS).get("/sys/large", fd, 4096, Deadline(5))
    assert os.fstat(fd).st_size == 0
    os.close(fd)
