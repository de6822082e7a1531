"""Tunes the demo by a clock that jumps; a program: ``jumping.py STORAGE TRIALS SEED JUMP...``.

A jump is ``READING:SECONDS``: at this reading of the clock since the search began, by so much.
Prints how many there were.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import dsm_tune
from dsm_tune.tuning import tune

TIMEOUT = 1500.0  # no run comes near it, but for a clock that is believed when it jumps


class Jumping:
    """Listener and clock: jumps when the search has begun."""

    def __init__(self, jumps: dict[int, float]) -> None:
        self.jumps = jumps
        self.readings: int | None = None
        self.offset, self.made = 0.0, 0

    def say(self, text: str) -> None:
        if text.startswith("searching"):
            self.readings = 0

    def progress(self, progress: Any) -> None: ...

    def __call__(self) -> float:
        if self.readings is not None:
            self.readings += 1
            jump = self.jumps.get(self.readings, 0.0)
            self.offset += jump
            self.made += jump != 0
        return time.monotonic() + self.offset


def main() -> None:
    storage, trials, seed, *jumps = sys.argv[1:]
    pairs = (jump.split(":") for jump in jumps)
    clock = Jumping({int(reading): float(seconds) for reading, seconds in pairs})
    config = dsm_tune.TuneConfig(
        budget_gflops="60%",
        trials=int(trials),
        seed=int(seed),
        workers=2,
        study="faulty",
        storage=storage,
        timeout=TIMEOUT,
    )
    tune(config, listener=clock, clock=clock)
    print(clock.made)


if __name__ == "__main__":
    main()
