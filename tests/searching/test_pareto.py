"""Non-domination and hypervolume against brute force."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsm_tune.searching.pareto import hypervolume, non_dominated, ranks

Point = tuple[float, float]
few = st.integers(0, 6).map(float)  # small, so that ties and duplicates are common
points = st.lists(st.tuples(few, few), max_size=12)
reals = st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), max_size=12)


def dominates(a: Point, b: Point) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@given(st.one_of(points, reals))
def test_the_front_is_what_no_point_dominates_each_once_by_its_first_index(
    some: list[Point],
) -> None:
    front = non_dominated(some)
    kept = {p for p in some if not any(dominates(q, p) for q in some)}
    assert {some[i] for i in front} == kept
    assert len(front) == len(kept)
    assert all(i == some.index(some[i]) for i in front)


@given(st.one_of(points, reals))
def test_the_front_ascends_in_the_first_and_descends_in_the_second_objective(
    some: list[Point],
) -> None:
    front = [some[i] for i in non_dominated(some)]
    assert front == sorted(front)
    assert [y for _, y in front] == sorted((y for _, y in front), reverse=True)


@given(points)
def test_a_rank_is_that_of_the_front_left_after_the_earlier_ones(some: list[Point]) -> None:
    found, left = ranks(some), list(range(len(some)))
    for rank in range(len(some)):
        front = [left[i] for i in non_dominated([some[j] for j in left])]
        assert sorted(front) == [i for i in left if found[i] == rank]
        left = [i for i in left if i not in front]


@given(points)
def test_a_dominated_point_has_a_higher_rank(some: list[Point]) -> None:
    found = ranks(some)
    for i, p in enumerate(some):
        for j, q in enumerate(some):
            assert not dominates(p, q) or found[i] < found[j]


@given(points, st.tuples(few, few))
def test_the_hypervolume_counts_the_cells_of_the_grid_that_a_point_dominates(
    some: list[Point], reference: Point
) -> None:
    cells = sum(
        any(x <= column and y <= row for x, y in some)
        for column in range(int(reference[0]))
        for row in range(int(reference[1]))
    )
    assert hypervolume(some, reference) == cells


@given(reals, st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)))
def test_one_more_point_never_takes_hypervolume_away(some: list[Point], new: Point) -> None:
    reference = 1e6, 1e6
    before = hypervolume(some, reference)
    assert hypervolume([*some, new], reference) >= before * (1 - 1e-12)


@given(points)
def test_only_the_front_has_hypervolume(some: list[Point]) -> None:
    front = [some[i] for i in non_dominated(some)]
    assert hypervolume(front, (7, 7)) == hypervolume(some, (7, 7))


@pytest.mark.parametrize(
    ("some", "volume"), [([], 0.0), ([(1.0, 1.0)], 6.0), ([(3.0, 0.0)], 0.0), ([(9.0, -5.0)], 0.0)]
)
def test_what_is_outside_the_reference_has_no_hypervolume(some: list[Point], volume: float) -> None:
    assert hypervolume(some, (3.0, 4.0)) == volume
