"""Which parameters to try next: Optuna's samplers, asked so that no draw depends on another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from dsm_tune.searching.space import Choices, Range, Space

__all__ = ["Mirror", "derive_seed", "quietly", "sampled"]

STARTUP = 8  # trials at random before a model of the space is trusted
COST_APART = 0.01  # of the largest cost: two that differ by less tell nothing of what cost is worth


def derive_seed(*parts: int) -> int:
    """A seed of 32 bits that depends on all the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class Mirror:
    """What a sampler sees: the finished trials of earlier generations, in memory.

    Each draw has its own sampler, seeded from (seed, generation, slot, attempt). So a draw
    depends on finished generations alone: not on workers, nor on an interruption.

    ``tpe``, ``nsga2`` and ``gp`` see both objectives. But the cost is no result: it is what the
    plan was fitted to. ``tpe_equal_cost`` spreads it over the slots of a generation, most of them
    near the budget, and sees the divergences as they would be at one cost.

    Args:
        space: bound to the model.
        told: parameters and (log divergence, cost) of the trials, in order.
    """

    def __init__(
        self, space: Space, told: Sequence[tuple[Mapping[str, Any], tuple[float, float]]]
    ) -> None:
        self.space = self._drawn = space
        values: list[tuple[float, ...]] = [pair for _, pair in told]
        objectives = 2
        if space.sampler == "tpe_equal_cost":
            objectives = 1
            rest = {k: v for k, v in space.parameters.items() if k != "cost_share"}
            self._drawn = dataclasses.replace(space, parameters=rest)
            values = [(value,) for value in _at_equal_cost([pair for _, pair in told])]
        with quietly():
            self._study = optuna.create_study(directions=[StudyDirection.MINIMIZE] * objectives)
        for age, ((params, _), value) in enumerate(zip(told, values, strict=True)):
            drawn, distributions = sampled(self._drawn, params)
            self._study.add_trial(
                create_trial(
                    params=drawn,
                    distributions=distributions,
                    values=list(value),
                    # NSGA-II breeds from the generation before; the sampler keeps its number here.
                    system_attrs={NSGAIISampler._get_generation_key(): age // _population(space)},
                )
            )
        if space.sampler == "nsga2" and told:
            # The sampler orders parents in one way when it selects them and in another when it
            # reads them from its cache: fill that, so that no draw depends on an earlier one.
            self.draw(0)

    def draw(self, seed: int, *, slot: int = 0, at_random: bool = False) -> dict[str, Any]:
        """Draw the parameters of the trial in a slot of a generation."""
        space = self.space if at_random else self._drawn
        with quietly():
            self._study.sampler = _sampler("random" if at_random else space.sampler, space, seed)
            trial = self._study.ask()
            params = space.draw(trial)
            self._study.tell(trial, state=TrialState.FAIL)
        if space is not self.space:
            shares = self.space.parameters["cost_share"]
            assert isinstance(shares, Range)  # as all numbers of a space are
            share = _spread(shares, slot, self.space.generation, seed)
            params = {name: params.get(name, share) for name in self.space.parameters}
        return json.loads(json.dumps(params))  # type: ignore[no-any-return]


def _at_equal_cost(points: Sequence[tuple[float, float]]) -> list[float]:
    """Log divergences less what their cost explains.

    What a unit of cost is worth is the median slope between the better half of the points
    (Theil and Sen's estimator, which one odd point does not move); it is never positive.

    Args:
        points: (log divergence, cost).
    """
    better = sorted(points)[: max(len(points) // 2, 4)]
    apart = COST_APART * max((cost for _, cost in points), default=0.0)
    slopes = [
        (other - one) / (other_cost - cost)
        for i, (one, cost) in enumerate(better)
        for other, other_cost in better[i + 1 :]
        if abs(other_cost - cost) > apart
    ]
    slope = min(statistics.median(slopes), 0.0) if slopes else 0.0
    return [value - slope * cost for value, cost in points]


def _spread(shares: Range, slot: int, slots: int, seed: int) -> float:
    """A share of the budget from the part of a range that is a slot's: dense near the upper end."""
    place = (slot % slots - 0.5 + random.Random(seed).random()) / max(slots - 1, 1)
    return shares.high - (shares.high - shares.low) * min(max(place, 0.0), 1.0) ** 2


def _sampler(name: str, space: Space, seed: int) -> BaseSampler:
    if name == "random":
        return RandomSampler(seed=seed)
    if name == "nsga2":
        return NSGAIISampler(population_size=_population(space), seed=seed)
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=STARTUP)
    return TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP)


def _population(space: Space) -> int:
    return max(space.generation, 2)  # it takes two to breed


def sampled(
    space: Space, params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """The parameters that were drawn, and what they were drawn from."""
    kinds = {name: _distribution(kind) for name, kind in space.parameters.items()}
    drawn = {name: kind for name, kind in kinds.items() if kind is not None and name in params}
    return {name: params[name] for name in drawn}, drawn


def _distribution(kind: Range | Choices) -> BaseDistribution | None:
    if isinstance(kind, Choices):
        return CategoricalDistribution(kind.values) if len(kind.values) > 1 else None
    if kind.low == kind.high:
        return None
    if kind.whole:
        return IntDistribution(int(kind.low), int(kind.high))
    return FloatDistribution(kind.low, kind.high)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep Optuna from announcing what it does and what of it is experimental."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", "The constraint value is ignored")
            yield
    finally:
        optuna.logging.set_verbosity(level)
