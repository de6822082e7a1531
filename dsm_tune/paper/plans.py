"""From a row's recipe to a plan: by geometry alone, no weights needed."""

from __future__ import annotations

import bisect
import dataclasses
from functools import cache

import torch

from dsm_tune import schedules
from dsm_tune.candidates import noise
from dsm_tune.errors import ModelError
from dsm_tune.measuring.macs import count_macs
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.loading import create_model
from dsm_tune.paper.printed import Recipe
from dsm_tune.plan import Geometry, Matching, MergePlan

__all__ = ["geometry_of", "gmacs_of_other", "plan_of"]


@cache
def geometry_of(name: str) -> Geometry:
    """Return the sizes of a timm model, without making its weights.

    Raises:
        ModelError: if there is none of this name, or its tokens cannot be merged.
    """
    with torch.device("meta"):
        return read_geometry(create_model(name))


@cache
def gmacs_of_other(name: str) -> float:
    """Return the giga multiply-adds per image of any timm model, counted in a traced forward.

    Raises:
        ModelError: if there is none of this name, or an operator's cost is not known.
    """
    model = create_model(name)
    try:
        return count_macs(model, noise(model, 1)) / 1e9
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None


def plan_of(recipe: Recipe, geometry: Geometry, delay: int) -> MergePlan:
    """Return the plan of a recipe that is not of the kind ``other``.

    Args:
        recipe: says what merges where, and how r is found.
        geometry: of the model.
        delay: D.
    """
    if recipe.kind == "dense":
        return MergePlan("", geometry)
    if recipe.r is not None:
        return _plan(recipe, geometry, delay, recipe.r)
    if recipe.share is None:
        r = max(int(recipe.portion * geometry.patches / geometry.depth), 1)
        return _plan(recipe, geometry, delay, r)
    return _nearest(recipe, geometry, delay)


def _nearest(recipe: Recipe, geometry: Geometry, delay: int) -> MergePlan:
    """The plan with one r in all its blocks whose GMACs come nearest to a share of dense."""
    wanted = (recipe.share or 1.0) * MergePlan("", geometry).gmacs
    rates = range(geometry.patches)  # GMACs fall as r grows
    place = bisect.bisect_left(
        rates, -wanted, key=lambda r: -_plan(recipe, geometry, delay, r).gmacs
    )
    plans = [_plan(recipe, geometry, delay, r) for r in {max(place - 1, 0), min(place, len(rates))}]
    return min(plans, key=lambda plan: abs(plan.gmacs - wanted))


def _plan(recipe: Recipe, geometry: Geometry, delay: int, r: int) -> MergePlan:
    first = delay if recipe.delayed else 0
    plan = schedules.dsm(geometry, r, delay=first, local_blocks=recipe.local)
    steps = plan.steps
    if recipe.kind == "prune":
        steps = tuple(dataclasses.replace(one, kind="prune", window=None) for one in steps)
    return MergePlan("", geometry, steps, Matching(feature=recipe.feature))
