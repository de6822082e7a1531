"""Matching and merging on a CPU as one compiled loop, which several threads may run at once.

Each thread does as many images as the others. What becomes of an image does not depend on who does
it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from dsm_tune.merging.loops.joining import merge, weights
from dsm_tune.merging.loops.machine import integers, loop, share_of
from dsm_tune.merging.loops.matching import attention_received, match

__all__ = ["FACTORS", "GIVEN", "NORMS", "step"]

NORMS = {"free": 0, "mean": 1, "largest": 2}

# What the loop is given, in order, each of 8 bytes: these in float64, all others in int64.
FACTORS = ("size_penalty", "salience", "attention_weight", "scale")
GIVEN = (
    *("images", "tokens", "channels"),
    *("heads", "width", "to_image", "to_head", "to_token"),  # of the feature, and how far it is to
    *("key_heads", "key_width", "key_to_image", "key_to_head", "key_to_token"),  # the next one
    *("evens", "odds", "r", "prefix", "first_even", "first_odd"),
    *("window", "equal_quota", "norm", "centroid", *FACTORS),
    # Addresses, 0 for none; of what the last six name, it is filled in.
    *("feature", "query", "key", "log_size", "received", "x", "size", "place"),
    *("new_x", "new_size", "new_log_size", "new_place", "order", "destination"),
)


@loop(GIVEN, FACTORS)
def step(given: Any) -> None:
    """A merge step, as ``compiled_step.by_operators`` has it.

    A feature is [B, H, N, d], of any strides but that those of d stand side by side; so are keys
    and queries, which have the same strides, and of which the class token's alone are read. All
    else is float32 and contiguous but ``order`` [B, a] and ``destination`` [B, r], which are int64,
    those of ``matching.Choice``.

    Args:
        given: all of :data:`GIVEN`.
    """
    one = carray(given, 1)[0]
    partner = np.empty(one.evens, np.int64)
    first, last = share_of(one, one.images)
    for image in range(first, last):
        received = attention_received(image, one)
        ranked = match(image, one, received, partner)
        if one.order:
            order = carray(integers(one.order + 8 * image * one.evens), (one.evens,))
            destination = carray(integers(one.destination + 8 * image * one.r), (one.r,))
            for i in range(one.evens):
                order[i] = ranked[i]
            for i in range(one.r):
                destination[i] = partner[ranked[i]]
        merge(image, one, ranked, partner, weights(one, received))
