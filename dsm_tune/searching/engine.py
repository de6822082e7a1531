"""Runs a search's jobs in parallel with Ray Tune, on warm workers.

The one place where Ray and Optuna meet. Ray decides where and when a job runs; which plans are
tried, and when a trial ends, is the search's, so that the trials do not depend on the workers.
"""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from dsm_tune.errors import ConfigError
from dsm_tune.results import Evaluation
from dsm_tune.searching.crew import RERUNS, Crew
from dsm_tune.searching.search import Job, Search
from dsm_tune.searching.worker import Evaluate, Worker

__all__ = ["run_search"]

WARM_UP_SECONDS = 30.0  # that the first worker waits for the last


class Jobs(OptunaSearch):  # type: ignore[misc]  # Ray ships no types
    """Ray's Optuna searcher, asked in generations: hands out the jobs of a search.

    Ray's own version asks Optuna whenever a worker is free and tells it in the order in which
    workers finish; here both happen in :class:`~dsm_tune.searching.search.Search`.
    """

    def __init__(self, search: Search, crew: Crew) -> None:
        super().__init__()
        self._ot_study = search.study.optuna_study
        self.search = search
        self.crew, self.cluster = crew, crew.cluster
        self.jobs: dict[str, tuple[Job, int]] = {}  # and the member of the crew that does it
        self.idle = deque(range(crew.cluster.workers))
        self.starts: dict[str, float] = {}
        self.deaths: dict[tuple[int, int], int] = {}
        self.false_starts = 0  # workers that died before their first job, in a row
        self.to_warm = crew.cluster.workers if crew.cluster.workers > 1 else 0
        self.all_warm = False
        self.failure: Exception | None = None

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Accept what Ray tells of the experiment; the search has its own space."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next job as a Ray config, ``None`` to wait, or ``FINISHED``."""
        if self.search.finished:
            return Searcher.FINISHED
        if self.to_warm:
            self.to_warm -= 1
            return {}
        job = self._next()
        if job is None:
            return Searcher.FINISHED if self.search.stopped else None
        member = self.idle.popleft()
        self.jobs[trial_id] = job, member
        return {
            "member": self.crew.settle(member),
            "plan": job.plan.to_json(),
            "images": job.images,
        }

    def _next(self) -> Job | None:
        with self._kept_failure():
            return self.search.next()
        return None

    def prepare(self) -> None:
        """Have the search draw ahead, while all workers are busy."""
        if not self.idle:
            with self._kept_failure():
                self.search.prepare()

    @contextlib.contextmanager
    def _kept_failure(self) -> Iterator[None]:
        """Stop the search on an error, and keep it: Ray swallows what a searcher raises."""
        try:
            yield
        except Exception as failure:
            self.failure = self.failure or failure
            self.search.stop("failed")

    def are_warm(self) -> bool:
        """Whether all workers have started once, or the others have waited long enough."""
        first = min(self.starts.values(), default=time.monotonic())
        patience = time.monotonic() - first > WARM_UP_SECONDS
        self.all_warm = self.all_warm or patience or len(self.starts) >= self.cluster.workers
        return self.all_warm

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing to learn before a job has ended."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Report what a job gave; run it again if its process died before its time was up."""
        start = self.starts.pop(trial_id, None)
        if trial_id not in self.jobs:
            return
        job, member = self.jobs.pop(trial_id)
        self.idle.append(member)
        limit = self.cluster.trial_seconds
        with self._kept_failure():
            if result and "evaluation" in result and not error:
                self.false_starts = 0
                self.search.report(job, Evaluation(**json.loads(result["evaluation"])))
            elif start is None:
                self._not_started(job)
            elif time.monotonic() - start >= limit:
                # The member's clock starts later than this one: it has ended itself.
                cause = f"TimeoutError: it took longer than {limit:g} s"
                self.search.report(job, Evaluation(job.images, error=cause))
            else:
                self._run_again(job)

    def _not_started(self, job: Job) -> None:
        self.search.give_back(job)
        self.false_starts += 1
        self.search.study.note("start", f"last: before trial {job.number}")
        if self.false_starts > RERUNS * self.cluster.workers:
            raise ConfigError(
                f"{self.false_starts} workers in a row have died before their first trial; each "
                "needs this version of dsm-tune, of Python and of Ray, and memory for the model"
            )

    def _run_again(self, job: Job) -> None:
        key = job.number, job.images
        self.deaths[key] = self.deaths.get(key, 0) + 1
        if self.deaths[key] <= RERUNS:
            self.search.study.note("worker", f"last: trial {job.number} on {job.images} images")
            self.search.give_back(job)
        else:
            cause = f"its worker died {self.deaths[key]} times"
            self.search.report(job, Evaluation(job.images, error=cause))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles its searcher to restore from; a study is resumed from its storage

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: all that counts is in the study's storage."""
        Path(checkpoint_path).touch()


class _Clock(tune.Callback):  # type: ignore[misc]  # Ray ships no types
    """Notes when a job starts, has the next one drawn, and ends a search when its time is up."""

    def __init__(self, jobs: Jobs, is_over: Callable[[], bool]) -> None:
        self.jobs, self.is_over = jobs, is_over

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.jobs.starts[trial.trial_id] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if not self.jobs.search.stopped and self.is_over():
            self.jobs.search.stop("time limit reached")
        self.jobs.prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # pickled with the searcher, and as little needed


class _KeepWorkers(FIFOScheduler):  # type: ignore[misc]  # Ray ships no types
    """Has all workers from the beginning, and keeps them while they wait for a generation's end.

    Ray Tune gives a job whose worker is starting to the first worker that is free, and ends the one
    that starts: with short jobs, all would run on one. So each worker begins with an empty job,
    which lasts until all have started. It also ends all idle workers but one where no job is
    queued, although more will come. How many it keeps is not part of its interface; should that
    change, workers start anew again.
    """

    def __init__(self, jobs: Jobs) -> None:
        super().__init__()
        self.jobs, self.kept = jobs, False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if not self.kept:
            self.kept = True
            with contextlib.suppress(AttributeError):
                cache = tune_controller._tune_controller._actor_cache
                cache.increase_max(trial.placement_group_factory, by=self.jobs.cluster.workers)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        is_job = trial.trial_id in self.jobs.jobs
        return str(self.CONTINUE if is_job or not self.jobs.are_warm() else self.STOP)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # pickled with the searcher, and as little needed


@contextlib.contextmanager
def _interrupts(search: Search) -> Iterator[None]:
    """The first Ctrl-C lets running jobs finish, the second ends at once; the study stays whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if search.stopped:
            raise KeyboardInterrupt
        search.stop("interrupted")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_search(
    search: Search,
    crew: Crew,
    evaluate: Evaluate,
    *,
    deadline: Callable[[], bool] = lambda: False,
) -> None:
    """Run a search to its end, or until it is stopped.

    Args:
        search: gives out jobs and takes results.
        crew: what its members have made is the first argument of ``evaluate``.
        evaluate: called for each job; pickled by Ray.
        deadline: whether the time is up; asked whenever a job ends.
    """
    if search.finished:
        return
    cluster = crew.cluster
    crew.members()  # they start while Ray Tune does
    trainable = tune.with_parameters(
        Worker,
        shared=(crew.make, [ray.put(evaluate)]),
        trial_seconds=cluster.trial_seconds,
    )
    with tempfile.TemporaryDirectory(prefix="dsm-tune-") as folder, _interrupts(search):
        jobs = Jobs(search, crew)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=jobs,
                scheduler=_KeepWorkers(jobs),
                num_samples=-1,
                max_concurrent_trials=cluster.workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                callbacks=[_Clock(jobs, deadline)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=0),
                log_to_file=False,
            ),
        )
        tuner.fit()
    if jobs.failure is not None:
        raise jobs.failure
