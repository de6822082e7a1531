"""The published schedules as plans: ToMe's and DSM's, from a geometry alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from dsm_tune.errors import PlanError
from dsm_tune.plan import Geometry, MergePlan, Step

__all__ = ["default_delay", "dsm", "spread_evenly", "tome"]


def default_delay(geometry: Geometry) -> int:
    """Return ``round(depth / 6)``: 2 of 12, 4 of 24 and 5 of 32 blocks, as the paper finds."""
    return round(geometry.depth / 6)


def spread_evenly(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Round shares to integers with an exact sum, by rounding their running sum.

    Args:
        shares: one number >= 0 per block, not all zero unless ``total`` is 0.
        total: the sum of the result.
    """
    whole = math.fsum(shares)
    if not whole:
        return (0,) * len(shares)
    marks = [0, *(math.floor(total * part / whole + 0.5) for part in itertools.accumulate(shares))]
    marks[-1] = total
    return tuple(high - low for low, high in itertools.pairwise(marks))


def tome(
    geometry: Geometry, r: int | Sequence[int], *, inflection: float = 0.0, model: str = ""
) -> MergePlan:
    """Return ToMe's plan: every block merges globally.

    Args:
        geometry: of the model.
        r: tokens that leave per block, or one number for each block.
        inflection: from -1 to 1: r changes linearly from ``r (1 - inflection)`` in the first block
            to ``r (1 + inflection)`` in the last; -1 is ToMe's decreasing schedule. The total is
            ``r · depth`` exactly.
        model: label of the plan.

    Raises:
        PlanError: if ``r`` or ``inflection`` is out of range.
    """
    depth = geometry.depth
    if isinstance(r, bool) or not isinstance(r, (int, Sequence)):
        raise PlanError(f"r must be an integer >= 0 or a list of them, but got {r!r}")
    if not isinstance(inflection, (int, float)) or not -1.0 <= inflection <= 1.0:
        raise PlanError(f"inflection must be a number from -1 to 1, but got {inflection!r}")
    if isinstance(r, int):
        Step(0, "merge", r)  # a wrong r is refused before anything is computed with it
        slope = [
            1 + inflection * (2 * b / (depth - 1) - 1) if depth > 1 else 1 for b in range(depth)
        ]
        counts = spread_evenly(slope, r * depth)
    elif inflection or len(r) != depth:
        raise PlanError(
            f"a list r must hold one integer for each of the {depth} blocks and no inflection, "
            f"but got {len(r)} and inflection={inflection!r}"
        )
    else:
        counts = tuple(r)
    steps = tuple(Step(block, "merge", count) for block, count in enumerate(counts))
    return MergePlan(model, geometry, steps)


def dsm(
    geometry: Geometry,
    r: int,
    *,
    delay: int | None = None,
    window: int | None = None,
    local_blocks: int = 3,
    model: str = "",
) -> MergePlan:
    """Return the paper's plan: dense, then local, then global blocks.

    Args:
        geometry: of the model.
        r: tokens that leave in each block from the delay on; >= 0.
        delay: D, the first block that merges; ``None`` for ``round(depth / 6)``.
        window: side of the windows in the first local block, in tokens; grows by 1 per block;
            ``None`` for half the grid, rounded up.
        local_blocks: T, blocks that merge inside windows; the rest merges globally.
        model: label of the plan.

    Raises:
        PlanError: if an argument is out of range.
    """
    first = default_delay(geometry) if delay is None else delay
    side = math.ceil(min(geometry.grid) / 2) if window is None else window
    for name, value, low in [
        ("delay", first, 0),
        ("window", side, 1),
        ("local_blocks", local_blocks, 0),
    ]:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise PlanError(f"{name} must be an integer >= {low}, but got {value!r}")
    Step(0, "merge", r)  # a wrong r is refused even where no block merges
    steps = [
        Step(block, "merge", r, side + block - first if block < first + local_blocks else None)
        for block in range(min(first, geometry.depth), geometry.depth)
    ]
    return MergePlan(model, geometry, tuple(steps))
