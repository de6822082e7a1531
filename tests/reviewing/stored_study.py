"""A study in a real storage: searched for real, evaluated by a formula, confirmed by another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from dsm_tune.answer import Answer
from dsm_tune.config import TuneConfig
from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.results import Evaluation, LatencyMs, Result
from dsm_tune.reviewing.merged_tokens import Sample
from dsm_tune.searching.budget import Cost, Limits
from dsm_tune.searching.planner import Planner
from dsm_tune.searching.search import Progress, Search
from dsm_tune.searching.space import load_space
from dsm_tune.searching.study import Study

MODEL, IMAGES, DELAY = "vit_small", 64, 1
GEOMETRY = Geometry((8, 8), 1, 6, 64, 2, 128, 4, 10, "token")  # of which a plan is made in no time
DENSE = MergePlan(MODEL, GEOMETRY)
LIMITS = Limits(gmacs=0.57 * DENSE.gmacs)


def evaluate(plan: MergePlan, images: int) -> Evaluation:
    """The same for the same plan, on any machine."""
    noise = int(plan.digest[:6], 16) / 16**6
    divergence = 0.05 * (1 - plan.gmacs / DENSE.gmacs) * (0.5 + noise) if any(plan.removed) else 0.0
    return Evaluation(images, divergence, 1 - divergence, seconds=0.01)


def search(
    storage: str,
    name: str,
    *,
    trials: int,
    seed: int = 0,
    on_progress: Callable[[Progress], None] = lambda _: None,
    sampler: str = "random",
    **options: Any,
) -> Search:
    """A search of a new study."""
    config = TuneConfig(
        model=MODEL,
        images="/photographs",
        budget_gflops="57%",
        study=name,
        storage=storage,
        seed=seed,
        **options,
    )
    space = dataclasses.replace(load_space("default").bind(GEOMETRY, DELAY), sampler=sampler)
    planner = Planner(space, GEOMETRY, DELAY, LIMITS, LIMITS, lambda plan: Cost(plan.gmacs), MODEL)
    facts = {
        "config": {**config.to_dict(), "by_name": True},
        "identity": {**config.identity(), "images_digest": "5ea5c11a9e5d165e401d0074de1d165e"},
        "study_id": f"id of {name}",
        "device": {"name": "Xeon (2 cores)", "fingerprint": "ab12"},
        "images": {"search": IMAGES, "holdout": 100, "labelled": False},
        "similarity_curve": [0.5, 0.4, 0.45, 0.5, 0.6, 0.7],
        "delay": DELAY,
        "references": {k: plan.to_json() for k, plan in planner.known().items()},
        "satisfiable": True,
        "fastest_gmacs": 0.3 * DENSE.gmacs,
        "dense_gmacs": DENSE.gmacs,
        "dense_ms": None,
        "dense_digest": DENSE.digest,
        "status": "running",
        "limits": dataclasses.asdict(LIMITS),
    }
    study = Study.create(storage, name, facts)
    return Search(study, planner, images=IMAGES, trials=trials, seed=seed, on_progress=on_progress)


def drive(search: Search, jobs: int = 100_000) -> None:
    """Run its jobs, or the first of them."""
    for _ in range(jobs):
        job = search.next()
        if job is None:
            return
        search.report(job, evaluate(job.plan, job.images))


def confirm(study: Study) -> None:
    """End a study as a tune does, with latencies and held-out divergences by formula."""
    answer = Answer.of(study)
    plans = [answer.reference(name).plan for name in ("dense", "tome", "dsm")]
    plans += [result.plan for result in answer.front()]
    confirmed = {}
    for plan in plans:
        ratio = 0.2 + 0.8 * plan.gmacs / DENSE.gmacs
        ms, divergence = 5 * ratio, 1.04 * evaluate(plan, IMAGES).divergence
        result = Result(
            plan,
            plan.gmacs,
            divergence=divergence,
            divergence_low=0.93 * divergence,
            divergence_high=1.08 * divergence,
            agreement=1 - divergence,
            latency_ms=LatencyMs(ms, 1.1 * ms, 1.3 * ms, 0.99 * ms, 1.01 * ms, 1.03 * ms, ratio),
            throughput=1000 / ms,
        )
        confirmed[plan.digest] = {"result": result.to_dict(), "ratio_high": 1.0}
    study.put("confirmed", confirmed)
    study.put("seconds", 12.0)
    study.put("status", "done")
    chosen = Answer.of(study).result().chosen
    if chosen is not None:
        image, groups = np.full((32, 32, 3), 0.5), np.arange(64).reshape(8, 8) // 2
        sample = Sample("dog.jpg", image, {1: groups, 3: groups // 2})
        some = {"plan_digest": chosen.plan.digest, "samples": 3 * [sample.to_dict()]}
        study.put("token_samples", some)


def make(storage: str, name: str, *, trials: int = 24, **options: Any) -> Study:
    """A study that is done."""
    found = search(storage, name, trials=trials, **options)
    drive(found)
    confirm(found.study)
    return found.study
