"""The published schedules as plans."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsm_tune import schedules
from dsm_tune.errors import PlanError
from dsm_tune.plan import Geometry, Matching, Step

TINY = Geometry((14, 14), 1, 12, 192, 3, 768, 16, 1000, "token")
depths = st.integers(1, 40)


def of_depth(depth: int, grid: tuple[int, int] = (14, 14)) -> Geometry:
    return Geometry(grid, 1, depth, 192, 3, 768, 16, 1000, "token")


@pytest.mark.parametrize(("depth", "delay"), [(12, 2), (24, 4), (32, 5)])
def test_the_default_delay_is_that_of_the_paper(depth: int, delay: int) -> None:
    assert schedules.default_delay(of_depth(depth)) == delay


@given(depths, st.integers(0, 300), st.floats(-1, 1))
def test_an_inflected_schedule_has_the_exact_total_and_is_monotone(
    depth: int, r: int, inflection: float
) -> None:
    plan = schedules.tome(of_depth(depth), r, inflection=inflection)
    counts = [step.r for step in plan.steps]
    assert len(counts) == depth
    assert sum(counts) == r * depth
    slopes = [b - a for a, b in itertools.pairwise(counts)]
    assert all(slope * math.copysign(1, inflection) >= -1 for slope in slopes)  # -1: rounding


def test_the_decreasing_schedule_goes_from_2r_to_0() -> None:
    counts = [step.r for step in schedules.tome(TINY, 11, inflection=-1.0).steps]
    assert counts[0] == 22
    assert counts[-1] == 0
    assert sum(counts) == 132
    rising = [step.r for step in schedules.tome(TINY, 11, inflection=1.0).steps]
    assert rising[0] == 0
    assert rising[-1] == 22


@given(st.integers(0, 98))
def test_tome_merges_globally_in_every_block(r: int) -> None:
    plan = schedules.tome(TINY, r)
    assert plan.steps == tuple(Step(block, "merge", r, None) for block in range(12))
    assert plan.matching == Matching()


def test_a_list_gives_each_block_its_own_r() -> None:
    counts = [5, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [step.r for step in schedules.tome(TINY, counts).steps] == counts
    assert schedules.tome(TINY, tuple(counts)) == schedules.tome(TINY, counts)


@pytest.mark.parametrize(
    ("r", "inflection"),
    [
        ((13, -1.0), 0.0),  # ToMe's own pair
        ([13, -1], 0.0),
        ({"r": 13, "inflection": -1.0}, 0.0),
        ([13] * 11, 0.0),
        ([13] * 13, 0.0),
        ([13] * 12, -1.0),
        ([13.0] * 12, 0.0),
        ([-1] * 12, 0.0),
        ([True] * 12, 0.0),
        ("a" * 12, 0.0),
        ([], 0.0),
        (None, 0.0),
        (1.5, 0.0),
        (True, 0.0),
        (-1, 0.0),
        (-1, -1.0),
        (10**400, 0.0),
        (10**5000, -1.0),
        ([10**5000] * 12, 0.0),
        (13, 1.01),
        (13, float("nan")),
        (13, float("inf")),
        (13, "decreasing"),
        (13, None),
        (13, [1.0]),
    ],
    ids=range(25),  # pytest cannot print integers of 5000 digits
)
def test_a_pair_a_wrong_list_or_a_number_out_of_range_is_refused_in_one_line(
    r: Any, inflection: Any
) -> None:
    with pytest.raises(PlanError, match=r"^[^\n]{1,300}$"):
        schedules.tome(TINY, r, inflection=inflection)


def test_dsm_is_dense_then_local_then_global() -> None:
    plan = schedules.dsm(TINY, 16)
    assert [step.block for step in plan.steps] == list(range(2, 12))
    assert [step.window for step in plan.steps] == [7, 8, 9, *[None] * 7]
    assert {step.r for step in plan.steps} == {16}
    assert {step.kind for step in plan.steps} == {"merge"}
    assert plan.matching == Matching(feature="k", quota="equal", position="destination")
    assert plan.proportional_attention
    assert plan.last_block == "all"


@given(depths, st.integers(0, 50), st.integers(0, 50), st.integers(1, 30), st.integers(0, 50))
def test_dsm_follows_its_arguments(depth: int, r: int, delay: int, window: int, local: int) -> None:
    plan = schedules.dsm(of_depth(depth), r, delay=delay, window=window, local_blocks=local)
    assert [step.block for step in plan.steps] == list(range(delay, depth))
    for step in plan.steps:
        age = step.block - delay
        assert step.window == (window + age if age < local else None)


@pytest.mark.parametrize(
    ("grid", "window"), [((14, 14), 7), ((13, 17), 7), ((24, 24), 12), ((1, 9), 1)]
)
def test_the_first_window_is_half_the_grid_rounded_up(grid: tuple[int, int], window: int) -> None:
    assert schedules.dsm(of_depth(12, grid), 4).steps[0].window == window


def test_a_delay_of_the_depth_or_more_is_the_dense_plan() -> None:
    for delay in (12, 13, 10**9, 10**400):
        plan = schedules.dsm(TINY, 16, delay=delay)
        assert plan.digest == plan.dense().digest
        assert plan.steps == ()


@pytest.mark.parametrize(
    "arguments",
    [
        {"delay": -1},
        {"delay": 1.5},
        {"delay": True},
        {"delay": "2"},
        {"window": 0},
        {"window": -3},
        {"window": 2.0},
        {"window": 10**9},
        {"window": 10**5000},
        {"local_blocks": -1},
        {"local_blocks": None},
        {"local_blocks": float("nan")},
        {"r": -1},
        {"r": -1, "delay": 12},
        {"r": 1.5},
        {"r": None},
        {"r": [16] * 12},
        {"r": True},
        {"r": 10**5000},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_an_argument_out_of_range_is_refused_in_one_line(arguments: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"^[^\n]{1,300}$"):
        schedules.dsm(TINY, **{"r": 16, **arguments})


@given(
    st.lists(st.integers(0, 100) | st.floats(0, 100), min_size=1, max_size=40),
    st.integers(0, 10**5),
)
def test_spreading_evenly_is_exact_and_close_to_the_shares(shares: list[float], total: int) -> None:
    counts = schedules.spread_evenly(shares, total)
    whole = math.fsum(shares)
    if whole:
        assert sum(counts) == total
        for count, share in zip(counts, shares, strict=True):
            assert -1e-6 <= count <= total * share / whole + 1 + 1e-6
    else:
        assert set(counts) == {0}
