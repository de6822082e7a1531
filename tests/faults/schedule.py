"""Which faults come when: drawn from a seed, so that a failure can be had again."""

from __future__ import annotations

import dataclasses
import os
import random

SEED = "DSM_TUNE_FAULT_SEED"  # of the environment
BEFORE = 3  # evaluations are stored before the first fault


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault of a study.

    Attributes:
        kind: what happens.
        after: evaluations that are stored before it does, at least.
        dice: from 0 to 1: picks the victim.
    """

    kind: str
    after: int
    dice: float

    def __str__(self) -> str:
        return f"{self.kind} after {self.after}"


def chosen_seed() -> int:
    """The seed that was asked for, or another one each time."""
    given = os.environ.get(SEED)
    return random.SystemRandom().randrange(1 << 32) if given is None else int(given)


def draw_jumps(seed: int, count: int) -> dict[int, float]:
    """Draw jumps of a clock, back and forth by up to a month, by the reading at which they come.

    The readings lie so far apart that none hides another.
    """
    dice = random.Random(f"{seed} clock")
    jumps: dict[int, float] = {}
    reading = 0
    for index in range(count):
        reading += dice.randrange(12, 20)
        jumps[reading] = dice.choice([-1, 1]) * dice.uniform(3600, 30 * 86_400) + index
    return jumps


def draw(seed: int, study: str, kinds: dict[str, int], evaluations: int) -> list[Fault]:
    """Draw the faults of a study in the order in which they come.

    Args:
        seed: of all studies.
        study: its name.
        kinds: how many of each.
        evaluations: of the undisturbed study; the last faults come in time before its end.
    """
    dice = random.Random(f"{seed} {study}")
    names = [kind for kind, count in kinds.items() for _ in range(count)]
    dice.shuffle(names)
    times = sorted(dice.sample(range(BEFORE, evaluations // 2), len(names)))
    return [Fault(kind, after, dice.random()) for kind, after in zip(names, times, strict=True)]
