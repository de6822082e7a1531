"""Matching and merging on a CPU as one compiled loop, which several threads may run at once.

Each thread finds as many edges as the others, of images that are next to each other, and then fills
in as many tokens; so threads share single images too. What becomes of a token does not depend on
who does it.
"""

from __future__ import annotations

from typing import Any

from numba import carray  # type: ignore[attr-defined]

from dsm_tune.merging.loops.joining import merge
from dsm_tune.merging.loops.lanes import ROWS
from dsm_tune.merging.loops.machine import (
    integers,
    loop,
    of_image,
    part,
    share_of,
    wait_for_all,
)
from dsm_tune.merging.loops.matching import attention_received, match, partners, rank

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
    # Addresses, 0 for none; of what is filled in: with a query also "received".
    *("feature", "second", "query", "key", "log_size", "received", "x", "size", "place"),
    *("partner", "badness"),  # from here on
    *("new_x", "new_size", "new_log_size", "new_place", "order", "destination"),
)


@part
def _hand_out(image: Any, given: Any, ranked: Any) -> None:
    """Fill in who leaves an image for whom, if it is asked for."""
    if not given.order:
        return
    order = carray(integers(given.order + 8 * image * given.evens), (given.evens,))
    destination = carray(integers(given.destination + 8 * image * given.r), (given.r,))
    partner = partners(image, given)
    for i in range(given.evens):
        order[i] = ranked[i]
    for i in range(given.r):
        destination[i] = partner[ranked[i]]


@loop(GIVEN, FACTORS)
def step(given: Any) -> None:
    """A merge step, as ``compiled_step.by_operators`` has it.

    A feature is [B, H, N, d], of any strides but that those of d stand side by side; so is the
    second, if there are two, which has the same; so are keys and queries, which have the same too,
    and of which the class token's alone are read. All else is float32 and contiguous but
    ``partner`` [B, a], ``order`` [B, a] and ``destination`` [B, r], which are int64, the latter two
    those of ``matching.Choice``.

    Args:
        given: all of :data:`GIVEN`.
    """
    one = carray(given, 1)[0]
    groups = -(one.evens // -ROWS)
    at, end = share_of(one, one.images * groups)
    while at < end:
        image, first = at // groups, at % groups
        last = min(groups, first + end - at)
        received = attention_received(image, one)
        if first == 0 and one.query:
            own = of_image(image, one.received, (one.tokens,))
            for n in range(one.tokens):
                own[n] = received[n]
        match(image, one, first * ROWS, min(last * ROWS, one.evens), received)
        at += last - first
    wait_for_all(one)
    left = one.tokens - one.r
    at, end = share_of(one, one.images * left)
    while at < end:
        image, first = at // left, at % left
        last, ranked = min(left, first + end - at), rank(image, one)
        if first == 0:
            _hand_out(image, one, ranked)
        merge(image, one, ranked, first, last)
        at += last - first
