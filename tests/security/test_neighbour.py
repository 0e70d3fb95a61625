"""A CPU-bound neighbour with equal shares makes a container's answers at most twice as slow."""

from __future__ import annotations

import statistics

import pytest
from bench.neighbour import PROMISED, Machine, measure

from tests.support.images import IMAGE
from tests.support.roots import Root

pytestmark = pytest.mark.root

REQUESTS, ROUNDS = 200, 4


def test_answers_beside_a_busy_neighbour_stay_within_twice(root: Root) -> None:
    samples = measure(Machine(str(root.path), IMAGE), REQUESTS, ROUNDS)
    alone, beside = statistics.median(samples["alone"]), statistics.median(samples["beside"])
    assert beside <= PROMISED * alone
