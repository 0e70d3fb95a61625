"""A machine whose application is killed keeps what that has written; one that hangs is killed all the same."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.microvms import qemu, spec
from tests.support.roots import Root, clean_root, private_root

pytestmark = pytest.mark.root

STUBBORN = "trap '' TERM; echo kept > /root/file; echo ready; while :; do sleep 0.2; done"


@pytest.fixture(scope="module")
def module_root() -> Iterator[Root]:
    with private_root() as root:
        root.start_daemon()
        yield root


@pytest.fixture
def root(module_root: Root) -> Iterator[Root]:
    with clean_root(module_root) as found:
        yield found


def _stubborn(root: Root, **keys: object) -> str:
    id = root.run_detached(spec("sh", "-c", STUBBORN, **keys))
    end = time.monotonic() + 20
    while "ready" not in root.ok("logs", id):
        assert time.monotonic() < end
        time.sleep(0.05)
    return id


def _hang(root: Root, id: str) -> None:
    """As a guest that can't be scheduled any more: its keeper and its processes are there, and nobody answers."""
    os.kill(qemu(root, id), signal.SIGSTOP)


def test_a_forced_stop_loses_nothing_that_was_written(root: Root) -> None:
    id = _stubborn(root)
    told = root.ask("stop", {"env": id, "grace_s": 0.5})
    assert (told["code"], told["forced"]) == (137, True)

    assert "kept" in root.ok("cp", f"{id}:/root/file", "-")


def test_one_whose_time_is_over_loses_nothing_either(root: Root) -> None:
    id = _stubborn(root, x_timeout="4s", stop_grace_period="1s")
    assert root.ok("wait", id).strip() == "137"
    assert "kept" in root.ok("cp", f"{id}:/root/file", "-")


def test_one_that_hangs_is_stopped_in_time(root: Root) -> None:
    id = _stubborn(root)
    _hang(root, id)
    began = time.monotonic()
    told = root.ask("stop", {"env": id, "grace_s": 1})
    assert time.monotonic() - began < 6
    assert (told["code"], told["forced"]) == (137, True)


def test_one_that_hangs_can_be_killed(root: Root) -> None:
    id = _stubborn(root)
    _hang(root, id)
    began = time.monotonic()
    root.ok("kill", id)
    assert root.ok("wait", id).strip() == "137"
    assert time.monotonic() - began < 6


def test_a_container_in_a_machine_that_hangs_is_stopped_in_time(root: Root) -> None:
    id = _stubborn(root, runtime="microvm/container")
    _hang(root, id)
    began = time.monotonic()
    assert root.ask("stop", {"env": id, "grace_s": 1})["forced"] is True
    assert time.monotonic() - began < 10
