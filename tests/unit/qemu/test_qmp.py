"""The monitor's protocol against a QEMU made of a thread, which says what a real one would not."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from isolat.deadline import Deadline
from isolat.errors import DeadlineExceeded, StartFailed
from isolat.qemu import qmp
from isolat.qemu.qmp import Qmp, QmpRefused

D_S = 5.0
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


class Fake:
    """The other end. Each request is given to ``answer``, which gives the bytes to send."""

    def __init__(self, answer: Callable[[dict[str, object]], bytes], before: bytes = GREETING) -> None:
        self.ours, self._sock = socket.socketpair()
        self._answer = answer
        self.raw = b""
        self.descriptors: list[int] = []
        self._sock.sendall(before)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        buffer = b""
        with contextlib.suppress(OSError):
            while True:
                data, fds, _, _ = socket.recv_fds(self._sock, 65536, 4)
                self.descriptors += fds
                self.raw += data
                buffer += data
                if not data:
                    return
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    reply = self._answer(json.loads(line.lstrip(b"\xff")))
                    if reply == b"":
                        return
                    self._sock.sendall(reply)

    def close(self) -> None:
        self.ours.close()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._sock.close()
        for fd in self.descriptors:
            os.close(fd)


def reply(request: dict[str, object], value: object = None) -> bytes:
    return json.dumps({"return": {} if value is None else value, "id": request["id"]}).encode() + b"\r\n"


def refusal(request: dict[str, object], words: str, kind: str = "GenericError") -> bytes:
    return json.dumps({"error": {"class": kind, "desc": words}, "id": request["id"]}).encode() + b"\r\n"


def event(name: str, **data: object) -> bytes:
    return json.dumps({"event": name, "data": data, "timestamp": {}}).encode() + b"\r\n"


@contextlib.contextmanager
def speaking(answer: Callable[[dict[str, object]], bytes], before: bytes = GREETING) -> Iterator[tuple[Qmp, Fake]]:
    """A conversation that was opened, and the fake behind it."""

    def whole(request: dict[str, object]) -> bytes:
        return reply(request) if request["execute"] == "qmp_capabilities" else answer(request)

    fake = Fake(whole, before)
    try:
        with Qmp.connect(fake.ours, Deadline(D_S)) as found:
            yield found, fake
    finally:
        fake.close()


def test_a_command_gets_its_value() -> None:
    with speaking(lambda request: reply(request, {"status": "paused"})) as (found, _):
        assert found.execute("query-status", {}, Deadline(D_S)) == {"status": "paused"}


def test_the_parser_is_reset_before_anything_else() -> None:
    with speaking(reply) as (_, fake):
        assert fake.raw.startswith(b"\xff")


LEFT = {
    "nothing": b"",
    "a greeting": GREETING,
    "half a reply": b'tus": "running"}, "id": "1-2"}\r\n',
    "an old reply": b'{"return": {"status": "running"}, "id": "1-2"}\r\n',
    "an old error": b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n',
    "an event": event("STOP"),
    "all of it": b'half"}\r\n' + GREETING + event("RESUME") + b'{"return": {}, "id": "old"}\r\n',
}


@pytest.mark.parametrize("name", LEFT)
def test_what_an_earlier_conversation_left_is_passed_over(name: str) -> None:
    with speaking(lambda request: reply(request, 7), LEFT[name]) as (found, _):
        assert found.execute("anything", {}, Deadline(D_S)) == 7
        assert not found.events


def test_capabilities_negotiated_by_an_earlier_daemon_are_fine() -> None:
    fake = Fake(lambda request: refusal(request, "already complete", "CommandNotFound"), b"")
    Qmp.connect(fake.ours, Deadline(D_S)).close()
    fake.close()


def test_another_refusal_of_the_negotiation_is_not() -> None:
    fake = Fake(lambda request: refusal(request, "no"))
    with pytest.raises(QmpRefused):
        Qmp.connect(fake.ours, Deadline(D_S))
    assert fake.ours.fileno() == -1
    fake.close()


def test_a_refusal_has_qemus_words_and_the_stage() -> None:
    with speaking(lambda request: refusal(request, "Device 'x' not found")) as (found, _):
        with pytest.raises(StartFailed, match="QEMU refused device_del: Device 'x' not found") as caught:
            found.execute("device_del", {"id": "x"}, Deadline(D_S))
        assert caught.value.stage == "qmp"


def test_replies_with_other_ids_are_not_ours() -> None:
    with speaking(lambda request: b'{"return": 1, "id": "x"}\n{"return": 2}\n' + reply(request, 3)) as (found, _):
        assert found.execute("anything", {}, Deadline(D_S)) == 3


def test_events_are_collected_and_waited_for() -> None:
    def answer(request: dict[str, object]) -> bytes:
        return event("STOP") + event("MIGRATION", status="active") + reply(request) + event("MIGRATION", status="done")

    with speaking(answer) as (found, _):
        found.execute("migrate", {}, Deadline(D_S))
        assert [row["event"] for row in found.events] == ["STOP", "MIGRATION"]
        assert found.wait_event("MIGRATION", lambda data: data["status"] == "done", Deadline(D_S)) == {"status": "done"}
        assert not found.events


def test_an_event_without_data_is_one() -> None:
    with speaking(lambda request: b'{"event": "STOP", "data": [1]}\n' + reply(request)) as (found, _):
        found.execute("stop", {}, Deadline(D_S))
        assert found.wait_event("STOP", lambda data: True, Deadline(D_S)) == {}


def test_descriptors_go_along_and_stay_ours() -> None:
    with speaking(reply) as (found, fake):
        read, write = os.pipe()
        try:
            found.execute("getfd", {"fdname": "x"}, Deadline(D_S), (write,))
            os.write(fake.descriptors[0], b"y")
            assert os.read(read, 1) == b"y"
            os.fstat(write)
        finally:
            os.close(read)
            os.close(write)


def test_descriptors_from_qemu_are_not_taken() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(theirs, [b"{}\n"], [theirs.fileno()] * 3)
        with pytest.raises(DeadlineExceeded):
            Qmp(ours).execute("anything", {}, Deadline(0.05))
        assert len(os.listdir("/proc/self/fd")) == before + 2  # noqa: PTH208


def test_a_deadline_ends_the_wait() -> None:
    with speaking(lambda _: b" ") as (found, _):
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="query-status"):
            found.execute("query-status", {}, Deadline(0.1))
        assert time.monotonic() - start < 1


def test_a_deadline_ends_endless_talk() -> None:
    with speaking(lambda _: event("TALK") * 200) as (found, _), pytest.raises((DeadlineExceeded, StartFailed)):
        found.execute("query-status", {}, Deadline(0.2))


def test_a_qemu_that_does_not_read_is_not_waited_for_longer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(DeadlineExceeded):
        Qmp(ours).execute("x", {"a": "b" * (4 << 20)}, Deadline(0.1))


HOSTILE = {
    "no JSON": b"hello\n",
    "no object": b"[1, 2]\n",
    "deep": b"[" * 100_000 + b"\n",
    "not UTF-8": b'{"return": "\xff\xfe"}\n',
    "a huge number": b"1" * 100_000 + b"\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nonsense_is_an_error_of_the_start(name: str) -> None:
    with speaking(lambda _: HOSTILE[name]) as (found, _), pytest.raises(StartFailed, match="no message"):
        found.execute("anything", {}, Deadline(D_S))


def test_a_line_without_an_end_is_not_kept() -> None:
    endless = b"x" * (qmp.LINE_BYTES_MAX + 200_000)
    with speaking(lambda _: endless) as (found, _), pytest.raises(StartFailed, match="without an end"):
        found.execute("anything", {}, Deadline(D_S))


def test_events_are_kept_in_bounds() -> None:
    with speaking(lambda request: event("TALK") * 1000 + reply(request)) as (found, _):
        found.execute("anything", {}, Deadline(D_S))
        assert len(found.events) == qmp.EVENTS_MAX


def test_talk_without_an_answer_ends() -> None:
    with speaking(lambda _: b"{}\n" * 5000) as (found, _), pytest.raises(StartFailed, match="without answering"):
        found.execute("anything", {}, Deadline(D_S))


def test_an_error_of_a_strange_form_is_one() -> None:
    def answer(request: dict[str, object]) -> bytes:
        return json.dumps({"error": [], "id": request["id"]}).encode() + b"\n"

    with speaking(answer) as (found, _), pytest.raises(QmpRefused, match="no reason given"):
        found.execute("anything", {}, Deadline(D_S))


def test_the_end_of_qemu_is_told() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(StartFailed, match="QEMU ended during qmp_capabilities"):
        Qmp.connect(ours, Deadline(D_S))
    assert ours.fileno() == -1


def test_the_end_during_a_command_is_told() -> None:
    with speaking(lambda _: b"") as (found, fake):
        fake._sock.settimeout(None)
        threading.Timer(0.05, lambda: fake._sock.shutdown(socket.SHUT_RDWR)).start()
        with pytest.raises(StartFailed, match="QEMU ended during migrate"):
            found.execute("migrate", {}, Deadline(D_S))
