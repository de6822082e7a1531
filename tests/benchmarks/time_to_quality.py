"""Time to reach what a plain loop has after its trials: the loop first, then this project's tune.

The plain loop is what one would write by hand: one process, Optuna's TPE over the same space, the
whole image set for every trial, latency measured in every trial (13 forwards), all cores. Both see
the same search images; quality is the hypervolume that the tune reports. Both times include what
each must import first.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import torch
from subject import config, parser

from dsm_tune.inputs import load_inputs
from dsm_tune.measuring.evaluate import Evaluator
from dsm_tune.measuring.profiling import time_plans
from dsm_tune.merging.similarity import detect_delay, similarity_curve
from dsm_tune.plan import MergePlan
from dsm_tune.results import Evaluation
from dsm_tune.searching.budget import Cost, Limits
from dsm_tune.searching.planner import Planner
from dsm_tune.searching.search import Search
from dsm_tune.searching.space import load_space
from dsm_tune.searching.study import Record, Study
from dsm_tune.tuning import tune

BAR = 0.25


def import_seconds(modules: str) -> float:
    """Seconds that a new process takes to import some modules."""
    start = time.monotonic()
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", f"import {modules}"], cwd=root, check=True)
    return time.monotonic() - start


class Watch:
    """Notes when the search first had at least some hypervolume."""

    def __init__(self, wanted: float, earlier: float) -> None:
        self.wanted, self.seconds = wanted, float("inf")
        self.start = time.monotonic() - earlier
        self.last = 0.0

    def say(self, text: str) -> None:
        """Print a phase."""
        print(f"{time.monotonic() - self.start:6.1f} s  {text}", file=sys.stderr)

    def progress(self, progress: object) -> None:
        """Look at the hypervolume."""
        self.last = progress.hypervolume  # type: ignore[attr-defined]
        if self.last >= self.wanted:
            self.seconds = min(self.seconds, time.monotonic() - self.start)


def plain_loop(options: object, asked: object, trials: int, folder: Path) -> tuple[float, float]:
    """Seconds and hypervolume of a plain loop; its trials become records, to be compared alike."""
    start = time.monotonic()
    torch.set_num_threads(os.cpu_count() or 1)
    inputs = load_inputs(asked)  # type: ignore[arg-type]
    geometry, images = inputs.geometry, inputs.search
    delay = detect_delay(similarity_curve(inputs.model, images.pixels[:64]))
    space = load_space("default").bind(geometry, delay)
    dense = MergePlan("", geometry)
    limits = Limits(gmacs=float(asked.budget_gflops))  # type: ignore[attr-defined]
    planner = Planner(space, geometry, delay, limits, limits, lambda p: Cost(p.gmacs), "")
    # No cache: each trial runs the whole model, as a loop around `merged` would.
    evaluator = Evaluator(inputs.model, images.pixels, images.labels, cache_bytes=0)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        directions=["minimize"] * 2,
        sampler=optuna.samplers.TPESampler(seed=asked.seed),  # type: ignore[attr-defined]
    )
    records = []
    while len(records) < trials:
        trial = study.ask()
        plan = planner.build(space.draw(trial))
        if plan is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        divergence = float(evaluator.evaluate(plan).divergence.mean())
        forwards = time_plans(inputs.model, [plan], images.pixels[:1], seconds=0.0)
        statistics.median(forwards[0].ms)
        study.tell(trial, [divergence, plan.gmacs])
        evaluations = {len(images): Evaluation(len(images), divergence)}
        records.append(Record(len(records), 1, 0, "", {}, plan, evaluations, "complete"))
    seconds = time.monotonic() - start
    # Its front in the same units: the references are what the tune evaluates too.
    for label in ("dense", "tome", "dsm"):
        plan = planner.known()[label] if label != "dense" else dense
        divergence = float(evaluator.evaluate(plan).divergence.mean())
        evaluations = {len(images): Evaluation(len(images), divergence)}
        records.append(Record(len(records), 0, 0, label, {}, plan, evaluations, "complete"))
    search = Search(
        Study.create(f"sqlite:///{folder / 'plain.db'}", "plain", {}),
        planner,
        images=len(images),
        trials=0,
        seed=0,
    )
    search._records = {record.number: record for record in records}
    return seconds, search.hypervolume()


def main() -> int:
    """Print both times and their ratio; 1 above the bar."""
    options = parser(__doc__ or "")
    options.add_argument("--budget-gflops", default="0.71")
    options.add_argument("--plain-trials", type=int, default=60)
    options.add_argument("--trials", type=int, default=60, help="of the tune")
    options.add_argument("--workers", type=int, default=2)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = config(
            chosen,
            budget_gflops=chosen.budget_gflops,
            trials=chosen.trials,
            workers=chosen.workers,
            storage=f"sqlite:///{folder / 'study.db'}",
            tracking_uri=f"sqlite:///{folder / 'mlflow.db'}",
        )
        plain_seconds, wanted = plain_loop(chosen, asked, chosen.plain_trials, folder)
        plain_seconds += import_seconds("torch, timm, optuna")
        print(f"plain loop: {plain_seconds:.0f} s, hypervolume {wanted:.4f}", flush=True)
        watch = Watch(wanted, import_seconds("dsm_tune.tuning"))
        tune(asked, listener=watch)
    print(f"tune: {watch.seconds:.0f} s to the same, {watch.last:.4f} in the end")
    print(f"ratio {watch.seconds / plain_seconds:.3f} (bar {BAR})")
    return int(watch.seconds > BAR * plain_seconds)


if __name__ == "__main__":
    sys.exit(main())
