"""What a trial costs beside its evaluation: ask, dispatch, tell and the write to MLflow.

Run ``python tests/benchmarks/trial_overhead.py``; exits with 1 above the bar. ``--profile`` shows
where the driver's time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dsm_tune import schedules
from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.results import Evaluation, Trial
from dsm_tune.reviewing.queue import TrackingQueue
from dsm_tune.reviewing.records import StudyLabels
from dsm_tune.searching.budget import Cost, Limits
from dsm_tune.searching.crew import Cluster, Crew, connected
from dsm_tune.searching.engine import run_search
from dsm_tune.searching.planner import Planner
from dsm_tune.searching.search import Progress, Search
from dsm_tune.searching.space import load_space
from dsm_tune.searching.study import Study

BAR_SECONDS = 0.25
DEIT_TINY = Geometry((14, 14), 1, 12, 192, 3, 768, 16, 1000, "token")


def evaluate(process: int, plan: MergePlan, images: int) -> Evaluation:
    """Returns at once; the process that it ran in stands in ``top1``."""
    divergence = 0.1 + int(plan.digest, 16) % 1000 / 1e4
    return Evaluation(images, divergence, 1 - divergence, top1=float(process))


def make_search(
    folder: Path, trials: int, sampler: str, on_progress: Callable[[Progress], None]
) -> Search:
    """A search of the default space for DeiT-Ti at 57 % of its GMACs."""
    import dataclasses

    limits = Limits(gmacs=0.57 * MergePlan("", DEIT_TINY).gmacs)
    delay = schedules.default_delay(DEIT_TINY)
    space = dataclasses.replace(load_space("default").bind(DEIT_TINY, delay), sampler=sampler)
    planner = Planner(
        space, DEIT_TINY, delay, limits, limits, lambda plan: Cost(plan.gmacs), "deit_tiny"
    )
    study = Study.create(f"sqlite:///{folder}/study.db", "overhead", {})
    return Search(study, planner, images=256, trials=trials, seed=0, on_progress=on_progress)


def as_trial(progress: Progress) -> Trial:
    """The ended trial, as it is written to MLflow."""
    record, latest = progress.record, progress.record.latest
    return Trial(
        number=record.number,
        generation=record.generation,
        label=record.label,
        state=record.state,
        params=record.params,
        plan=record.plan,
        why=record.why,
        images=latest.images if latest else 0,
        divergence=latest.divergence if latest else None,
        agreement=latest.agreement if latest else None,
    )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    cluster = Cluster(workers=options.workers)
    ends: list[float] = []
    busy: list[float] = []  # processor time of this process, MLflow's thread included
    with tempfile.TemporaryDirectory() as name, connected(cluster):
        folder = Path(name)
        labels = StudyLabels(
            study="overhead", study_id="0", model="deit_tiny", device="cpu", budget="57%"
        )
        queue = TrackingQueue.for_study(f"sqlite:///{folder}/mlflow.db", "overhead", labels, print)

        def on_progress(progress: Progress) -> None:
            queue.log_trial(as_trial(progress))
            queue.log_progress(
                progress.done, progress.hypervolume, progress.best_divergence, progress.done
            )
            ends.append(time.perf_counter())
            busy.append(time.process_time())

        profiler = cProfile.Profile()
        start = time.perf_counter()
        if options.profile:
            profiler.enable()
        search = make_search(folder, options.trials, options.sampler, on_progress)
        run_search(search, Crew(os.getpid, cluster), evaluate)
        ran = time.perf_counter()
        profiler.disable()
        queue.drain(timeout=60)
        logged = time.perf_counter()
        queue.close(timeout=10)
        records = search.records()
        evaluations = [e for r in records for e in r.evaluations.values()]
        processes = {e.top1 for e in evaluations}
    evaluating = sum(e.seconds for e in evaluations)
    first = next(i for i, record in enumerate(records) if record.generation)  # workers are warm
    warm = (logged - ends[first - 1] - evaluating) / (len(ends) - first)
    cpu = (busy[-1] - busy[first - 1]) / (len(ends) - first)
    started = ends[first - 1] - start
    print(f"{len(ends)} trials, {len(evaluations)} evaluations in {len(processes)} processes")
    print(
        f"once per search: {started:.2f} s to make the study, start the workers and run the "
        f"{first} known plans; MLflow was ready {logged - ran:.2f} s after the last trial"
    )
    print(
        f"per trial, ask + dispatch + tell + log: {warm:.3f} s; bar {BAR_SECONDS} s; "
        f"processor time of the driver in it: {cpu:.3f} s"
    )
    if options.profile:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(70)
    return int(warm > BAR_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
