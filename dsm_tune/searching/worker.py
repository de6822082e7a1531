"""A warm Ray Tune process that evaluates one plan after the other.

Apart from the engine, so that a worker imports neither Optuna nor a database.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune

from dsm_tune.plan import MergePlan
from dsm_tune.results import Evaluation

__all__ = ["Evaluate", "Worker"]

Evaluate = Callable[[MergePlan, int], Evaluation]


class Worker(tune.Trainable):  # type: ignore[misc]  # Ray ships no types
    """A warm process that evaluates one plan after the other."""

    def setup(
        self, config: dict[str, Any], shared: Any = None, trial_seconds: float = 600.0
    ) -> None:
        """Take the first job; the evaluator is made with it, so that a failure is a result too.

        Args:
            config: the job.
            shared: reference to what makes the evaluator, in a list, which Ray does not unpack.
            trial_seconds: limit of one evaluation.
        """
        self.job = config
        self.trial_seconds = trial_seconds
        self.shared: list[Any] = shared
        self.evaluate: Evaluate | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next job without a new process."""
        self.job = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Evaluate one plan; its own errors are a result. Without a plan, get ready for one."""
        # A forward that hangs cannot be interrupted from Python and may hold the interpreter's
        # lock: a thread in C writes the traceback to the worker's log and ends the process.
        faulthandler.dump_traceback_later(self.trial_seconds, exit=True, file=2)
        try:
            return self._evaluate() if "plan" in self.job else self._warm_up()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _evaluate(self) -> dict[str, Any]:
        images, start = self.job["images"], time.monotonic()
        try:
            evaluate = self._evaluator()
            start = time.monotonic()
            evaluation = evaluate(MergePlan.from_json(self.job["plan"]), images)
        except Exception as error:  # a trial's own failure must not end the search
            line = (str(error).strip().splitlines() or [""])[0][:300]
            evaluation = Evaluation(images, error=f"{type(error).__name__}: {line}")
        timed = dataclasses.replace(evaluation, seconds=time.monotonic() - start)
        return {"evaluation": json.dumps(dataclasses.asdict(timed)), "done": True}

    def _warm_up(self) -> dict[str, Any]:
        with contextlib.suppress(Exception):  # the first plan will say so
            self._evaluator()
        time.sleep(0.05)  # asked again until all workers are there
        return {"done": False}

    def _evaluator(self) -> Evaluate:
        if self.evaluate is None:
            self.evaluate = ray.get(self.shared[0])()
        return self.evaluate

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""
