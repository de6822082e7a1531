"""Bounds, and plans fitted to them: against a brute force over all totals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsm_tune import schedules
from dsm_tune.errors import BudgetError
from dsm_tune.plan import Geometry, Matching, MergePlan
from dsm_tune.searching.budget import (
    Cost,
    Limit,
    Limits,
    Shape,
    cheapest,
    fit,
    fit_gmacs,
    parse_limit,
    published_shapes,
)

TINY = Geometry((14, 14), 1, 12, 192, 3, 768, 16, 1000, "token")
SMALL = Geometry((4, 4), 1, 4, 32, 2, 64, 4, 10, "token")
NO_CLASS = Geometry((3, 5), 0, 3, 32, 2, 64, 4, 10, "avg")
DENSE = MergePlan("", TINY)


def by_gmacs(plan: MergePlan) -> Cost:
    return Cost(plan.gmacs)


# -- bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("5", Limit(5.0)),
        (5, Limit(5.0)),
        (0.25, Limit(0.25)),
        (" 2.7 ", Limit(2.7)),
        ("1e-3", Limit(1e-3)),
        ("60%", Limit(0.6, of_dense=True)),
        ("60 %", Limit(0.6, of_dense=True)),
        ("150%", Limit(1.5, of_dense=True)),
    ],
)
def test_a_bound_is_a_number_or_a_share_of_dense(text: str | float, limit: Limit) -> None:
    assert parse_limit(text, "--budget-ms") == limit


@pytest.mark.parametrize(
    "text",
    ["", "%", "0", "0%", "-1", "-5%", "nan", "nan%", "inf", "5ms", "5%%", "60%5", "five", "1,5"],
)
def test_any_other_bound_is_refused_in_one_line_that_says_what_is_accepted(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_limit(text, "--budget-gflops")
    message = str(caught.value)
    assert message.startswith("--budget-gflops must be a number > 0 or a percentage")
    assert repr(text) in message
    assert message.endswith("accepted are for example 5 and 60%")


@given(st.text(max_size=20))
def test_whatever_text_is_given_a_bound_is_positive_and_finite_or_refused(text: str) -> None:
    try:
        limit = parse_limit(text, "--budget-ms")
    except BudgetError as error:
        assert "\n" not in str(error)
    else:
        assert 0 < limit.value < math.inf


@given(st.floats(1e-3, 1e3))
def test_a_share_of_dense_scales_with_dense_and_a_number_does_not(dense: float) -> None:
    assert Limit(0.6, of_dense=True).resolve(dense) == 0.6 * dense
    assert Limit(0.6).resolve(dense) == 0.6


@pytest.mark.parametrize(
    ("limit", "shown"),
    [(Limit(5.0), "5"), (Limit(0.6, True), "60%"), (Limit(0.625, True), "62.5000%")],
)
def test_a_bound_is_shown_as_it_was_asked_for(limit: Limit, shown: str) -> None:
    assert str(limit) == shown


numbers = st.floats(0.01, 10)


@given(numbers, numbers, numbers, numbers)
def test_a_cost_is_admitted_exactly_when_it_exceeds_no_bound(
    gmacs: float, ms: float, most_gmacs: float, most_ms: float
) -> None:
    limits, cost = Limits(gmacs=most_gmacs, ms=most_ms), Cost(gmacs, ms)
    assert limits.admit(cost) == (gmacs <= most_gmacs and ms <= most_ms)
    assert limits.admit(cost) == (limits.excess(cost) <= 0)


def test_an_unknown_latency_meets_no_bound_on_it() -> None:
    assert not Limits(ms=5.0).admit(Cost(1.0))
    assert Limits(ms=5.0).excess(Cost(1.0)) == math.inf


# -- fit --------------------------------------------------------------------------------------


@st.composite
def shapes(draw: Any, geometry: Geometry) -> Shape:
    depth = geometry.depth
    shares = draw(
        st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.7, 8.0]), min_size=depth, max_size=depth)
    )
    kind = st.sampled_from(["merge", "prune", "fuse"])
    kinds = draw(st.lists(kind, min_size=depth, max_size=depth))
    windows = draw(st.lists(st.sampled_from([None, 1, 2, 3]), min_size=depth, max_size=depth))
    last = draw(st.sampled_from(["all", "prefix"])) if geometry.reads_prefix_only else "all"
    if last == "prefix":
        shares[-1] = 0.0
    matching = Matching(feature=draw(st.sampled_from(["k", "kv_all", "x"])))
    return Shape(tuple(shares), tuple(kinds), tuple(windows), matching, last_block=last)


@st.composite
def costs(draw: Any, geometry: Geometry) -> Callable[[MergePlan], Cost]:
    """GMACs, and a latency that is a staircase in each block's tokens, with dents up to 15 %."""
    counts = geometry.tokens + 1
    ups = draw(
        st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.5, 3.0]), min_size=counts, max_size=counts)
    )
    dents = draw(st.lists(st.floats(1.0, 1.15), min_size=counts, max_size=counts))
    rise = [1.0 + up for up in itertools.accumulate(ups)]
    stairs = [up * dent for up, dent in zip(rise, dents, strict=True)]

    def cost_of(plan: MergePlan) -> Cost:
        return Cost(plan.gmacs, sum(stairs[count] for count in plan.tokens))

    return cost_of


@st.composite
def tasks(draw: Any) -> tuple[Geometry, Shape, Callable[[MergePlan], Cost], Limits]:
    geometry = draw(st.sampled_from([SMALL, NO_CLASS]))
    shape, cost_of = draw(shapes(geometry)), draw(costs(geometry))
    dense = cost_of(MergePlan("", geometry))
    assert dense.ms is not None
    gmacs = draw(st.one_of(st.none(), st.floats(0.3, 1.1))) if draw(st.booleans()) else 0.7
    ms = draw(st.floats(0.3, 1.1)) if gmacs is None or draw(st.booleans()) else None
    limits = Limits(
        gmacs=None if gmacs is None else gmacs * dense.gmacs,
        ms=None if ms is None else ms * dense.ms,
    )
    return geometry, shape, cost_of, limits


def every_plan(shape: Shape, geometry: Geometry) -> list[MergePlan]:
    blocks = sum(share > 0 for share in shape.shares)
    return [shape.plan(geometry, total) for total in range(geometry.patches * blocks + 1)]


@given(tasks(), st.floats(0.3, 1.0))
def test_a_fitted_plan_is_the_best_of_all_totals_and_never_over_a_limit(
    task: tuple[Geometry, Shape, Callable[[MergePlan], Cost], Limits], share: float
) -> None:
    geometry, shape, cost_of, limits = task
    found = fit(shape, geometry, limits, cost_of, share=share)
    able = [p for p in every_plan(shape, geometry) if limits.admit(cost_of(p), share)]
    if found is None:
        assert not able
        return
    cost = cost_of(found)
    assert limits.gmacs is None or cost.gmacs <= share * limits.gmacs
    assert limits.ms is None or (cost.ms is not None and cost.ms <= share * limits.ms)
    best = max(able, key=lambda plan: limits.objective(cost_of(plan)))  # the first of equals
    assert found.removed == best.removed
    assert limits.objective(cost) == limits.objective(cost_of(best))


@given(tasks(), st.floats(0.3, 1.0), st.floats(0.3, 1.0))
def test_a_higher_share_of_the_limits_never_gives_a_cheaper_plan(
    task: tuple[Geometry, Shape, Callable[[MergePlan], Cost], Limits], one: float, other: float
) -> None:
    geometry, shape, cost_of, limits = task
    low, high = (
        fit(shape, geometry, limits, cost_of, share=share) for share in sorted([one, other])
    )
    if low is not None:
        assert high is not None
        assert limits.objective(cost_of(low)) <= limits.objective(cost_of(high))


@given(st.data(), st.floats(0.02, 1.1))
def test_a_fit_to_gmacs_alone_is_that_of_every_total_though_it_skips_most(
    data: Any, share: float
) -> None:
    geometry = data.draw(st.sampled_from([TINY, SMALL, NO_CLASS]))
    shape = data.draw(shapes(geometry))
    most = share * MergePlan("", geometry).gmacs
    slow = fit(shape, geometry, Limits(gmacs=most), lambda plan: Cost(plan.gmacs))
    quick = fit_gmacs(shape, geometry, most)
    assert (slow is None) == (quick is None)
    if slow is not None:
        assert quick is not None
        assert (quick.macs, quick.removed) == (slow.macs, slow.removed)


@given(tasks())
def test_the_cheapest_plan_is_the_cheapest_of_all_totals_that_remove_a_token(
    task: tuple[Geometry, Shape, Callable[[MergePlan], Cost], Limits],
) -> None:
    geometry, shape, cost_of, limits = task
    plans = list(every_plan(shape, geometry))
    removing = [plan for plan in plans if any(plan.removed)] or plans
    least = min(limits.objective(cost_of(plan)) for plan in removing)
    assert limits.objective(cost_of(cheapest(shape, geometry, limits, cost_of))) == least


@given(tasks())
def test_what_is_spent_may_be_another_cost_than_the_bounded_one(
    task: tuple[Geometry, Shape, Callable[[MergePlan], Cost], Limits],
) -> None:
    geometry, shape, cost_of, limits = task
    found = fit(shape, geometry, limits, cost_of, spend=lambda cost: cost.gmacs)
    able = [p for p in every_plan(shape, geometry) if limits.admit(cost_of(p))]
    assert (found is None) == (not able)
    assert found is None or found.gmacs == max(plan.gmacs for plan in able)


def test_a_shape_without_shares_is_the_dense_model() -> None:
    shape = Shape((0.0,) * 12, ("merge",) * 12, (None,) * 12)
    assert fit(shape, TINY, Limits(gmacs=2.0), by_gmacs) == MergePlan("", TINY)
    assert fit(shape, TINY, Limits(gmacs=0.5), by_gmacs) is None


# -- what was published -----------------------------------------------------------------------

geometries = st.sampled_from([TINY, SMALL, Geometry((16, 16), 5, 24, 64, 4, 256, 14, 0, "token")])


@given(geometries, st.integers(0, 6), st.integers(0, 20))
def test_published_shapes_are_the_published_schedules(
    geometry: Geometry, delay: int, r: int
) -> None:
    delay %= geometry.depth
    found = published_shapes(geometry, delay)
    blocks = geometry.depth - delay
    tome = schedules.tome(geometry, r)
    assert found["tome"].plan(geometry, r * geometry.depth).digest == tome.digest
    dsm = schedules.dsm(geometry, r, delay=delay)
    assert found["dsm"].plan(geometry, r * blocks).digest == dsm.digest
    falling = schedules.tome(geometry, r, inflection=-1.0)
    assert found["tome-decreasing"].plan(geometry, r * geometry.depth).digest == falling.digest
    for first in (delay - 1, delay + 1):
        if 0 <= first < geometry.depth:
            plan = found[f"dsm-delay-{first}"].plan(geometry, r * (geometry.depth - first))
            assert plan.digest == schedules.dsm(geometry, r, delay=first).digest
    assert len(found) == 3 + (delay > 0) + (delay + 1 < geometry.depth)


@pytest.mark.parametrize("label", ["tome", "dsm", "dsm-delay-1", "dsm-delay-3"])
@given(share=st.floats(0.5, 1.0))
def test_a_reference_is_fitted_by_a_mix_of_r_and_r_plus_1(label: str, share: float) -> None:
    shape = published_shapes(TINY, 2)[label]
    plan = fit(shape, TINY, Limits(gmacs=share * DENSE.gmacs), by_gmacs)
    assert plan is not None
    first = next(b for b in range(12) if shape.shares[b])
    asked = {step.block: step.r for step in plan.steps}
    counts = [asked.get(block, 0) for block in range(first, 12)]
    assert max(counts) - min(counts) <= 1
    assert plan.gmacs <= share * DENSE.gmacs
    fewer = shape.plan(TINY, sum(counts) - 1) if sum(counts) else plan
    assert not sum(counts) or fewer.gmacs > share * DENSE.gmacs


@pytest.mark.parametrize("r", [1, 4, 8, 13, 16])
def test_a_budget_that_one_r_meets_exactly_gives_that_r(r: int) -> None:
    for label, published in [
        ("tome", schedules.tome(TINY, r)),
        ("dsm", schedules.dsm(TINY, r, delay=2)),
    ]:
        plan = fit(published_shapes(TINY, 2)[label], TINY, Limits(gmacs=published.gmacs), by_gmacs)
        assert plan is not None
        assert plan.digest == published.digest
