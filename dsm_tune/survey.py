"""What is known before a search: D, the device's profile, what is reachable, how long it takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dsm_tune.answer import costing, resolve_budget
from dsm_tune.config import TuneConfig
from dsm_tune.inputs import CURVE_IMAGES, Inputs
from dsm_tune.merging.similarity import (
    delay_stability,
    detect_delay,
    find_transition,
    similarity_curves,
)
from dsm_tune.plan import MergePlan
from dsm_tune.profile import DeviceProfile
from dsm_tune.results import REFERENCES
from dsm_tune.reviewing.summary import cost_words
from dsm_tune.searching.budget import Limit, Limits
from dsm_tune.searching.crew import Cluster
from dsm_tune.searching.planner import Planner
from dsm_tune.searching.space import Choices, Fidelity, Space
from dsm_tune.target import TargetDevice

__all__ = ["MOST_CONFIRMED", "Survey", "make_planner", "survey"]

DENSE_FITS_SHARE = 0.75  # of the dense GMACs, for the front that is shown where dense fits
MOST_CONFIRMED = 10  # plans of the front that are measured at the end
TRIAL_SECONDS = 0.25  # to draw, send, store and log a trial (tests/benchmarks/trial_overhead.py)
START_SECONDS = 20.0  # until workers, and the process that times plans alone, are there
MOST_MARGIN = 0.1  # of latency, kept back for what predictions miss


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found; as facts, it is what a study stores of it.

    Attributes:
        facts: JSON values by name.
        space: bound to the model.
    """

    facts: dict[str, Any]
    space: Space

    @property
    def is_satisfiable(self) -> bool:
        """Whether the fastest plan that is known meets the budget, by prediction."""
        return bool(self.facts["satisfiable"])

    def to_dict(self, config: TuneConfig) -> dict[str, Any]:
        """Return what ``--dry-run --json`` prints."""
        facts, limits = self.facts, self.facts["limits"]
        known = ("device", "images", "similarity_curve", "delay", "stability")
        return {
            "model": config.model_name,
            **{name: facts[name] for name in known},
            "budget": {
                "ms": limits["ms"],
                "gmacs": limits["gmacs"],
                "stat": config.latency_stat,
                "batch_size": config.batch_size,
                "satisfiable": facts["satisfiable"],
                "dense_fits": facts["dense_fits"],
                "fastest_ms": facts["fastest_ms"],
                "fastest_gmacs": facts["fastest_gmacs"],
            },
            "dense": {
                "gmacs": facts["dense_gmacs"],
                "ms": facts["dense_ms"],
                "top1": facts["dense_top1"],
            },
            "search_space": {
                "name": self.space.name,
                "shapes": None if math.isinf(self.space.size) else self.space.size,
            },
            "trials": config.trials,
            "estimated_seconds": facts["estimated_seconds"],
        }


def survey(
    config: TuneConfig,
    inputs: Inputs,
    space: Space,
    asked: Mapping[str, Limit],
    target: TargetDevice,
    cluster: Cluster,
    *,
    profile: DeviceProfile | None,
    dense: np.ndarray[Any, Any],
    image_seconds: float,
    say: Callable[[str], None],
) -> Survey:
    """Look at model, images and device before a search.

    Args:
        config: what is asked.
        inputs: model and images.
        space: that will be searched, not bound to the model yet.
        asked: the bounds by unit.
        target: the device that a latency is bounded on.
        cluster: that Ray is connected to.
        profile: what an earlier look measured, if there was one.
        dense: [N, K] outputs of the dense model on the search images.
        image_seconds: of one image through the dense model, all workers at work.
        say: is told what was found, line by line.
    """
    geometry = inputs.geometry
    curves = similarity_curves(inputs.model, inputs.search.pixels[:CURVE_IMAGES])
    curve = [float(value) for value in curves.mean(dim=0)]
    delay = detect_delay(curve)
    stability = delay_stability(curves, seed=config.seed)
    is_seen = find_transition(curve) is not None
    seen = f", in {stability.get(delay, 0.0):.0%} of resamples"
    how = seen if is_seen else " (depth / 6: the curve shows no transition)"
    say(f"delay D = {delay} of {geometry.depth} blocks{how}")
    profile = profile or target.given
    if profile is None and "ms" in asked:
        profile = _measure_profile(config, inputs, space, target, cluster, say)
    plan = MergePlan(config.model_name, geometry)
    cost = costing(profile)(plan)
    limits = resolve_budget(asked, cost.gmacs, cost.ms, config.max_drop)
    planner = make_planner(config, inputs, space, delay, limits, profile)
    fastest = planner.fastest()
    reachable = planner.cost_of(fastest)
    timing_seconds = target.confirm_seconds(geometry)
    seconds = _seconds(config, inputs, planner.space.fidelity, image_seconds, timing_seconds)
    facts = {
        "images": {
            "search": len(inputs.search),
            "holdout": len(inputs.holdout),
            "labelled": inputs.labelled,
        },
        "device": target.facts(profile),
        "similarity_curve": curve,
        "stability": {str(d): s for d, s in stability.items()},
        "delay": delay,
        "profile": None if profile is None else profile.to_json(),
        "dense_gmacs": cost.gmacs,
        "dense_ms": cost.ms,
        "dense_top1": _top1(dense, inputs),
        "dense_digest": plan.digest,
        "dense_fits": limits.excess(cost) <= 0,
        "fastest_ms": reachable.ms,
        "fastest_gmacs": fastest.gmacs,
        "fastest": fastest.to_json(),
        "satisfiable": limits.excess(reachable) <= 0,
        "estimated_seconds": seconds,
        "references": {k: p.to_json() for k, p in planner.known().items()},
        "limits": dataclasses.asdict(limits),
    }
    say(
        f"budget {cost_words(limits.gmacs, limits.ms)}; dense {cost_words(cost.gmacs, cost.ms)}; "
        f"fastest reachable {cost_words(reachable.gmacs, reachable.ms)}; "
        f"satisfiable: {_answer(facts)}"
    )
    return Survey(facts, planner.space)


def make_planner(
    config: TuneConfig,
    inputs: Inputs,
    space: Space,
    delay: int,
    limits: Limits,
    profile: DeviceProfile | None,
) -> Planner:
    """Return what builds the plans of a search: within the limits, close to its targets."""
    cost_of = costing(profile)
    dense = cost_of(MergePlan(config.model_name, inputs.geometry))
    fits, targets = limits.excess(dense) <= 0, limits
    if fits:
        targets = dataclasses.replace(limits, gmacs=dense.gmacs * DENSE_FITS_SHARE)
    elif profile is not None and limits.ms is not None:
        targets = dataclasses.replace(limits, ms=limits.ms / (1 + min(profile.error, MOST_MARGIN)))
    return Planner(
        space.bind(inputs.geometry, delay),
        inputs.geometry,
        delay,
        limits,
        targets,
        cost_of,
        config.model_name,
        by_gmacs=fits,
    )


def _measure_profile(
    config: TuneConfig,
    inputs: Inputs,
    space: Space,
    target: TargetDevice,
    cluster: Cluster,
    say: Callable[[str], None],
) -> DeviceProfile:
    """Measure a device profile here and now."""
    say(f"device profile at batch size {config.batch_size}")
    features = space.parameters["feature"]
    names = features.values if isinstance(features, Choices) else ("k",)
    profile = target.profile(inputs, names, cluster)
    say(f"its predictions are off by {profile.error:.0%} at most, on plans measured whole")
    return profile


def _seconds(
    config: TuneConfig,
    inputs: Inputs,
    fidelity: Fidelity,
    image_seconds: float,
    timing_seconds: float,
) -> float:
    """Estimate of the search and the confirmation, by the images that go through plans."""
    share = fidelity.image_share + fidelity.keep_share if fidelity.thins_out else 1.0
    climbing = max(config.trials - len(REFERENCES), 0)
    evaluated = len(REFERENCES) - 1 + climbing * share  # the outputs of dense are known
    images = evaluated * len(inputs.search) + (1 + MOST_CONFIRMED) * len(inputs.holdout)
    overhead = START_SECONDS + config.trials * TRIAL_SECONDS + timing_seconds
    return images * image_seconds + overhead  # as if merged models ran no faster than dense


def _top1(dense: np.ndarray[Any, Any], inputs: Inputs) -> float | None:
    """Share of the search images that the dense model names right, where they have labels."""
    if not inputs.labelled:
        return None
    right = dense.argmax(axis=1) == inputs.search.labels.numpy()
    return float(right.mean())


def _answer(facts: Mapping[str, Any]) -> str:
    if facts["dense_fits"]:
        return "yes, by the dense model"
    return "yes" if facts["satisfiable"] else "no"
