"""A clock that jumps makes no time."""

from __future__ import annotations

import random

import hypothesis.strategies as st
from hypothesis import given

from dsm_tune.stopwatch import Stopwatch


class Clock:
    """Goes on by what it is told to."""

    def __init__(self, start: float = 0.0) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now


@given(st.integers(-1000, 1000), st.lists(st.integers(0, 60)))
def test_a_clock_that_runs_is_believed(start: int, steps: list[int]) -> None:
    clock = Clock(start)
    watch, total = Stopwatch(clock, longest=60.0), 0
    for step in steps:
        clock.now += step
        total += step
        assert watch.seconds() == total
    assert watch.jumps == 0


@given(st.integers(0, 1 << 32))
def test_jumps_add_no_more_than_the_longest_step_and_take_nothing(seed: int) -> None:
    dice, clock = random.Random(seed), Clock()
    watch, true, jumps, last = Stopwatch(clock, longest=60.0), 0, 0, 0.0
    for _ in range(40):
        step = dice.randrange(61)
        clock.now += step
        jump = dice.choice([0, 0, 0, -86_400, 86_400])
        clock.now += jump
        true, jumps = true + step, jumps + bool(jump)
        seconds = watch.seconds()
        assert last <= seconds <= last + 60
        last = seconds
    assert watch.jumps == jumps
    assert true - 60 * jumps <= last <= true + 60 * jumps
