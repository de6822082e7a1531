"""Which parameters of a space decided how close to dense the trials of a study came."""

from __future__ import annotations

import math
import warnings

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, create_trial

from dsm_tune.searching.study import Study

__all__ = ["parameter_importance"]

LEAST = 16  # trials; what fewer say is chance
BEST = 0.25  # share of the trials that are called the best


def parameter_importance(study: Study) -> dict[str, float]:
    """Return how much each parameter decided that a trial was among the best quarter (PED-ANOVA).

    The shares add up to 1, the largest first. All drawn trials count, by what they gave on the
    fewest images, which all of them have seen.
    Empty where too few trials were drawn or all are alike.

    Args:
        study: with trials that have ended.
    """
    told = []
    for trial in study.trials():
        value = _log_divergence(trial)
        if trial.params and value is not None:
            told.append((trial, value))
    if len(told) < LEAST or len({value for _, value in told}) == 1:
        return {}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST)
        mirror = optuna.create_study()
        mirror.add_trials(
            [
                create_trial(params=t.params, distributions=t.distributions, value=value)
                for t, value in told
            ]
        )
        found = optuna.importance.get_param_importances(mirror, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(level)
    return {name: float(share) for name, share in found.items() if math.isfinite(share)}


def _log_divergence(trial: FrozenTrial) -> float | None:
    evaluations = [v for k, v in trial.user_attrs.items() if k.startswith("evaluation:")]
    known = [one for one in evaluations if one["divergence"] is not None]
    if not known:
        return None
    return math.log(max(min(known, key=lambda one: one["images"])["divergence"], 1e-9))
