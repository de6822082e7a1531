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
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.util import ActorPool

from dsm_tune.errors import ConfigError
from dsm_tune.results import Evaluation
from dsm_tune.searching.search import Job, Search
from dsm_tune.searching.worker import Evaluate, Member, Worker

__all__ = ["Cluster", "Crew", "connected", "most_cpus", "run_alone", "run_search"]

RERUNS = 2  # of a job whose process died
WARM_UP_SECONDS = 30.0  # that the first worker waits for the last


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
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial is in the study
    if cluster.address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token at home
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # the search ends itself, see _interrupts
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # leave CUDA_VISIBLE_DEVICES alone
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 spoils every timing
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
        _answers(cluster.address)
        ray.init(**options)
    except Exception as error:  # Ray raises many kinds: refused, timed out, another version
        where = cluster.address or "this machine"
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--ray-address must be a Ray cluster that answers: {where}: {line[:200]}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _answers(address: str | None) -> None:
    """Raise if nothing listens at ``host:port``: Ray itself would try for many minutes."""
    host, separator, port = (address or "").split("://")[-1].rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()


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

    def __init__(self, search: Search, cluster: Cluster) -> None:
        super().__init__()
        self._ot_study = search.study.optuna_study
        self.search = search
        self.cluster = cluster
        self.jobs: dict[str, tuple[Job, int]] = {}  # and the member of the crew that does it
        self.idle = deque(range(cluster.workers))
        self.starts: dict[str, float] = {}
        self.deaths: dict[tuple[int, int], int] = {}
        self.false_starts = 0  # workers that died before their first job, in a row
        self.to_warm = cluster.workers if cluster.workers > 1 else 0
        self.all_warm = False
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
        if self.to_warm:
            self.to_warm -= 1
            return {}
        job = self.search.next()
        if job is None:
            return Searcher.FINISHED if self.search.stopped else None
        member = self.idle.popleft()
        self.jobs[trial_id] = job, member
        return {"member": member, "plan": job.plan.to_json(), "images": job.images}

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
        try:
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
        except Exception as failure:
            self.failure = self.failure or failure
            self.search.stop("failed")

    def _not_started(self, job: Job) -> None:
        self.search.give_back(job)
        self.false_starts += 1
        if self.false_starts > RERUNS * self.cluster.workers:
            raise ConfigError(
                f"{self.false_starts} workers in a row have died before their first trial; each "
                "needs this version of dsm-tune, of Python and of Ray, and memory for the model"
            )

    def _run_again(self, job: Job) -> None:
        key = job.number, job.images
        self.deaths[key] = self.deaths.get(key, 0) + 1
        if self.deaths[key] <= RERUNS:
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
    """Notes when a job starts, and ends a search when its time is up."""

    def __init__(self, jobs: Jobs, is_over: Callable[[], bool]) -> None:
        self.jobs, self.is_over = jobs, is_over

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.jobs.starts[trial.trial_id] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if not self.jobs.search.stopped and self.is_over():
            self.jobs.search.stop("time limit reached")

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
    trainable = tune.with_parameters(
        Worker,
        members=crew.members(),
        shared=(crew.make, [ray.put(evaluate)]),
        trial_seconds=cluster.trial_seconds,
    )
    with tempfile.TemporaryDirectory(prefix="dsm-tune-") as folder, _interrupts(search):
        jobs = Jobs(search, cluster)
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


def run_alone(function: Callable[..., Any], *arguments: Any, cpus: int, gpus: float = 0.0) -> Any:
    """Call a function in a fresh process, with no trial running beside it; returns its result."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    alone = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1)(call)
    return ray.get(alone.remote(*arguments))


def most_cpus() -> int:
    """CPUs of the node of the cluster that has most; at least 1."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max([1, *(int(resources.get("CPU", 0)) for resources in nodes)])


class Crew:
    """Processes that keep what they have made between calls, in trials and beside them.

    Args:
        make: called once in each process; pickled by Ray.
        cluster: how many processes, and their share of a GPU.
    """

    def __init__(self, make: Callable[[], Any], cluster: Cluster) -> None:
        self.cluster = cluster
        self.make = [ray.put(make)]  # a list, which Ray does not unpack
        self._members: list[Any] = []

    def members(self) -> list[Any]:
        """Handles of the processes; they are started at the first call."""
        if not self._members:
            # No CPU is reserved: Ray Tune's workers reserve them, and wait meanwhile.
            member = ray.remote(
                num_cpus=0,
                num_gpus=self.cluster.gpus_per_worker,
                max_restarts=-1,
                scheduling_strategy="SPREAD",
            )(Member)
            self._members = [member.remote() for _ in range(self.cluster.workers)]
        return self._members

    def map(self, function: Callable[[Any, Any], Any], items: Sequence[Any]) -> list[Any]:
        """Call ``function(made, item)`` for each item; results in order."""
        pool = ActorPool(self.members())
        return list(
            pool.map(lambda actor, item: actor.call.remote(self.make, function, item), items)
        )

    def rest(self) -> None:
        """End the processes, and with them their hold on GPUs; the next call starts them anew."""
        for member in self._members:
            ray.kill(member)
        self._members = []
