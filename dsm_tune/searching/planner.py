"""From parameters to plans that meet the budget, and the plans that are known before a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.searching.budget import (
    Cost,
    Limits,
    Shape,
    cheapest,
    fit,
    fit_gmacs,
    published_shapes,
)
from dsm_tune.searching.space import Space, build

__all__ = ["Planner"]


@dataclasses.dataclass(frozen=True)
class Planner:
    """Builds plans that meet the budget.

    Attributes:
        space: bound to the model.
        geometry: of the model.
        delay: D as detected.
        limits: the budget; what is within it is feasible.
        targets: what plans are fitted to: the limits, less a margin for what predictions miss;
            where the dense model fits, less than its own GMACs, or there would be nothing to find.
        cost_of: predicts the cost of a plan.
        model: label of the plans.
        by_gmacs: fit plans to the GMACs of ``targets``, also where latency is bounded.
    """

    space: Space
    geometry: Geometry
    delay: int
    limits: Limits
    targets: Limits
    cost_of: Callable[[MergePlan], Cost]
    model: str
    by_gmacs: bool = False

    def build(self, params: Mapping[str, Any]) -> MergePlan | None:
        """The plan of some parameters, or ``None`` where none of that shape meets the budget."""
        shape = build(params, self.geometry, self.delay)
        return self.fit(shape, share=params["cost_share"])

    def fit(
        self, shape: Shape, share: float = 1.0, targets: Limits | None = None
    ) -> MergePlan | None:
        """The plan of a shape that comes closest to the targets; by default to those of trials."""
        targets = targets or self.targets
        if targets.ms is None and targets.gmacs is not None:
            return fit_gmacs(shape, self.geometry, share * targets.gmacs, model=self.model)
        return fit(
            shape,
            self.geometry,
            targets,
            self.cost_of,
            share=share,
            model=self.model,
            spend=(lambda cost: cost.gmacs) if self.by_gmacs else None,
        )

    def known(self) -> dict[str, MergePlan]:
        """What is known before a search, by label: dense, and what was published, fitted.

        Where ToMe or DSM cannot meet the budget, theirs is the plan with the GMACs of the targets
        if dense does meet it, else the one that comes closest. Last comes, where it meets the
        budget, the plan that removes nothing and whose last block computes what the head reads
        alone: its outputs are those of dense.
        """
        plans = {"dense": MergePlan(self.model, self.geometry)}
        for label, shape in published_shapes(self.geometry, self.delay).items():
            plan = self.fit(shape)
            if plan is None and label in ("tome", "dsm"):
                plan = self._nearest(shape)
            if plan is not None:
                plans[label] = plan
        for lossless in self._without_steps()[1:]:
            if self.limits.admit(self.cost_of(lossless)):
                plans["dense-prefix"] = lossless
        return plans

    def _without_steps(self) -> list[MergePlan]:
        """Dense, and where the head reads prefix tokens alone, what computes no others last."""
        ends = ["all", "prefix"] if self.geometry.reads_prefix_only else ["all"]
        return [MergePlan(self.model, self.geometry, last_block=end) for end in ends]

    def _nearest(self, shape: Shape) -> MergePlan:
        """The plan of a shape that cannot meet the budget."""
        plan = None
        if self.by_gmacs:
            plan = self.fit(shape, targets=dataclasses.replace(self.targets, ms=None))
        return plan or cheapest(shape, self.geometry, self.limits, self.cost_of, model=self.model)

    def fastest(self) -> MergePlan:
        """The plan with the least predicted cost of all shapes that are known before the search."""
        shapes = list(published_shapes(self.geometry, self.delay).values())
        for point in self.space.enqueued:
            shapes.append(build(self.space.complete(point), self.geometry, self.delay))
        plans = self._without_steps()
        for shape in shapes:
            plans.append(
                cheapest(shape, self.geometry, self.limits, self.cost_of, model=self.model)
            )
        return min(plans, key=lambda plan: self.limits.objective(self.cost_of(plan)))
