"""The state table is exhaustive, operations exclude each other, admission says its numbers."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest

from isolat.deadline import Deadline
from isolat.engine import admission, states
from isolat.engine.environment import Environment
from isolat.engine.states import LEGAL, Verb
from isolat.errors import Busy, IllegalState, Refused
from isolat.layers.base import State
from isolat.spec.model import Spec
from tests.unit.engine.test_handle import sample


def test_every_verb_says_for_every_state_whether_it_is_legal() -> None:
    assert set(LEGAL) == set(Verb)
    for verb in Verb:
        for state in State:
            if state in LEGAL[verb]:
                states.check(verb, state, "x")
            else:
                with pytest.raises(IllegalState, match=f"cannot {verb} x: it is {state}"):
                    states.check(verb, state, "x")


def test_a_second_operation_is_told_what_the_first_one_is(tmp_path: Path) -> None:
    env = Environment(sample(), tmp_path)
    with env.operation("stopping"):
        with pytest.raises(Busy, match="busy: stopping"), env.operation("removing"):
            pass
        with pytest.raises(Busy), env.operation("removing", Deadline(0.05)):
            pass
    with env.operation("removing"):
        pass


def test_an_operation_that_may_wait_gets_its_turn(tmp_path: Path) -> None:
    env, entered, turns = Environment(sample(), tmp_path), threading.Event(), []

    def second() -> None:
        entered.set()
        with env.operation("settling", Deadline(10)):
            turns.append("second")

    thread = threading.Thread(target=second)
    with env.operation("starting"):
        thread.start()
        entered.wait(5)
        turns.append("first")
    thread.join(10)
    assert turns == ["first", "second"]


def test_no_two_environments_share_a_uid() -> None:
    ranges = [admission.uid_base(index) for index in range(admission.UID_RANGES)]
    assert ranges[0] == 0x40000000
    assert all(b - a == 65536 for a, b in itertools.pairwise(ranges))
    assert ranges[-1] + 65536 <= 0xFFFFFFFF
    assert admission.free_uid_index({0, 1, 3}) == 2
    with pytest.raises(Refused):
        admission.free_uid_index(set(range(admission.UID_RANGES)))


def test_admission_refuses_what_the_machine_does_not_have(tmp_path: Path) -> None:
    admission.check(Spec("debian"), 1 << 40, 2, tmp_path)
    with pytest.raises(Refused, match="memory limit"):
        admission.check(Spec("debian", memory_bytes=2 << 40), 1 << 40, 2, tmp_path)
    with pytest.raises(Refused, match="CPUs"):
        admission.check(Spec("debian", cpus=3.5), 1 << 40, 2, tmp_path)
