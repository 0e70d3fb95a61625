"""The pool of machines that are made before anybody asks: refilled, each given once, nothing left of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from isolat.errors import IsolatError
from tests.integration.test_microvm import IDENTITY, LAYER, differ, told_right
from tests.support import traces
from tests.support.microvms import machines, qemu, spec, status, until_warm, warm
from tests.support.roots import Root, private_root

pytestmark = pytest.mark.root

MOST = 2


@pytest.fixture(scope="module")
def pool() -> Iterator[Root]:
    """A root whose daemon keeps two machines of each kind; one kind was asked for."""
    with private_root() as root:
        root.start_daemon(ISOLAT_WARM=str(MOST))
        root.ok("run", "--rm", *LAYER, "debian", "true")
        yield root


def _run(root: Root, script: str) -> tuple[str, str]:
    """Id and output of a run that is removed."""
    conversation, stream, id = root.run(spec("sh", "-c", script, x_remove=True))
    assert stream.ended() == 0
    stream.close()
    conversation.end()
    return id, stream.out.decode()


def test_it_is_refilled_and_no_machine_is_given_twice(pool: Root) -> None:
    ids, places = set(), set()
    for _ in range(4):
        until_warm(pool, MOST)
        ready = set(machines(pool))
        assert len(ready) == MOST
        id = pool.run_detached(spec("sleep", "600"))
        taken = qemu(pool, id)
        assert taken in ready, "the run did not take a machine that was ready"
        ids.add(id)
        places.add(taken)
        assert pool.exec(id, ["sh", "-c", "test ! -e /was-here && touch /was-here"]).ended() == 0
        pool.ask("rm", {"env": id, "force": True})
    assert len(ids) == len(places) == 4
    until_warm(pool, MOST)
    assert json.loads(pool.ok("template", "ls", "--json"))["warm"] == MOST
    assert pool.environments() == [], "what nobody has asked for is nobody's environment"


def test_what_is_said_of_one_names_whose_it_is_now(pool: Root) -> None:
    until_warm(pool, MOST)
    id = pool.run_detached(spec("sleep", "600", container_name="taken"))
    keeper = int(pool.ask("inspect", {"env": id})["keeper_pid"])
    os.kill(keeper, signal.SIGSTOP)
    try:
        with pytest.raises(IsolatError) as told:
            pool.ask("kill", {"env": id, "signal": "USR1"})
    finally:
        os.kill(keeper, signal.SIGCONT)
    assert "taken" in told.value.message
    assert "warm-" not in told.value.message
    pool.ask("rm", {"env": id, "force": True})


def test_machines_of_the_pool_differ_and_have_the_right_time(pool: Root) -> None:
    until_warm(pool, MOST)
    time.sleep(2)
    found = [_run(pool, IDENTITY) for _ in range(2)]
    for _, said in found:
        told_right(said)
    differ(found[0][1], found[1][1])
    for id, said in found:
        assert said.splitlines()[3] == id[:12]


def test_a_machine_of_the_pool_uses_no_time_and_is_of_ordinary_priority_when_taken(pool: Root) -> None:
    until_warm(pool, MOST)
    ready = machines(pool)
    assert {os.sched_getscheduler(pid) for pid in ready} == {os.SCHED_IDLE}
    id = pool.run_detached(spec("sleep", "600"))
    taken = qemu(pool, id)
    assert taken in ready
    assert os.sched_getscheduler(taken) == os.SCHED_OTHER
    assert status(taken)["Uid"].split()[0] == str(pool.ask("inspect", {"env": id})["uid_base"])
    pool.ask("rm", {"env": id, "force": True})


def test_one_that_died_in_the_pool_is_not_given_away(pool: Root) -> None:
    until_warm(pool, MOST)
    for pid in machines(pool):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)  # their keepers know
    assert _run(pool, "echo well")[1] == "well\n"


def _alive(root: Root) -> list[int]:
    """All that are ready, once none of them is dead."""
    until_warm(root, MOST)
    while len(machines(root)) < MOST:
        _run(root, "true")
        until_warm(root, MOST)
    return machines(root)


def test_one_that_dies_while_it_is_taken_costs_a_start_and_nothing_else(pool: Root) -> None:
    """It stands still, so that it is found alive and then does not answer; then it is killed."""
    pids = _alive(pool)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as user:
        told = user.submit(_run, pool, "echo well; cat /proc/sys/kernel/hostname")
        end = time.monotonic() + 20
        while warm(pool) == MOST:  # none was taken yet
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.3)
        assert not told.done(), "it answered, although it stood still"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        id, said = told.result(60)
    assert said.split() == ["well", id[:12]]
    assert "died while it was taken" in pool.log()


def test_another_kind_takes_no_machine_of_this_one(pool: Root) -> None:
    until_warm(pool, MOST)
    ready = machines(pool)
    id = pool.run_detached(spec("sleep", "600", pids_limit=77))
    assert qemu(pool, id) not in ready
    pool.ask("rm", {"env": id, "force": True})


def test_nothing_is_left_of_a_pool_whose_daemon_was_killed(pool: Root) -> None:
    until_warm(pool, MOST)
    pool.remove_all()
    pool.kill_daemon()
    assert machines(pool) != []
    pool.start_daemon()
    assert warm(pool) == 0
    assert traces.none_of_environments(pool.path) == []
    assert machines(pool) == []
    assert len([row for row in pool.ask("templates")["templates"] if not row["image"]]) == 1
