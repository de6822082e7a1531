"""What a plan may cost, and the plan of a given shape that costs just that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import lru_cache

from dsm_tune.errors import BudgetError
from dsm_tune.plan import Geometry, Matching, MergePlan, Step, step_macs
from dsm_tune.schedules import spread_evenly

__all__ = [
    "Cost",
    "Limit",
    "Limits",
    "Shape",
    "cheapest",
    "fit",
    "fit_gmacs",
    "parse_limit",
    "published_shapes",
]

LATENCY_STATS = ("p50", "p90", "p99")
CAPPED_TOKENS = 3  # that a block may get back where one before it has no more to give
REBOUND = 0.7  # as more tokens leave, no staircase climbs back from below this share of a cost


@dataclasses.dataclass(frozen=True)
class Limit:
    """One bound as it was asked for: an absolute number or a share of the dense model's cost."""

    value: float
    of_dense: bool = False

    def resolve(self, dense: float) -> float:
        """Return the bound in the unit of ``dense``."""
        return self.value * dense if self.of_dense else self.value

    def __str__(self) -> str:
        return f"{self.value:.4%}".replace(".0000", "") if self.of_dense else f"{self.value:g}"


def parse_limit(text: str | float, option: str) -> Limit:
    """Read a bound.

    Args:
        text: a number > 0, or a percentage of the dense model such as ``60%``.
        option: its name, for the error.

    Raises:
        BudgetError: if it is neither.
    """
    raw = str(text).strip()
    try:
        number = float(raw.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise BudgetError(
            f"{option} must be a number > 0 or a percentage of dense, but got {raw!r:.60}; "
            "accepted are for example 5 and 60%"
        )
    return Limit(number / 100, True) if raw.endswith("%") else Limit(number)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a plan is predicted to cost.

    Attributes:
        gmacs: giga multiply-adds per image.
        ms: latency by the device profile; ``None`` where the study has none.
    """

    gmacs: float
    ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds of a study in absolute units; at least one is set.

    Attributes:
        gmacs: giga multiply-adds per image.
        ms: milliseconds per forward.
        drop: points of top-1 (labels) or of agreement (no labels) that may be lost.
        ms_share: what ``ms`` was given as, if it was a share of the dense model's latency; then
            it is judged on ratios that were measured in one run.
    """

    gmacs: float | None = None
    ms: float | None = None
    drop: float | None = None
    ms_share: float | None = None

    def admit(self, cost: Cost, share: float = 1.0) -> bool:
        """Whether a cost is within ``share`` of every bound."""
        within = self.gmacs is None or cost.gmacs <= self.gmacs * share
        if self.ms is not None:
            within = within and cost.ms is not None and cost.ms <= self.ms * share
        return within

    def excess(self, cost: Cost) -> float:
        """Largest relative overrun of a bound; <= 0 where all are met."""
        over = [] if self.gmacs is None else [cost.gmacs / self.gmacs - 1]
        if self.ms is not None:
            over.append(math.inf if cost.ms is None else cost.ms / self.ms - 1)
        return max(over)

    def objective(self, cost: Cost) -> float:
        """The cost that the search minimises: latency where it is bounded, GMACs otherwise."""
        return cost.gmacs if self.ms is None or cost.ms is None else cost.ms


@dataclasses.dataclass(frozen=True)
class Shape:
    """All of a plan but the total number of tokens that leave.

    Attributes:
        shares: relative r of each block; 0 where none leaves.
        kinds: ``merge``, ``prune`` or ``fuse`` for each block.
        windows: side of the windows in each block, or ``None``.
        matching: as in the plan.
        proportional_attention: as in the plan.
        last_block: as in the plan.
    """

    shares: tuple[float, ...]
    kinds: tuple[str, ...]
    windows: tuple[int | None, ...]
    matching: Matching = dataclasses.field(default_factory=Matching)
    proportional_attention: bool = True
    last_block: str = "all"

    def plan(self, geometry: Geometry, total: int, model: str = "") -> MergePlan:
        """Return the plan of this shape that removes ``total`` tokens, or as many as it can."""
        counts = spread_evenly(self.shares, total)
        steps = tuple(
            _step(block, self.kinds[block], r, self.windows[block])
            for block, r in enumerate(counts)
            if r
        )
        return MergePlan(
            model, geometry, steps, self.matching, self.proportional_attention, self.last_block
        )


_step = lru_cache(maxsize=1 << 16)(Step)  # a fit makes the same few steps a hundred times


def fit(
    shape: Shape,
    geometry: Geometry,
    limits: Limits,
    cost_of: Callable[[MergePlan], Cost],
    *,
    share: float = 1.0,
    model: str = "",
    spend: Callable[[Cost], float] | None = None,
) -> MergePlan | None:
    """Return the plan of a shape that comes closest to the limits without exceeding them.

    Every total is tried, so the cost may be any function of the plan (latency is a staircase).
    Of plans with equal cost the one that removes least is taken. A higher ``share`` never gives a
    cheaper plan.

    Args:
        shape: what the plan looks like.
        geometry: of the model.
        limits: the bounds.
        cost_of: predicts the cost of a plan.
        share: of the limits that may be used, in (0, 1].
        model: label of the plan.
        spend: the cost that is to come close to its limit; the limits' own objective if ``None``.

    Returns:
        The plan, or ``None`` where no plan of this shape is within the limits.
    """
    spend = spend or limits.objective
    best, best_cost = None, -math.inf
    for plan in _plans(shape, geometry, model):
        cost = cost_of(plan)
        objective = spend(cost)
        if limits.admit(cost, share) and objective > best_cost:
            best, best_cost = plan, objective
        if objective < REBOUND * best_cost:
            break
    return best


def fit_gmacs(
    shape: Shape, geometry: Geometry, most: float, *, model: str = ""
) -> MergePlan | None:
    """Return what :func:`fit` returns for a bound on GMACs alone, in a fraction of its time.

    With each token that is removed in all, no block gets more than one token fewer, and of two
    costs that are at most quadratic in tokens the larger is at most twice its share of a token
    above the other. Totals that cannot be within the bound for that reason are skipped.

    Args:
        shape: what the plan looks like.
        geometry: of the model.
        most: GMACs that the plan may cost.
        model: label of the plan.
    """
    dense = shape.plan(geometry, 0, model)
    token = 2 * dense.macs / geometry.tokens
    matching = sum(
        step_macs(geometry, shape.matching, kind, geometry.tokens)
        for kind, share in zip(shape.kinds, shape.shares, strict=True)
        if share
    )
    best, total, blocks = None, 0, sum(share > 0 for share in shape.shares)
    while total <= geometry.patches * blocks:
        plan = shape.plan(geometry, total, model)
        excess = plan.macs - most * 1e9
        if plan.gmacs <= most:
            if best is None or plan.macs > best.macs:
                best = plan
            if plan.macs + matching + CAPPED_TOKENS * token < best.macs:
                break
        if total and _is_spent(plan, blocks):
            break
        total += max(1, math.floor((excess - matching) / token))
    return best


def _plans(shape: Shape, geometry: Geometry, model: str) -> Iterator[MergePlan]:
    """The distinct plans of a shape, by the total that they are asked to remove."""
    # A block that is asked for more than it has gives what it has, so that totals above the number
    # of tokens still change a plan, until every block is asked for more than it has.
    blocks, removed = sum(share > 0 for share in shape.shares), None
    for total in range(geometry.patches * blocks + 1):
        plan = shape.plan(geometry, total, model)
        if plan.removed != removed:
            removed = plan.removed
            yield plan
        elif _is_spent(plan, blocks):
            return  # rounding takes one from a block at most, so higher totals change nothing


def _is_spent(plan: MergePlan, blocks: int) -> bool:
    """Whether each of the blocks that may give tokens is asked for more than it has."""
    asked = all(step.r > plan.removed[step.block] for step in plan.steps)
    return len(plan.steps) == blocks and asked


def cheapest(
    shape: Shape,
    geometry: Geometry,
    limits: Limits,
    cost_of: Callable[[MergePlan], Cost],
    *,
    model: str = "",
) -> MergePlan:
    """Return the plan of a shape with the least predicted cost, whatever the limits are.

    It removes tokens if any plan of the shape does, even where removing them does not pay.
    """
    plans = list(_plans(shape, geometry, model))
    return min(plans[1:] or plans, key=lambda plan: limits.objective(cost_of(plan)))


def published_shapes(geometry: Geometry, delay: int) -> dict[str, Shape]:
    """The shapes of what is known before a search, by label: ToMe's and DSM's.

    Args:
        geometry: of the model.
        delay: D as detected.
    """
    depth = geometry.depth
    merge = ("merge",) * depth

    def dsm(first: int) -> Shape:
        side = math.ceil(min(geometry.grid) / 2)
        windows = tuple(side + b - first if first <= b < first + 3 else None for b in range(depth))
        return Shape(tuple(float(b >= first) for b in range(depth)), merge, windows)

    decreasing = tuple(float(depth - 1 - b) for b in range(depth)) if depth > 1 else (1.0,)
    shapes = {
        "tome": Shape((1.0,) * depth, merge, (None,) * depth),
        "dsm": dsm(delay),
        "tome-decreasing": Shape(decreasing, merge, (None,) * depth),
    }
    for first in (delay - 1, delay + 1):
        if 0 <= first < depth:
            shapes[f"dsm-delay-{first}"] = dsm(first)
    return shapes
