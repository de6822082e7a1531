"""What driver, storage and MLflow take for a trial: the costs of ``cluster_simulation.py``.

Run ``python tests/benchmarks/cluster_costs.py``; it writes ``recorded_cluster.json``, beside what
``scaling.py --record`` has put there. A search of ViT-H's plans runs in this process, evaluated by
a formula; at some numbers of told trials one generation is drawn by the space's sampler, the others
at random. PostgreSQL is a server on this machine, reached through its network interface.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))

import pytest
from servers import free_port, mlflow_server, postgres
from trial_overhead import as_trial

from dsm_tune import schedules
from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.results import Evaluation
from dsm_tune.reviewing.queue import TrackingQueue
from dsm_tune.reviewing.records import StudyLabels
from dsm_tune.searching.budget import Cost, Limits
from dsm_tune.searching.crew import Cluster, Crew, connected
from dsm_tune.searching.engine import run_search
from dsm_tune.searching.planner import Planner
from dsm_tune.searching.samplers import Mirror
from dsm_tune.searching.search import Job, Progress, Search
from dsm_tune.searching.space import load_space
from dsm_tune.searching.study import Record, Study

RECORD = Path(__file__).with_name("recorded_cluster.json")
VIT_HUGE = Geometry((16, 16), 1, 32, 1280, 16, 5120, 14, 1000, "token")
IMAGES = 50_000


class Stopwatch:
    """Adds up the time of named calls; of nested ones, each has its own alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner: list[float] = []

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Time the block, less what is timed within it."""
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[name] += whole - self._inner.pop()
            self.calls[name] += 1
            if self._inner:
                self._inner[-1] += whole

    def mean(self, name: str) -> float:
        """Seconds per call."""
        return self.seconds[name] / self.calls[name]


class WatchedStudy(Study):
    """A study whose writes are timed."""

    watch: Stopwatch

    def add(self, *arguments: Any) -> Record:
        """Store a new trial."""
        with self.watch.timing("add"):
            return super().add(*arguments)

    def store(self, *arguments: Any) -> None:
        """Store an evaluation."""
        with self.watch.timing("store"):
            super().store(*arguments)

    def close(self, *arguments: Any, **options: Any) -> None:
        """End a trial."""
        with self.watch.timing("close"):
            super().close(*arguments, **options)


class WatchedSearch(Search):
    """A search whose parts are timed; its sampler is the space's at chosen numbers of trials."""

    def __init__(self, marks: list[int], watch: Stopwatch, **options: Any) -> None:
        self.marks, self.watch = sorted(marks), watch
        self.found: list[dict[str, float]] = []
        self._real = options["planner"]
        space = dataclasses.replace(self._real.space, sampler="random")
        options["planner"] = dataclasses.replace(self._real, space=space)
        self._random = options["planner"]
        super().__init__(**options)

    def _fill(self, generation: int) -> bool:
        told = len(self._records)
        is_mark = bool(self.marks) and told >= self.marks[0]
        self.planner = self._real if is_mark else self._random
        before = dict(self.watch.seconds), dict(self.watch.calls)
        filled = super()._fill(generation)
        if is_mark and len(self._records) > told:
            self.marks.pop(0)
            spent = {k: v - before[0].get(k, 0.0) for k, v in self.watch.seconds.items()}
            drawn = len(self._records) - told
            self.found.append(
                {"told": told, "start": spent["start"], "draw": spent["draw"] / drawn}
            )
            self._decided = self.watch.seconds["decide"], told
        return filled

    def _mirror(self, generation: int) -> Mirror:
        with self.watch.timing("start"):
            return super()._mirror(generation)

    def _draw(self, mirror: Mirror, generation: int, slot: int) -> Record | None:
        with self.watch.timing("draw"):
            return super()._draw(mirror, generation, slot)

    def _promoted(self, members: list[Record], few: int) -> list[Record]:
        with self.watch.timing("decide"):
            return super()._promoted(members, few)

    def _close(self, members: list[Record]) -> None:
        with self.watch.timing("decide"):
            super()._close(members)
        if self.found and "decide" not in self.found[-1]:
            spent = self.watch.seconds["decide"] - self._decided[0]
            self.found[-1]["decide"] = spent / len(members)


def evaluate(process: int, plan: MergePlan, images: int) -> Evaluation:
    """Returns at once, the same for the same plan."""
    divergence = 0.02 + int(plan.digest, 16) % 1000 / 1e4
    return Evaluation(images, divergence, 1 - divergence)


def make_planner() -> Planner:
    """Plans of the default space for ViT-H at 60 % of its GMACs."""
    limits = Limits(gmacs=0.6 * MergePlan("", VIT_HUGE).gmacs)
    delay = schedules.default_delay(VIT_HUGE)
    space = load_space("default").bind(VIT_HUGE, delay)
    return Planner(space, VIT_HUGE, delay, limits, limits, lambda p: Cost(p.gmacs), "vit_huge")


def run_here(
    url: str, trials: int, marks: list[int], on_progress: Callable[[Progress], None]
) -> tuple[WatchedSearch, Stopwatch]:
    """Run a search in this process."""
    watch = Stopwatch()
    study = WatchedStudy.create(url, f"costs-{os.getpid()}", {})
    study.watch = watch
    search = WatchedSearch(
        marks,
        watch,
        study=study,
        planner=make_planner(),
        images=IMAGES,
        trials=trials,
        seed=0,
        on_progress=on_progress,
    )
    while (job := search.next()) is not None:
        search.report(job, evaluate(0, job.plan, job.images))
    return search, watch


def log_seconds(uri: str, progresses: list[Progress]) -> float:
    """Seconds of MLflow's writer per trial, once its store is open."""
    labels = StudyLabels(study="costs", study_id="costs", model="", device="cpu", budget="")
    queue = TrackingQueue.for_study(uri, "costs", labels, print)
    queue.put(lambda runs: None)
    queue.drain(timeout=120)
    start = time.perf_counter()
    for progress in progresses:
        queue.log_trial(as_trial(progress))
        queue.log_progress(
            progress.done, progress.hypervolume, progress.best_divergence, progress.done
        )
    queue.drain(timeout=300)
    seconds = (time.perf_counter() - start) / len(progresses)
    assert not queue.error, queue.error
    queue.close(timeout=60)
    return seconds


def dispatch_seconds(folder: Path, trials: int, workers: int) -> float:
    """Seconds from one report to the next with evaluations of no time, less the search's own."""
    times: list[tuple[float, float]] = []

    class Noted(Search):
        def report(self, job: Job, evaluation: Evaluation) -> None:
            start = time.perf_counter()
            super().report(job, evaluation)
            times.append((start, time.perf_counter()))

    planner = make_planner()
    space = dataclasses.replace(planner.space, sampler="random", generation=64)
    study = Study.create(f"sqlite:///{folder}/dispatch-{workers}.db", "dispatch", {})
    cluster = Cluster(workers=workers)
    search = Noted(
        study,
        dataclasses.replace(planner, space=space),
        images=IMAGES,
        trials=trials,
        seed=0,
    )
    run_search(search, Crew(os.getpid, cluster), evaluate)
    gaps = [start - ended for (_, ended), (start, _) in itertools.pairwise(times)]
    half = len(gaps) // 2
    whole, early, late = (1e3 * statistics.mean(g) for g in (gaps, gaps[:half], gaps[half:]))
    print(
        f"dispatch, {workers} workers: {whole:.1f} ms per job; the first half {early:.1f}, "
        f"the second {late:.1f}"
    )
    return whole / 1e3


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--logged", type=int, default=60, help="trials written to MLflow")
    parser.add_argument("--dispatched", type=int, default=200)
    parser.add_argument("--parts", default="driver,postgresql,dispatch")
    options = parser.parse_args()
    parts = options.parts.split(",")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record["machine"] = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    progresses: list[Progress] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "driver" in parts:
            marks = [m for m in (16, 64, 256, 512, 1000, 1500, 1960) if m < options.trials - 8]
            url = f"sqlite:///{folder}/study.db"
            search, watch = run_here(url, options.trials, marks, progresses.append)
            record["driver"] = search.found
            for row in search.found:
                print(
                    "driver, ms: "
                    + ", ".join(f"{k} {1e3 * v if k != 'told' else v:.1f}" for k, v in row.items())
                )
            writes = {k: watch.mean(k) for k in ("add", "store", "close")}
            record.setdefault("storage", {})["sqlite"] = writes
            print(f"SQLite, ms: { ({k: round(1e3 * v, 1) for k, v in writes.items()}) }")
            uri = f"sqlite:///{folder}/mlflow.db"
            seconds = log_seconds(uri, progresses[: options.logged])
            record.setdefault("mlflow", {})["sqlite"] = seconds
            print(f"MLflow's writer, SQLite: {1e3 * seconds:.1f} ms per trial")
        if "postgresql" in parts:
            if importlib.util.find_spec("psycopg") is None:
                sys.exit("needs psycopg")
            with postgres() as database:
                progresses.clear()
                _, watch = run_here(database, 200, [], progresses.append)
                writes = {k: watch.mean(k) for k in ("add", "store", "close")}
                record.setdefault("storage", {})["postgresql"] = writes
                print(f"PostgreSQL, ms: { ({k: round(1e3 * v, 1) for k, v in writes.items()}) }")
            with postgres() as database, mlflow_server(folder, free_port(), database) as uri:
                seconds = log_seconds(uri, progresses[: options.logged])
                record.setdefault("mlflow", {})["postgresql"] = seconds
                print(f"MLflow's writer, server on PostgreSQL: {1e3 * seconds:.1f} ms per trial")
        if "dispatch" in parts:
            with connected(Cluster(workers=4)):
                found = {w: dispatch_seconds(folder, options.dispatched, w) for w in (1, 4)}
            record["dispatch"] = found[4]
            record["dispatch_by_workers"] = found
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except pytest.skip.Exception as reason:
        sys.exit(f"skipped: {reason}")
