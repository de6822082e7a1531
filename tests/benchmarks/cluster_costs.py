"""What driver, storage and MLflow take for a trial: the costs of ``cluster_simulation.py``.

Run ``python tests/benchmarks/cluster_costs.py``; it writes ``recorded_cluster.json``, beside what
``scaling.py --record`` has put there. A search of ViT-H's plans runs in this process, evaluated by
a formula; at some numbers of told trials one generation is drawn by the space's sampler, the others
at random. What the driver computes is given in processor time, the rest by the clock. PostgreSQL
is a server on this machine, reached through its network interface.
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
from dsm_tune.searching.space import Space, load_space
from dsm_tune.searching.study import Record, Study

RECORD = Path(__file__).with_name("recorded_cluster.json")
VIT_HUGE = Geometry((16, 16), 1, 32, 1280, 16, 5120, 14, 1000, "token")
IMAGES = 50_000


class CallTimes:
    """Adds up the time of named calls; of nested ones, each has its own alone."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner: list[float] = []

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Time the block, less what is timed within it."""
        self._inner.append(0.0)
        start = self.clock()
        try:
            yield
        finally:
            whole = self.clock() - start
            self.seconds[name] += whole - self._inner.pop()
            self.calls[name] += 1
            if self._inner:
                self._inner[-1] += whole

    def mean(self, name: str) -> float:
        """Seconds per call."""
        return self.seconds[name] / self.calls[name]


class Kept:
    """Takes what a search would store, and forgets it: for the driver's own times."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def records(self) -> list[Record]:
        """Nothing yet."""
        return []

    def add(self, record: Record, space: Space) -> Record:
        """Give a number."""
        return dataclasses.replace(record, number=next(self._numbers))

    def store(self, *arguments: Any) -> None:
        """Store nothing."""

    def close(self, *arguments: Any, **options: Any) -> None:
        """Store nothing."""


class WatchedStudy(Study):
    """A study whose writes are timed by the clock."""

    watch: CallTimes

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

    def __init__(self, marks: list[int], watch: CallTimes, **options: Any) -> None:
        self.marks, self.watch = sorted(marks), watch
        self.found: list[dict[str, float]] = []
        self._real = options["planner"]
        space = dataclasses.replace(self._real.space, sampler="random")
        options["planner"] = dataclasses.replace(self._real, space=space)
        self._random = options["planner"]
        self._marked, self._before = -1, dict[str, float]()
        super().__init__(**options)

    def _ask(self, generation: int) -> None:
        told = len(self._records)
        is_mark = bool(self.marks) and told >= self.marks[0] and not self._members(generation)
        if is_mark:
            self.marks.pop(0)
            self._before = dict(self.watch.seconds)
            self._marked = generation
            self.found.append({"told": told})
        self.planner = self._real if generation == self._marked else self._random
        super()._ask(generation)

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
        if members[0].generation == self._marked:
            spent = {k: v - self._before.get(k, 0.0) for k, v in self.watch.seconds.items()}
            each = {k: spent[k] / len(members) for k in ("draw", "decide")}
            self.found[-1] |= {"start": spent["start"], **each}


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


def run_here(study: Any, trials: int, marks: list[int], watch: CallTimes) -> WatchedSearch:
    """Run a search in this process."""
    search = WatchedSearch(
        marks, watch, study=study, planner=make_planner(), images=IMAGES, trials=trials, seed=0
    )
    while (job := search.next()) is not None:
        search.report(job, evaluate(0, job.plan, job.images))
    return search


def driver_rows(trials: int) -> list[dict[str, float]]:
    """Processor seconds of the driver at some numbers of told trials."""
    marks = [mark for mark in (16, 64, 256, 512, 1000, 1500, 1960) if mark < trials - 8]
    return run_here(Kept(), trials, marks, CallTimes(time.process_time)).found


def storage_seconds(url: str, trials: int) -> tuple[dict[str, float], list[Record]]:
    """Seconds of each kind of write, and the trials."""
    study = WatchedStudy.create(url, "costs", {})
    study.watch = CallTimes()
    search = run_here(study, trials, [], CallTimes())
    return {name: study.watch.mean(name) for name in ("add", "store", "close")}, search.records()


def log_seconds(uri: str, records: list[Record]) -> float:
    """Seconds of MLflow's writer per trial, once its store is open."""
    labels = StudyLabels(study="costs", study_id="costs", model="", device="cpu", budget="")
    queue = TrackingQueue.for_study(uri, "costs", labels, print)
    queue.put(lambda runs: None)
    queue.drain(timeout=120)
    start = time.perf_counter()
    for done, record in enumerate(records, start=1):
        queue.log_trial(as_trial(Progress(done, len(records), 0.1, 0.5, record)))
        queue.log_progress(done, 0.5, 0.1, done)
    queue.drain(timeout=300)
    seconds = (time.perf_counter() - start) / len(records)
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
    parser.add_argument("--trials", type=int, default=2000, help="of the driver's search")
    parser.add_argument("--stored", type=int, default=60, help="trials written to each store")
    parser.add_argument("--dispatched", type=int, default=120)
    parser.add_argument("--parts", default="driver,sqlite,postgresql,dispatch")
    options = parser.parse_args()
    parts = options.parts.split(",")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record["machine"] = f"{os.cpu_count()} cores, Python {platform.python_version()}"

    def keep(kind: str, database: str, uri: str) -> None:
        writes, records = storage_seconds(database, options.stored)
        logged = log_seconds(uri, records)
        record.setdefault("storage", {})[kind] = writes
        record.setdefault("mlflow", {})[kind] = logged
        words = ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in writes.items())
        print(f"{kind}, ms: {words}; MLflow's writer {1e3 * logged:.0f} per trial")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "driver" in parts:
            record["driver"] = driver_rows(options.trials)
            for row in record["driver"]:
                each = (f"{name} {1e3 * row[name]:.1f}" for name in ("start", "draw", "decide"))
                print(f"driver, {row['told']} told, processor ms: {', '.join(each)}")
        if "sqlite" in parts:
            keep("sqlite", f"sqlite:///{folder}/study.db", f"sqlite:///{folder}/mlflow.db")
        if "postgresql" in parts:
            if importlib.util.find_spec("psycopg") is None:
                sys.exit("needs psycopg")
            with (
                postgres() as database,
                postgres() as backend,
                mlflow_server(folder, free_port(), backend) as uri,
            ):
                keep("postgresql", database, uri)
        if "dispatch" in parts:
            with connected(Cluster(workers=4)):
                found = {w: dispatch_seconds(folder, options.dispatched, w) for w in (1, 4)}
            record["dispatch"] = {"1 worker": found[1], "4 workers": found[4]}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except pytest.skip.Exception as reason:
        sys.exit(f"skipped: {reason}")
