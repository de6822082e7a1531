"""A warm Ray Tune process that evaluates one plan after the other.

Apart from the engine, so that a worker imports neither Optuna nor a database.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from ray import tune

from dsm_tune.plan import MergePlan
from dsm_tune.results import Evaluation

__all__ = ["Evaluate", "Worker"]

Evaluate = Callable[[MergePlan, int], Evaluation]


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
