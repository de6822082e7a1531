"""Elapsed time by a clock that may jump: set anew, or stopped with its machine."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up the steps of a clock between readings; a jump is no time.

    A step back counts nothing, and a step forward no more than so much.

    Args:
        clock: returns seconds.
        longest: that may lie between two readings; a longer step is a jump of the clock.

    Attributes:
        jumps: how many were seen.
    """

    def __init__(self, clock: Callable[[], float], *, longest: float = math.inf) -> None:
        self._clock, self._longest = clock, longest
        self._elapsed, self._last = 0.0, clock()
        self.jumps = 0

    def seconds(self) -> float:
        """Seconds since it was made; never less than at the last reading."""
        now = self._clock()
        step = now - self._last
        self.jumps += not 0 <= step <= self._longest
        self._elapsed += min(max(step, 0.0), self._longest)
        self._last = now
        return self._elapsed
