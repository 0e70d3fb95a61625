"""Whatever comes to the daemon's socket, the answer is a result or an error of the tree, and nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolat.daemon.verbs import VERBS
from isolat.errors import BY_CODE, IsolatError
from isolat.spec.parse import BY_NAME
from isolat.wire import api
from isolat.wire import kinds as k
from tests.support import traces
from tests.support.roots import Root, private_root
from tests.support.wires import Cut, connect

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

SMALL, LARGE = 150, 3400  # three kinds of each: 450 in a test run, 10,200 in a soak run
HARMLESS = sorted(set(VERBS) - {"reset", "shutdown", "bootstrap", "probe"})

texts = st.text(max_size=20) | st.sampled_from(
    ["", "\0", "\udcff", "a" * 300, "../..", "-1", "1e999", "64m", "debian", "box"]
)
numbers = st.integers(-(1 << 70), 1 << 70) | st.floats() | st.sampled_from([0, 1, -1, 1 << 31, 1 << 63])
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
right: dict[str, st.SearchStrategy[Any]] = {
    "command": st.sampled_from([["true"], "true", ["sh", "-c", "exit 3"], ["no-such"], [""], []]),
    "environment": st.dictionaries(texts, texts, max_size=3) | st.lists(texts, max_size=3),
    "container_name": st.sampled_from(["one", "two", "box"]) | texts,
    "user": st.sampled_from(["0", "1000", "nobody", "1:2", "nosuch"]),
    "working_dir": st.sampled_from(["/", "/tmp", "/dev/null/such"]),
    "network_mode": st.sampled_from(["none", "host"]),
    "x-timeout": st.sampled_from([0.01, "1s", 5]),
    "labels": st.dictionaries(texts, texts, max_size=3),
    "stop_grace_period": st.sampled_from([0, "1s", 2]),
    "x-remove": st.booleans(),
    "tty": st.booleans(),
    "stdin_open": st.booleans(),
}
options = st.fixed_dictionaries(
    {},
    optional={
        "steps": st.integers(-2, 6) | values,
        "fail_step": st.integers(-2, 6) | values,
        "slow_start_s": st.sampled_from([0, 0.01, -1]),
        "no_guest": st.booleans(),
    },
)
layers = st.sampled_from(["fake", "fake/fake", "fake/fake/fake"])


@st.composite
def services(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly right services of the fake layer, with some keys wrong."""
    service: dict[str, Any] = {"image": "any", "runtime": draw(layers), "command": ["true"]}
    for name in draw(st.lists(st.sampled_from(sorted(right)), max_size=4)):
        service[name] = draw(right[name])
    for name in draw(st.lists(st.sampled_from(sorted(BY_NAME)), max_size=1)):
        service[name] = draw(values)
    if draw(st.booleans()):
        service["x-fake"] = draw(options)
    for name in draw(st.lists(texts, max_size=1)):
        service[name] = draw(values)
    return service


names = (
    "env spec attach command environment working_dir user tty stdin detach rows cols grace_s signal force since_ns "
    "follow all image include arch"
).split()
arguments = st.dictionaries(st.sampled_from(names), values | st.sampled_from(["box", ["true"], 1, True]), max_size=6)
requests = st.tuples(st.sampled_from(HARMLESS) | texts, arguments)
envelopes = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.integers(0, (1 << 32) - 1), st.binary(max_size=200)).map(lambda x: x[0].to_bytes(4, "little") + x[1]),
    values.map(lambda value: _packed({"v": 1, "verb": value, "args": value})),
    st.dictionaries(texts, values).map(lambda value: _packed(value)),  # noqa: PLW0108 — it is defined below
)
frames = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 5), st.binary(max_size=100)).map(
        lambda parts: len(parts[2]).to_bytes(4, "little") + bytes((parts[0], 0, parts[1] & 1, 0)) + bytes(4) + parts[2]
    )
    | st.binary(max_size=60),
    max_size=6,
)


def _packed(message: Any) -> bytes:
    try:
        return api.pack(message)
    except (IsolatError, TypeError, AttributeError, UnicodeError):
        return b"\2\0\0\0{}"


@pytest.fixture(scope="module")
def target() -> Iterator[Root]:
    """A daemon with one environment to be named; at the end it is the same one, without a defect, and empty."""
    with private_root() as root:
        pid = root.start_daemon()
        root.run_detached({"image": "any", "runtime": "fake", "command": ["sleep", "86000"], "container_name": "box"})
        yield root
        assert root.daemon_pid() == pid
        root.remove_all()
        assert traces.none_of_environments(root.path) == []
        assert "defect in" not in root.log()


def _answered(root: Root, verb: str, args: dict[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
    """The answer, which must be a result or an error of the tree. Its streams are closed at once."""
    try:
        conversation = root.open(verb, args, fds, 60)
    except IsolatError:
        return {}  # our own side could not say it
    with contextlib.suppress(TimeoutError):
        if args.get("follow") is True and verb == "events":
            conversation.close()
            return {}
        try:
            answer, got = conversation.end()
        except IsolatError as error:
            assert error.code in BY_CODE, error.code
            assert error.code not in ("internal", "error"), f"{verb} {args}: {error.message}"
            return {}
        finally:
            conversation.close()
        for fd in got:
            os.close(fd)
        return answer
    raise AssertionError(f"no answer to {verb} {args}")


def _spec(root: Root, service: dict[str, Any]) -> None:
    _answered(root, "plan", {"spec": service})
    made = _answered(root, "run", {"spec": service, "attach": False})
    if made.get("id"):
        _answered(root, "rm", {"env": made["id"], "force": True})


def _request(root: Root, request: tuple[str, dict[str, Any]]) -> None:
    verb, args = request
    if verb in ("rm", "kill", "stop", "wait") and args.get("env") == "box":
        args = {**args, "env": "nobody"}
    read, write = os.pipe()
    try:
        made = _answered(root, verb, args, (read,) if len(args) % 2 else ())
    finally:
        os.close(read)
        os.close(write)
    if verb == "run" and made.get("id"):
        _answered(root, "rm", {"env": made["id"], "force": True})


def _raw(root: Root, data: bytes) -> None:
    sock = connect(root.socket, 20)
    with sock, contextlib.suppress(ConnectionError, BrokenPipeError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        try:
            message, fds = api.Receiver(sock).receive()
        except EOFError:
            return
        for fd in fds:
            os.close(fd)
        if "error" in message:
            assert message["error"]["code"] in BY_CODE
            assert message["error"]["code"] not in ("internal", "error"), message


def _frames(root: Root, data: list[bytes]) -> None:
    """Garbage to the keeper from a client: its connection may end, the environment goes on."""
    stream = root.exec("box", ["sleep", "0.01"], stdin=True)
    with contextlib.suppress(Cut):
        for one in data:
            stream.send_raw(one)
        stream.until(lambda: stream.exit is not None or stream.cut, 20)
    stream.close()


CASES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Root, Any], None]]] = {
    "specs": (services(), _spec),
    "requests": (requests, _request),
    "envelopes": (envelopes, _raw),
    "frames": (frames, _frames),
}


def _fuzz(root: Root, kind: str, examples: int) -> None:
    strategy, check = CASES[kind]

    @settings(
        max_examples=examples, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(value: Any) -> None:
        check(root, value)
        root.close_all()

    run()
    assert root.exec("box", ["true"]).ended() == 0
    root.close_all()
    assert [env["name"] for env in root.environments()] == ["box"]


@pytest.mark.parametrize("kind", sorted(CASES))
def test_every_answer_is_a_result_or_an_error_of_the_tree(target: Root, kind: str) -> None:
    _fuzz(target, kind, SMALL)


@pytest.mark.soak
@pytest.mark.parametrize("kind", sorted(CASES))
def test_ten_thousand_of_them_too(target: Root, kind: str) -> None:
    _fuzz(target, kind, LARGE)


def test_the_wire_constants_are_those_of_the_documents() -> None:
    assert (k.VERSION, api.VERSION) == (1, 1)
