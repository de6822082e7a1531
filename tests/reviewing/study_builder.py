"""A study as the search would leave it: numbers made up, plans real."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from dsm_tune import schedules
from dsm_tune.plan import Geometry, Matching, MergePlan
from dsm_tune.results import BudgetReport, LatencyMs, Result, Trial, TuneResult

DEIT_TINY = Geometry((14, 14), 1, 12, 192, 3, 768, 16, 1000, "token")


def plan(r: int, delay: int = 1, **matching: Any) -> MergePlan:
    body = schedules.dsm(DEIT_TINY, r, delay=delay, local_blocks=0, model="deit_tiny")
    how = Matching(**matching)
    return dataclasses.replace(body, steps=body.steps[:-1], last_block="prefix", matching=how)


DENSE = MergePlan("deit_tiny", DEIT_TINY)
TOME = schedules.tome(DEIT_TINY, 13, model="deit_tiny")
DSM = schedules.dsm(DEIT_TINY, 17, delay=2, window=7, model="deit_tiny")


def measured(one: MergePlan, divergence: float, **fields: Any) -> Result:
    ms = 1.0 + 4.0 * one.gmacs
    ratio = ms / (1.0 + 4.0 * DENSE.gmacs)
    latency = LatencyMs(ms, 1.1 * ms, 1.3 * ms, 0.99 * ms, 1.01 * ms, 1.02 * ms, ratio)
    body: dict[str, Any] = {
        "gmacs": one.gmacs,
        "divergence": divergence,
        "divergence_low": 0.93 * divergence,
        "divergence_high": 1.08 * divergence,
        "divergence_search": 0.95 * divergence,
        "agreement": 1 - divergence,
        "latency_ms": latency,
        "throughput": 1000 / ms,
        "feasible": True,
    }
    return Result(one, **{**body, **fields})


def trials(count: int = 40, seed: int = 0) -> list[Trial]:
    rng = random.Random(seed)
    known = [("dense", DENSE, 0.0), ("tome", TOME, 0.101), ("dsm", DSM, 0.084)]
    found = []
    for number in range(count):
        label, one, divergence = known[number] if number < 3 else ("", None, 0.0)
        if one is None:
            spread = {"delay": rng.randint(0, 3), "r": rng.randint(11, 17)}
            one = plan(spread["r"], spread["delay"], salience=round(rng.random() / 3, 4))
            divergence = 0.035 + 0.004 * (17 - one.gmacs * 17) ** 2 / 9 + rng.expovariate(1 / 0.03)
        state, why = "complete", ""
        if number >= 3 and number % 7 == 0:
            state, why, divergence = "pruned", "dominated after 64 of 300 images", divergence * 1.3
        if number >= 3 and number % 11 == 0:
            state, why = "failed", "RuntimeError: out of memory"
        params = {"delay": number % 3, "salience": 0.1 * (number % 4)} if not label else {}
        found.append(
            Trial(
                number=number,
                generation=number // 8 if not label else -1,
                label=label,
                state=state,
                params=params,
                plan=None if state == "failed" else one,
                why=why,
                images=64 if state == "pruned" else 300,
                divergence=None if state == "failed" else divergence,
                agreement=None if state == "failed" else max(1 - divergence, 0.0),
                predicted_ms=None if state == "failed" else 1.02 * (1.0 + 4.0 * one.gmacs),
                seconds=2.5,
                feasible=state == "complete" and label != "dense" and one.gmacs <= 0.9,
            )
        )
    return found


def study(some: list[Trial] | None = None, *, by: str = "gmacs", **fields: Any) -> TuneResult:
    some = trials() if some is None else some
    complete = [one for one in some if one.state == "complete" and not one.label and one.feasible]
    results, best = [], 9.9
    for one in sorted(complete, key=lambda one: (one.plan.gmacs, one.divergence), reverse=True):
        results.append(measured(one.plan, one.divergence * 1.04, trial=one.number))
    front = []
    for one in sorted(results, key=lambda one: (one.gmacs, one.divergence)):
        if one.divergence < best:
            best = one.divergence
            front.append(one)
    ms = 4.6 if by == "ms" else None
    body: dict[str, Any] = {
        "study": "demo",
        "status": "done",
        "seconds": 321.0,
        "tracking_uri": "sqlite:////tmp/mlflow.db",
        "parent_run_id": "0" * 32,
        "model": "deit_tiny_patch16_224",
        "device": {"name": "Xeon (2 cores)", "fingerprint": "ab12"},
        "images": {"search": 300, "holdout": 500, "labelled": False},
        "similarity_curve": [0.55, 0.42, 0.38, 0.41, 0.45, 0.5, 0.54, 0.58, 0.63, 0.68, 0.75, 0.86],
        "delay": 2,
        "budget": BudgetReport(ms, None if ms else 0.9, "p50", 1, True, False, 2.2),
        "dense": measured(DENSE, 0.0, trial=0, feasible=False),
        "tome": measured(TOME, 0.101, trial=1),
        "dsm": measured(DSM, 0.084, trial=2),
        "trials": {"complete": 30, "pruned": 5, "failed": 5, "duplicate": 2},
        "front": front,
        "chosen": front[-1] if front else None,
    }
    return TuneResult(**{**body, **fields})
