"""A step that costs no more than it must: tokens are cut off, as a compiled loop."""

from __future__ import annotations

from typing import Any

from numba import carray  # type: ignore[attr-defined]

from dsm_tune.merging.loops.machine import loop, of_image, share_of
from dsm_tune.merging.loops.step import FACTORS, GIVEN

__all__ = ["cut"]


@loop(GIVEN, FACTORS)
def cut(given: Any) -> None:
    """Keep the first N - r tokens of each image; what else a step fills in stays as it is.

    Args:
        given: as of ``loops.step.step``.
    """
    one = carray(given, 1)[0]
    left = one.tokens - one.r
    at, end = share_of(one, one.images * left)
    while at < end:
        image, first = at // left, at % left
        last = min(left, first + end - at)
        x = of_image(image, one.x, (one.tokens, one.channels))
        new = of_image(image, one.new_x, (left, one.channels))
        for i in range(first, last):
            into, row = new[i], x[i]
            for c in range(one.channels):
                into[c] = row[c]
        at += last - first
