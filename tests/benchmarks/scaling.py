"""Trials per second with one worker and with two, of the same search, one thread each.

Run ``python tests/benchmarks/scaling.py`` on two idle cores; exits with 1 below the bar. Two
searches with the same seed, and so the same trials, take turns, some generations each: the first
with one worker, the second with two. Ray's start, the making of models, what is known before a
search and a first generation are not counted; draws, generations that wait for their last trial,
the study's storage and MLflow's writer are.

``--record FILE`` keeps what was measured, for ``cluster_simulation.py``.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from subject import config, parser
from trial_overhead import as_trial

from dsm_tune.inputs import Inputs, Payload, dense_batch, load_inputs, make_evaluators, try_plan
from dsm_tune.merging.similarity import detect_delay, similarity_curve
from dsm_tune.plan import MergePlan
from dsm_tune.results import Evaluation
from dsm_tune.reviewing.queue import TrackingQueue
from dsm_tune.reviewing.records import StudyLabels
from dsm_tune.searching.budget import Cost, Limits
from dsm_tune.searching.crew import Cluster, Crew, connected
from dsm_tune.searching.engine import run_search
from dsm_tune.searching.planner import Planner
from dsm_tune.searching.search import Job, Progress, Search
from dsm_tune.searching.space import load_space
from dsm_tune.searching.study import Study

BAR = 0.9


class Timed(Search):
    """Notes when its first job was asked for, what its driver takes, and every job's time."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.began = 0.0
        self.jobs: list[dict[str, Any]] = []
        start = time.perf_counter()
        super().__init__(*arguments, **options)  # begins the first generation
        self.before = self.drawing = time.perf_counter() - start

    def next(self) -> Job | None:
        """The next job."""
        start = time.perf_counter()
        job = super().next()
        if job is not None:
            self.began = self.began or start
            self.drawing += time.perf_counter() - start
        return job

    def prepare(self) -> None:
        """Draw ahead, but not while Ray starts, which is not counted."""
        if self.began:
            start = time.perf_counter()
            super().prepare()
            self.drawing += time.perf_counter() - start

    def report(self, job: Job, evaluation: Evaluation) -> None:
        """Take what a job gave."""
        start = time.perf_counter()
        super().report(job, evaluation)
        self.jobs.append(
            {
                "trial": job.number,
                "images": job.images,
                "seconds": evaluation.seconds,
                "driver_seconds": time.perf_counter() - start,
            }
        )


class Contestant:
    """A search with some workers, run a few generations at a time.

    Args:
        folder: for its study and its MLflow store.
        workers: trials at a time.
        inputs: model and images.
        planner: of its plans.
        seed: of its draws.
    """

    def __init__(
        self, folder: Path, workers: int, inputs: Inputs, planner: Planner, seed: int
    ) -> None:
        self.workers, self.planner, self.seed = workers, planner, seed
        self.images = len(inputs.search)
        payload = Payload.of(inputs.model, inputs.search, "cpu", "float32")
        self.crew = Crew(partial(make_evaluators, [payload]), Cluster(workers=workers))
        batches = [(0, batch) for batch in range(payload.batches)]
        self.dense = np.concatenate(self.crew.map(dense_batch, batches))
        name = f"with-{workers}"
        self.study = Study.create(f"sqlite:///{folder}/{name}.db", name, {})
        labels = StudyLabels(study=name, study_id=name, model="", device="cpu", budget="")
        uri = f"sqlite:///{folder}/{name}-mlflow.db"
        self.queue = TrackingQueue.for_study(uri, "scaling", labels, print)

    def run(self, trials: int) -> dict[str, Any]:
        """Search until there are so many trials; what it took."""
        ends: list[float] = []

        def on_progress(progress: Progress) -> None:
            self.queue.log_trial(as_trial(progress))
            self.queue.log_progress(
                progress.done, progress.hypervolume, progress.best_divergence, progress.done
            )
            self.study.put("seconds", time.monotonic())
            ends.append(time.perf_counter())

        search = Timed(
            self.study,
            self.planner,
            images=self.images,
            trials=trials,
            seed=self.seed,
            on_progress=on_progress,
        )
        run_search(search, self.crew, partial(try_plan, dense=self.dense))
        seconds = search.before + ends[-1] - search.began
        generations = {r.number: r.generation for r in search.records()}
        gmacs = {r.number: r.plan.gmacs for r in search.records()}
        jobs = [
            {**job, "generation": generations[job["trial"]], "gmacs": gmacs[job["trial"]]}
            for job in search.jobs
        ]
        return {
            "workers": self.workers,
            "trials": len(ends),
            "seconds": seconds,
            "drawing_seconds": search.drawing,
            "jobs": jobs,
        }

    def story(self) -> list[tuple[Any, ...]]:
        """The trials, without times."""
        return [
            (r.number, r.plan.digest, r.state, sorted(r.evaluations)) for r in self.study.records()
        ]


def make_planner(inputs: Inputs, share: float) -> Planner:
    """Plans of the default space at a share of the dense GMACs."""
    delay = detect_delay(similarity_curve(inputs.model, inputs.search.pixels[:64]))
    dense = MergePlan("", inputs.geometry)
    limits = Limits(gmacs=share * dense.gmacs)
    space = load_space("default").bind(inputs.geometry, delay)
    return Planner(
        space, inputs.geometry, delay, limits, limits, lambda plan: Cost(plan.gmacs), "subject"
    )


def shares(segment: dict[str, Any]) -> tuple[float, float]:
    """Seconds of evaluations, and of the driver's own work, in a segment."""
    evaluating = sum(job["seconds"] for job in segment["jobs"])
    driver = sum(job["driver_seconds"] for job in segment["jobs"])
    return evaluating, driver + segment["drawing_seconds"]


def main() -> int:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    options.add_argument("--count", type=int, default=128, help="search images")
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--generations", type=int, default=1, help="per turn")
    options.add_argument("--share", type=float, default=0.57, help="of the dense GMACs")
    options.add_argument("--record", type=Path, help="JSON file that is to hold what was measured")
    chosen = options.parse_args()
    inputs = load_inputs(config(chosen, budget_gflops=f"{chosen.share:.0%}"))
    few = inputs.search.take(range(min(chosen.count, len(inputs.search))))
    inputs = dataclasses.replace(inputs, search=few)
    planner = make_planner(inputs, chosen.share)
    size = planner.space.generation
    turns: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name, connected(Cluster(workers=2)):
        contestants = [
            Contestant(Path(name), workers, inputs, planner, chosen.seed) for workers in (1, 2)
        ]
        for one in contestants:
            one.run(trials=3)  # dense, ToMe, DSM
            one.run(trials=3 + size)  # and kept tokens
        known = 3 + size
        for turn in range(1, chosen.rounds + 1):
            for one in contestants:
                found = one.run(known + turn * chosen.generations * size)
                turns[one.workers].append(found)
                print(
                    f"{one.workers} workers: {found['trials']} trials in {found['seconds']:.1f} s",
                    file=sys.stderr,
                )
        stories = [one.story() for one in contestants]
        for one in contestants:
            one.queue.close(timeout=60)
    assert stories[0] == stories[1], "the same seed must give the same trials"
    ratios = [one["seconds"] / two["seconds"] for one, two in zip(turns[1], turns[2], strict=True)]
    efficiencies = sorted(ratio / 2 for ratio in ratios)
    efficiency = statistics.median(efficiencies)
    for workers, found in turns.items():
        rates = [one["trials"] / one["seconds"] for one in found]
        evaluating = statistics.median(shares(one)[0] / (workers * one["seconds"]) for one in found)
        drawing = statistics.median(shares(one)[1] / one["seconds"] for one in found)
        print(
            f"{workers} workers: {statistics.median(rates):.3f} trials/s "
            f"({min(rates):.3f} to {max(rates):.3f}); workers evaluate {evaluating:.1%} of the "
            f"time; the driver draws, stores and decides {drawing:.1%} of it"
        )
    slower = statistics.median(
        shares(two)[0] / shares(one)[0] for one, two in zip(turns[1], turns[2], strict=True)
    )
    print(f"the same evaluations take {slower:.3f} times as long two at a time as one at a time")
    print(
        f"throughput(2) / (2 · throughput(1)): {efficiency:.3f} ({efficiencies[0]:.3f} to "
        f"{efficiencies[-1]:.3f}, {len(ratios)} turns each); bar {BAR}; "
        f"{len(inputs.search)} images, the same {len(stories[0])} trials"
    )
    if chosen.record:
        record = json.loads(chosen.record.read_text()) if chosen.record.exists() else {}
        record["scaling"] = {"images": len(inputs.search), "turns": turns[1] + turns[2]}
        chosen.record.write_text(json.dumps(record, indent=1) + "\n")
    return int(efficiency < BAR)


if __name__ == "__main__":
    sys.exit(main())
