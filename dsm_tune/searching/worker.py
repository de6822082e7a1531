"""The processes of a search: members of a crew do the work, Ray Tune's workers hand it to them.

Apart from the engine, so that neither imports Optuna or a database; a worker does not even import
what the work needs.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.exceptions import ActorUnavailableError, RayActorError

from dsm_tune.plan import MergePlan
from dsm_tune.results import Evaluation

__all__ = ["Evaluate", "Member", "Worker", "wait_for"]

Evaluate = Callable[[Any, MergePlan, int], Evaluation]
RESTART_SECONDS = 120.0  # that a member may take to be there again


class Member:
    """Keeps what it has made between calls; Ray starts it anew if its process dies.

    What it is to make comes with each call, as a reference in a list, which Ray does not unpack:
    it is called once, by the first.
    """

    def __init__(self) -> None:
        self._made: list[Any] = []

    def home(self) -> str:
        """Id of the node that it is on."""
        return str(ray.get_runtime_context().get_node_id())

    def call(self, make: list[Any], function: Callable[[Any, Any], Any], item: Any) -> Any:
        """Call ``function(made, item)``."""
        return function(self._get_made(make), item)

    def evaluate(
        self, make: list[Any], evaluate: list[Any], job: dict[str, Any], trial_seconds: float
    ) -> str:
        """Evaluate one plan; its own errors are a result too.

        Args:
            make: reference to what makes the first argument of ``evaluate``.
            evaluate: reference to an :data:`Evaluate`.
            job: ``plan`` as JSON, and how many ``images``.
            trial_seconds: limit; a process that exceeds it is ended.

        Returns:
            The fields of an :class:`Evaluation` as JSON.
        """
        # A forward that hangs cannot be interrupted from Python and may hold the interpreter's
        # lock: a thread in C writes the traceback to the worker's log and ends the process.
        faulthandler.dump_traceback_later(trial_seconds, exit=True, file=2)
        images, start = job["images"], time.monotonic()
        try:
            made, function = self._get_made(make), ray.get(evaluate[0])
            start = time.monotonic()
            evaluation = function(made, MergePlan.from_json(job["plan"]), images)
        except Exception as error:  # a trial's own failure must not end the search
            line = (str(error).strip().splitlines() or [""])[0][:300]
            evaluation = Evaluation(images, error=f"{type(error).__name__}: {line}")
        finally:
            faulthandler.cancel_dump_traceback_later()
        timed = dataclasses.replace(evaluation, seconds=time.monotonic() - start)
        return json.dumps(dataclasses.asdict(timed))

    def _get_made(self, make: list[Any]) -> Any:
        if not self._made:
            self._made.append(ray.get(make[0])())
        return self._made[0]


def wait_for(member: Any, seconds: float = RESTART_SECONDS) -> None:
    """Wait for a member of a crew whose process is being started anew.

    Ray refuses what such a member is asked, with the error of one that has died meanwhile: what
    has not begun would count as what has failed.

    Raises:
        RayActorError: if it is dead, or not there in time.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            ray.get(member.home.remote())
            return
        except ActorUnavailableError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


class Worker(tune.Trainable):  # type: ignore[misc]  # Ray ships no types
    """Hands one job after the other to the member of the crew that the job names."""

    def setup(
        self,
        config: dict[str, Any],
        shared: Any = None,
        trial_seconds: float = 600.0,
    ) -> None:
        """Take the first job.

        Args:
            config: the job.
            shared: what each member of the crew is to make, and the :data:`Evaluate`, as
                references in lists.
            trial_seconds: limit of one evaluation.
        """
        self.job = config
        self.members: dict[str, Any] = {}  # by name
        self.shared: tuple[list[Any], list[Any]] = shared
        self.trial_seconds = trial_seconds

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next job without a new process."""
        self.job = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Have one plan evaluated; without a plan, wait until all workers are there."""
        if "plan" not in self.job:
            time.sleep(0.05)
            return {"done": False}
        name = self.job["member"]
        try:
            if name not in self.members:
                self.members[name] = ray.get_actor(name)
            wait_for(self.members[name])
            asked = self.members[name].evaluate.remote(*self.shared, self.job, self.trial_seconds)
            found = ray.get(asked)
        except (RayActorError, ValueError):  # the latter for a name that is no more
            return {"died": True, "done": True}
        return {"evaluation": found, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""
