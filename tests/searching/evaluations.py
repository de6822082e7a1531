"""Made-up evaluations, good and bad, as a worker process imports them."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dsm_tune.plan import MergePlan
from dsm_tune.results import Evaluation

IMAGES = 40  # all there are
Evaluate = Callable[[MergePlan, int], Evaluation]


def evaluate(plan: MergePlan, images: int) -> Evaluation:
    """Grows with what leaves early, with a scatter that is the plan's own and noise by images."""
    early = sum(r * (5 - block) for block, r in enumerate(plan.removed))
    scatter = random.Random(f"{plan.digest} {images}").uniform(0.8, 1.2 if images < IMAGES else 1.0)
    rounding = 0.0 if plan.last_block == "all" else 1e-14  # what is lossless is so but for this
    divergence = 1e-3 * early**1.5 * scatter + rounding
    return Evaluation(images, divergence, math.exp(-divergence))


def make(folder: Path, faults: dict[str, str], seconds: float = 0.0) -> Evaluate:
    """What evaluates in a worker; ``faults`` says by digest what goes wrong.

    Every call leaves a file in ``folder``: digest, images, process, and a number.
    """

    def evaluate_or_fail(plan: MergePlan, images: int) -> Evaluation:
        name = f"{plan.digest}-{images}"
        calls = len(list(folder.glob(f"{name}-*")))
        (folder / f"{name}-{os.getpid()}-{calls}").touch()
        time.sleep(seconds)
        fault = faults.get(plan.digest, "")
        if fault == "error":
            raise RuntimeError("it went wrong\nin several lines")
        if fault == "memory":
            raise MemoryError
        if fault == "hangs":
            time.sleep(3600)
        if fault == "killed" or (fault == "killed once" and not calls):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "dies afterwards":
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return evaluate(plan, images)

    return evaluate_or_fail


def make_nothing() -> Evaluate:
    """An evaluator that cannot be made."""
    raise OSError("no such model here")


def ask(evaluate: Evaluate, plan: MergePlan, images: int) -> Evaluation:
    """What the members of these crews have made is a function."""
    return evaluate(plan, images)
