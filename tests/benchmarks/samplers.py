"""Which sampler finds more: all that a space may name, on the same recorded objective.

``--record N`` evaluates N random plans of the default space on the subject and keeps their
parameters and divergences in ``recorded_objective.json``. Without it, a Gaussian process fitted to
that record stands for the evaluation, so that each sampler sees the very same function; printed is
the hypervolume after some numbers of trials: median, least and most over seeds. ``--generation``
says what larger generations cost, which more workers can share.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from subject import config, parser

from dsm_tune.inputs import load_inputs
from dsm_tune.measuring.evaluate import Evaluator
from dsm_tune.merging.similarity import detect_delay, similarity_curve
from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.searching.budget import Cost, Limits
from dsm_tune.searching.pareto import hypervolume
from dsm_tune.searching.planner import Planner
from dsm_tune.searching.samplers import Mirror, derive_seed
from dsm_tune.searching.space import SAMPLERS, Choices, Space, load_space

RECORD = Path(__file__).with_name("recorded_objective.json")
MARKS = (16, 32, 48, 64, 96)


def planner_for(geometry: Geometry, delay: int, gmacs: float) -> Planner:
    """Plans of the default space at a budget."""
    space = load_space("default").bind(geometry, delay)
    limits = Limits(gmacs=gmacs)
    return Planner(space, geometry, delay, limits, limits, lambda p: Cost(p.gmacs), "")


def record(options: Any) -> None:
    """Evaluate random plans and write them down; what was written before is kept."""
    torch.set_num_threads(1)
    inputs = load_inputs(config(options, budget_gflops=options.budget_gflops))
    images = inputs.search.take(range(min(options.count, len(inputs.search))))
    delay = detect_delay(similarity_curve(inputs.model, inputs.search.pixels[:64]))
    planner = planner_for(inputs.geometry, delay, float(options.budget_gflops))
    evaluator = Evaluator(inputs.model, images.pixels, images.labels)
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {"points": []}
    found["geometry"] = dataclasses.asdict(inputs.geometry)
    found |= {"delay": delay, "gmacs": float(options.budget_gflops), "images": len(images)}
    mirror = Mirror(planner.space, [])
    for index in range(len(found["points"]), options.record):
        params = mirror.draw(derive_seed(options.seed, index), at_random=True)
        plan = planner.build(params)
        if plan is not None:
            divergence = float(evaluator.evaluate(plan).divergence.mean())
            found["points"].append({"params": params, "divergence": round(divergence, 5)})
            RECORD.write_text(json.dumps(found, separators=(",", ":")) + "\n")


def vector(params: dict[str, Any], space: Space) -> list[float]:
    """Parameters as numbers: a column per number and per choice."""
    columns: list[float] = []
    for name, kind in space.parameters.items():
        if isinstance(kind, Choices):
            columns += [float(params[name] == value) for value in kind.values]
        else:
            columns.append(float(params[name]))
    return columns


def run(
    space: Space, seed: int, planner: Planner, surrogate: Any, reference: float, *, trials: int
) -> list[float]:
    """Hypervolume after each trial."""
    dense = MergePlan("", planner.geometry).gmacs
    told: list[tuple[dict[str, Any], tuple[float, float]]] = []
    points: list[tuple[float, float]] = []
    volumes: list[float] = []
    while len(points) < trials:
        mirror = Mirror(space, told)
        asked = [
            mirror.draw(derive_seed(seed, len(told), slot), slot=slot)
            for slot in range(space.generation)
        ]
        for params in asked:
            plan = planner.build(params)
            if plan is None:
                continue
            log_divergence = float(surrogate.predict([vector(params, space)])[0])
            told.append((params, (log_divergence, plan.gmacs)))
            points.append((plan.gmacs, math.exp(log_divergence)))
            area = hypervolume(points, (dense, reference))
            volumes.append(area / (dense * reference))
    return volumes


def main() -> None:
    """Print a table."""
    options = parser(__doc__ or "")
    options.add_argument("--record", type=int, default=0)
    options.add_argument("--count", type=int, default=100, help="images per recorded plan")
    options.add_argument("--budget-gflops", default="0.71")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--samplers", default=",".join(SAMPLERS))
    options.add_argument("--generation", type=int, help="trials of one; the space's unless given")
    options.add_argument("--marks", default=",".join(map(str, MARKS)), help="numbers of trials")
    chosen = options.parse_args()
    if chosen.record:
        record(chosen)
        return
    if not RECORD.exists():
        sys.exit(f"there is no {RECORD.name}; make it with --record 300")
    found = json.loads(RECORD.read_text())
    planner = planner_for(Geometry(**found["geometry"]), found["delay"], found["gmacs"])
    # What a plan was recorded without was the paper's, as a space has it that does not name it.
    known = [planner.space.complete(point["params"]) for point in found["points"]]
    rows = np.array([vector(params, planner.space) for params in known])
    logs = np.log([point["divergence"] for point in found["points"]])
    # A hopeless plan is as bad at 1 nat as at 2; what counts is where plans are good.
    logs = logs.clip(max=0.0)
    kernel = ConstantKernel() * RBF(np.ones(rows.shape[1])) + WhiteKernel(0.05)
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    surrogate = make_pipeline(StandardScaler(), process)
    warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is no harm
    fit = cross_val_score(surrogate, rows, logs, cv=5).mean()
    surrogate.fit(rows, logs)
    print(f"{len(logs)} recorded plans, cross-validated R² of the stand-in {fit:.2f}")
    reference = 2 * math.exp(statistics.median(logs))
    marks = [int(mark) for mark in chosen.marks.split(",")]
    size = chosen.generation or planner.space.generation
    print(f"generations of {size}")
    print("sampler        " + "".join(f"{mark:>22} trials" for mark in marks) + "   s/draw")
    for sampler in chosen.samplers.split(","):
        start = time.perf_counter()
        space = dataclasses.replace(planner.space, sampler=sampler, generation=size)
        runs = [
            run(space, seed, planner, surrogate, reference, trials=max(marks))
            for seed in range(chosen.seeds)
        ]
        seconds = (time.perf_counter() - start) / (chosen.seeds * len(runs[0]))
        cells = []
        for mark in marks:
            values = [volumes[mark - 1] for volumes in runs]
            cells.append(f"{statistics.median(values):.4f} [{min(values):.4f}, {max(values):.4f}]")
        row = f"{sampler:15}" + "  ".join(f"{cell:>27}" for cell in cells) + f"  {seconds:.3f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
