"""Runs a search's jobs in parallel with Ray Tune, on warm workers.

The one place where Ray and Optuna meet. Ray decides where and when a job runs; which plans are
tried, and when a trial ends, is the search's, so that the trials do not depend on the workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from dsm_tune.errors import ConfigError
from dsm_tune.plan import MergePlan
from dsm_tune.searching.search import Job, Search
from dsm_tune.searching.study import Evaluation

__all__ = ["Cluster", "run_search"]

RERUNS = 2  # of a job whose worker died
Evaluate = Callable[[MergePlan, int], Evaluation]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the jobs run.

    Attributes:
        address: of a running Ray cluster; ``None`` starts one here, for this search alone.
        workers: jobs at a time.
        gpus_per_worker: may be a fraction.
        trial_seconds: limit of one evaluation; a worker that exceeds it is ended.
    """

    address: str | None = None
    workers: int = 2
    gpus_per_worker: float = 0.0
    trial_seconds: float = 600.0


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """A Ray session: the given cluster, or a local one that ends with the block.

    Raises:
        ConfigError: if the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token to the home folder
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # the search ends itself, see _interrupts
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # leave CUDA_VISIBLE_DEVICES alone
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address is None:
        options.update(
            address="local",
            num_cpus=max(cluster.workers, 1),
            include_dashboard=False,
            object_store_memory=_store_bytes(),
        )
    else:
        options["address"] = cluster.address
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises many kinds: refused, timed out, another version
        where = cluster.address or "this machine"
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--ray-address must be a Ray cluster that answers: {where}: {line[:200]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _store_bytes() -> int:
    """Shared memory for images and weights: what half of /dev/shm gives, 4 GiB at most."""
    with contextlib.suppress(OSError):
        room = os.statvfs("/dev/shm")
        return max(128 << 20, min(4 << 30, room.f_bavail * room.f_frsize // 2))
    return 1 << 30


class Jobs(OptunaSearch):  # type: ignore[misc]  # Ray ships no types
    """Ray's Optuna searcher, asked in generations: hands out the jobs of a search.

    Ray's own version asks Optuna whenever a worker is free and tells it in the order in which
    workers finish; here both happen in :class:`~dsm_tune.searching.search.Search`.
    """

    def __init__(self, search: Search) -> None:
        super().__init__()
        self._ot_study = search.study.optuna_study
        self.search = search
        self.jobs: dict[str, Job] = {}
        self.deaths: dict[tuple[int, int], int] = {}
        self.failure: Exception | None = None  # Ray swallows what a searcher raises

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Accept what Ray tells of the experiment; the search has its own space."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next job as a Ray config, ``None`` to wait, or ``FINISHED``."""
        if self.search.finished:
            return Searcher.FINISHED
        job = self.search.next()
        if job is None:
            return Searcher.FINISHED if self.search.stopped else None
        self.jobs[trial_id] = job
        return {"number": job.number, "plan": job.plan.to_json(), "images": job.images}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Report what a job gave; run it again if its worker died."""
        job = self.jobs.pop(trial_id, None)
        if job is None:
            return
        try:
            if result and "evaluation" in result and not error:
                self.search.report(job, Evaluation(**json.loads(result["evaluation"])))
            else:
                self._run_again(job)
        except Exception as failure:
            self.failure = self.failure or failure
            self.search.stop("failed")

    def _run_again(self, job: Job) -> None:
        key = job.number, job.images
        self.deaths[key] = self.deaths.get(key, 0) + 1
        if self.deaths[key] <= RERUNS:
            self.search.give_back(job)
        else:
            cause = f"its worker died {self.deaths[key]} times"
            self.search.report(job, Evaluation(job.images, error=cause))

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: all that counts is in the study's storage."""
        Path(checkpoint_path).touch()


class Worker(tune.Trainable):  # type: ignore[misc]  # Ray ships no types
    """A warm process that evaluates one plan after the other."""

    def setup(
        self, config: dict[str, Any], make_evaluate: Any = None, trial_seconds: float = 600.0
    ) -> None:
        """Build the evaluator once."""
        self.job = config
        self.trial_seconds = trial_seconds
        self.evaluate: Evaluate = make_evaluate()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next job without a new process."""
        self.job = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Evaluate one plan; its own errors are a result."""
        images = self.job["images"]
        watchdog = threading.Timer(self.trial_seconds, _end_process)
        watchdog.daemon = True
        watchdog.start()
        start = time.monotonic()
        try:
            evaluation = self.evaluate(MergePlan.from_json(self.job["plan"]), images)
        except Exception as error:  # a trial's own failure must not end the search
            line = (str(error).strip().splitlines() or [""])[0][:300]
            evaluation = Evaluation(images, error=f"{type(error).__name__}: {line}")
        finally:
            watchdog.cancel()
        seconds = time.monotonic() - start
        timed = dataclasses.replace(evaluation, seconds=seconds)
        return {"evaluation": json.dumps(dataclasses.asdict(timed)), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""


def _end_process() -> None:
    os._exit(70)  # a forward that hangs cannot be interrupted from Python


@contextlib.contextmanager
def _interrupts(search: Search) -> Iterator[None]:
    """The first Ctrl-C lets running jobs finish, the second ends at once; both leave the study whole."""
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
    make_evaluate: Callable[[], Evaluate],
    cluster: Cluster,
    *,
    deadline: Callable[[], bool] = lambda: False,
) -> None:
    """Run a search to its end, or until it is stopped.

    Args:
        search: gives out jobs and takes results.
        make_evaluate: called once in each worker; pickled by Ray.
        cluster: where to run; a Ray session must be open (:func:`connected`).
        deadline: whether the time is up; asked whenever a job ends.
    """
    if search.finished:
        return

    class Deadline(tune.Callback):  # type: ignore[misc]  # Ray ships no types
        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if not search.stopped and deadline():
                search.stop("time limit reached")

    trainable = tune.with_parameters(
        Worker, make_evaluate=make_evaluate, trial_seconds=cluster.trial_seconds
    )
    resources: dict[str, float] = {"cpu": 1}
    if cluster.gpus_per_worker:
        resources["gpu"] = cluster.gpus_per_worker
    with tempfile.TemporaryDirectory(prefix="dsm-tune-") as folder, _interrupts(search):
        jobs = Jobs(search)
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=jobs,
                num_samples=-1,
                max_concurrent_trials=cluster.workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                callbacks=[Deadline()],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=0),
                log_to_file=False,
            ),
        )
        tuner.fit()
    if jobs.failure is not None:
        raise jobs.failure
