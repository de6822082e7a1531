"""Attention on a CPU as one compiled loop, which several threads may run at once.

A thread does some queries of a head at a time, as many as registers take side by side, and what is
between them stays in the first caches: products with all keys, their softmax, products with all
values. What becomes of a query does not depend on who does it, nor on which others it is done with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from dsm_tune.merging.loops.lanes import LANES, ROWS, exponentials, products
from dsm_tune.merging.loops.machine import address_of, exact, loop, part, rows_of, share_of

__all__ = ["GIVEN", "LEAST_SIDE", "attend", "attend_share"]

LEAST_SIDE = ROWS  # keys that there must be, and numbers of a head

# What the loop is given, in order: the scale in float64, all else in int64.
GIVEN = (
    *("images", "heads", "queries", "keys", "width"),
    *("query", "query_to_image", "query_to_head", "query_to_token"),  # address of the first number,
    *("key", "key_to_image", "key_to_head", "key_to_token"),  # and bytes to the next image, head
    *("value", "value_to_image", "value_to_head", "value_to_token"),  # and token
    *("bias", "scale", "result"),  # addresses of [B, N], or 0, and of what is filled in
)


@part
def _as_columns(query: Any, given: Any, several: Any, columns: Any) -> None:
    """Fill in some queries, scaled, from an address on: [d, LANES]."""
    to_next, width, scale = given.query_to_token // 4, given.width, np.float32(given.scale)
    rows = rows_of(query, several, to_next, width)
    for i in range(several):
        row = rows[i * to_next : i * to_next + width]
        for d in range(width):
            columns[d, i] = row[d] * scale


@part
def _as_rows(columns: Any, sums: Any, given: Any, several: Any, result: Any) -> None:
    """Write some tokens' d numbers of a head from an address on: columns, each by its sum."""
    width, to_next = given.width, given.heads * given.width
    rows = rows_of(result, several, to_next, width)
    for i in range(several):
        row, share = rows[i * to_next : i * to_next + width], np.float32(1.0) / sums[i]
        for d in range(width):
            row[d] = columns[d, i] * share


@exact
def _head(given: Any, image: Any, head: Any, first: Any, last: Any, buffers: Any) -> None:
    """What becomes of some queries of a head."""
    columns, logits, sums, mixed, none = buffers
    keys, width, side_by_side = given.keys, given.width, 4 * LANES
    query = given.query + image * given.query_to_image + head * given.query_to_head
    key = given.key + image * given.key_to_image + head * given.key_to_head
    value = given.value + image * given.value_to_image + head * given.value_to_head
    bias = given.bias + 4 * image * keys if given.bias else address_of(none)
    to_token = 4 * given.heads * width
    result = given.result + image * given.queries * to_token + 4 * head * width
    for token in range(first, last, LANES):
        several = min(LANES, last - token)
        _as_columns(query + token * given.query_to_token, given, several, columns)
        for start in range(0, keys, ROWS):
            row = min(start, keys - ROWS)  # the last ones may be done once more
            products(
                key + row * given.key_to_token, given.key_to_token, 4,
                address_of(columns), side_by_side, width,
                address_of(logits) + row * side_by_side, side_by_side,
            )  # fmt: skip
        exponentials(address_of(logits), bias, keys, address_of(sums))
        for start in range(0, width, ROWS):
            d = min(start, width - ROWS)
            products(
                value + 4 * d, 4, given.value_to_token,
                address_of(logits), side_by_side, keys,
                address_of(mixed) + d * side_by_side, side_by_side,
            )  # fmt: skip
        _as_rows(mixed, sums, given, several, result + token * to_token)


@part
def attend_share(given: Any) -> None:
    """A thread's share of :func:`attend`."""
    buffers = (
        np.zeros((given.width, LANES), np.float32),
        np.empty((given.keys, LANES), np.float32),
        np.empty(LANES, np.float32),
        np.empty((given.width, LANES), np.float32),
        np.zeros(given.keys, np.float32),
    )
    first, last = share_of(given, given.images * given.heads * given.queries)
    while first < last:
        which, start = first // given.queries, first % given.queries
        end = min(given.queries, start + last - first)
        _head(given, which // given.heads, which % given.heads, start, end, buffers)
        first += end - start


@loop(GIVEN, ("scale",))
def attend(given: Any) -> None:
    """``softmax(q · kᵀ · scale + bias) · v``, for each image and head: [B, n, H · d].

    Queries [B, H, n, d] and keys and values [B, H, N, d] are float32, of any strides but that the
    numbers of d stand side by side; N and d are at least :data:`LEAST_SIDE`.

    Args:
        given: all of :data:`GIVEN`.
    """
    attend_share(carray(given, 1)[0])
