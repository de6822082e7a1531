"""Which tokens of an image join which, in a compiled loop.

It does exactly what the tensor functions do that it names, which are its oracle in the tests; sums
may differ by rounding. Letters in shapes are those of :mod:`~dsm_tune.merging.matching`; what is
``given`` is told by :data:`.step.GIVEN`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]

from dsm_tune.merging.loops.lanes import LANES, ROWS, products
from dsm_tune.merging.loops.machine import (
    WIDE,
    address_of,
    exact,
    floats,
    integers,
    length,
    of_image,
    part,
    product,
)
from dsm_tune.merging.matching import PLACE_TOLERANCE

__all__ = ["attention_received", "match", "partners", "rank"]

TOLERANCE, LOWEST = np.float32(PLACE_TOLERANCE), np.float32(-np.inf)


@part
def _heads_of(
    image: Any, address: Any, heads: Any, tokens: Any, width: Any,
    to_image: Any, to_head: Any, to_token: Any,
) -> Any:  # fmt: skip
    """The memory in which the rows of d of an image are, of [B, H, N, d] at an address."""
    last = (heads - 1) * to_head + (tokens - 1) * to_token + width
    return carray(floats(address + 4 * image * to_image), (last,))


@part
def _unit_mean(memory: Any, at: Any, to_head: Any, heads: Any, unit: Any) -> None:
    """As ``matching.unit`` of the mean over heads, of one token: fill in [d]."""
    width = unit.shape[0]
    first = memory[at : at + width]
    for c in range(width):
        unit[c] = first[c]
    for h in range(1, heads):
        row = memory[at + h * to_head : at + h * to_head + width]
        for c in range(width):
            unit[c] += row[c]
    scale = np.float32(1.0) / max(length(unit), np.float32(1e-6) * np.float32(heads))
    for c in range(width):
        unit[c] *= scale


@part
def _unit_row(feature: Any, second: Any, token: Any, given: Any, unit: Any) -> None:
    """What a token of an image is compared by: fill in [d], or [2d] for two features."""
    width, at = given.width, token * given.to_token
    _unit_mean(feature, at, given.to_head, given.heads, unit[:width])
    if given.second:
        _unit_mean(second, at, given.to_head, given.heads, unit[width:])
        scale = np.float32(1.0) / max(length(unit), np.float32(1e-6))
        for c in range(unit.shape[0]):
            unit[c] *= scale


@part
def _odd_columns(feature: Any, second: Any, given: Any) -> Any:
    """Of the odd tokens, as columns [d, b], with zeros behind them for whole LANES; or [2d, b]."""
    deep, odds = given.width * (2 if given.second else 1), given.odds
    columns = np.zeros((deep, -(odds // -LANES) * LANES), np.float32)
    one = np.empty(deep, np.float32)
    for b in range(odds):
        _unit_row(feature, second, given.first_odd + 2 * b, given, one)
        for d in range(deep):
            columns[d, b] = one[d]
    return columns


@exact
def _products(rows: Any, columns: Any, found: Any) -> None:
    """Fill in the products [ROWS, b] of rows [ROWS, d] with columns [d, b]; b in whole LANES."""
    deep, wide = columns.shape
    for b in range(0, wide, LANES):
        products(
            address_of(rows), 4 * deep, 4, address_of(columns) + 4 * b, 4 * wide, deep,
            address_of(found) + 4 * b, 4 * wide,
        )  # fmt: skip


@njit(nogil=True, fastmath={*WIDE, "nnan"})
def _largest(row: Any) -> Any:
    """The largest of [b], and the first place where it stands."""
    best, odds = row[0], row.shape[0]
    for b in range(1, odds):
        best = max(best, row[b])
    at = odds
    for b in range(odds):
        at = min(at, b if row[b] == best else odds)
    return best, at


@exact
def _rounded(one: Any, other: Any) -> Any:
    """A product, rounded before it is added to anything: numbers tie as in the tensor functions."""
    return one * other


@njit(nogil=True, fastmath={*WIDE, "nnan"})
def _largest_inside(row: Any, tile: Any, tiles: Any) -> Any:
    """The largest of [b] within a tile, and the first place where it stands, or -1."""
    best, odds = LOWEST, row.shape[0]
    for b in range(odds):
        best = max(best, row[b] if tiles[b] == tile else LOWEST)
    at = odds
    for b in range(odds):
        at = min(at, b if tiles[b] == tile and row[b] == best else odds)
    return best, at if at < odds else -1


@part
def _in_rounds(ranked: Any, partner: Any, tiles: Any, odd_tiles: Any, equal_quota: Any) -> Any:
    """Edges [a] in rounds of one per tile, or as they are; those that cross tiles last."""
    evens = ranked.shape[0]
    turn, turned, at = np.zeros(evens, np.int64), np.empty(evens, np.int64), 0
    crosses = np.empty(evens, np.bool_)
    for a in range(evens):
        crosses[a] = tiles[a] != odd_tiles[partner[a]]
    for i in range(evens):
        a = ranked[i]
        if crosses[a]:
            turn[i] = evens
        elif equal_quota:
            for j in range(i):
                other = ranked[j]
                turn[i] += tiles[other] == tiles[a] and not crosses[other]
    this = 0
    while at < evens:
        for i in range(evens):
            if turn[i] == this:
                turned[at] = ranked[i]
                at += 1
        this += 1
    return turned


@part
def attention_received(image: Any, given: Any) -> Any:
    """As ``scores.attention_to`` of an image, [N]; none if none is asked for."""
    count, width = given.tokens, given.key_width
    if not given.query:
        return of_image(image, given.received, (count,))
    received, logits = np.zeros(count, np.float32), np.empty(count, np.float32)
    log_size, scale = of_image(image, given.log_size, (count,)), np.float32(given.scale)
    heads, to_head, to_token = given.key_heads, given.key_to_head, given.key_to_token
    sides = heads, count, width, given.key_to_image, to_head, to_token
    queries = _heads_of(image, given.query, *sides)
    keys = _heads_of(image, given.key, *sides)
    for h in range(heads):
        start = h * to_head
        query = queries[start : start + width]  # of the class token, which is the first
        for n in range(count):
            at = start + n * to_token
            logits[n] = product(query, keys[at : at + width]) * scale
            logits[n] += log_size[n] if log_size.shape[0] else np.float32(0.0)
        largest, total = logits[0], np.float32(0.0)
        for n in range(count):
            largest = max(largest, logits[n])
        for n in range(count):
            logits[n] = np.exp(logits[n] - largest)
            total += logits[n]
        total *= np.float32(heads)
        for n in range(count):
            received[n] += logits[n] / total
    return received


@part
def _penalties(size: Any, beta: Any, first: Any, odds: Any) -> Any:
    """As ``scores.size_penalty``, negated, of each size that there is with each odd token.

    Returns:
        Which of the sizes each token has, [N], and the table, [m, b].
    """
    kind, known = np.empty(size.shape[0], np.int64), np.empty(size.shape[0], np.float32)
    several = 0
    for n in range(size.shape[0]):
        inverse, at = np.float32(1.0) / size[n], 0
        while at < several and known[at] != inverse:
            at += 1
        known[at], kind[n] = inverse, at
        several = max(several, at + 1)
    pairs, table = np.empty(several, np.float32), np.empty((several, odds), np.float32)
    for i in range(several):
        for j in range(several):
            pairs[j] = beta * np.log(known[i] + known[j])
        row = table[i]
        for b in range(odds):
            row[b] = pairs[kind[first + 2 * b]]
    return kind, table


@part
def _tiles(place: Any, window: Any, first: Any, several: Any) -> Any:
    """As ``matching.tile``, of every second token from one on; none without places."""
    tiles = np.empty(several if place.shape[0] and window else 0, np.float32)
    side = np.float32(window)
    for i in range(tiles.shape[0]):
        row, column = place[first + 2 * i, 0], place[first + 2 * i, 1]
        row, column = np.floor((row + TOLERANCE) / side), np.floor((column + TOLERANCE) / side)
        tiles[i] = row * np.float32(4096.0) + column
    return tiles


@part
def _tiles_of(image: Any, given: Any) -> Any:
    """Of an image's even tokens, [a], and of its odd ones, [b]; none without a window."""
    place = of_image(image, given.place, (given.tokens, 2))
    return (
        _tiles(place, given.window, given.first_even, given.evens),
        _tiles(place, given.window, given.first_odd, given.odds),
    )


@part
def partners(image: Any, given: Any) -> Any:
    """Of an image's even tokens, [a]: the odd ones that they merge into best."""
    return carray(integers(given.partner + 8 * image * given.evens), (given.evens,))


@part
def match(image: Any, given: Any, first: Any, last: Any, received: Any) -> None:
    """Fill in the best edges of an image's even tokens from one on: partners, and how bad."""
    count, evens, odds = given.tokens, given.evens, given.odds
    sides = given.heads, count, given.width, given.to_image, given.to_head, given.to_token
    feature, second = (
        _heads_of(image, given.feature, *sides),
        _heads_of(image, given.second, *sides),
    )
    partner, badness = partners(image, given), of_image(image, given.badness, (evens,))
    even_tiles, odd_tiles = _tiles_of(image, given)
    size, beta = of_image(image, given.size, (count,)), np.float32(given.size_penalty)
    kind, penalties = _penalties(size if beta else size[:0], beta, given.first_odd, odds)
    columns = _odd_columns(feature, second, given)
    rows = np.zeros((ROWS, columns.shape[0]), np.float32)
    found = np.empty((ROWS, columns.shape[1]), np.float32)
    times = np.float32(given.salience * count)
    for a in range(first, last):
        if (a - first) % ROWS == 0:
            for i in range(min(ROWS, last - a)):
                _unit_row(feature, second, given.first_even + 2 * (a + i), given, rows[i])
            _products(rows, columns, found)
        scores, token = found[(a - first) % ROWS, :odds], given.first_even + 2 * a
        if kind.shape[0]:
            penalty = penalties[kind[token]]
            for b in range(odds):
                scores[b] += penalty[b]
        for b in range(odds):  # a number that is none is the least one
            scores[b] = scores[b] if scores[b] == scores[b] else LOWEST
        best, at = np.float32(0.0), -1
        if even_tiles.shape[0]:
            best, at = _largest_inside(scores, even_tiles[a], odd_tiles)
        if at < 0:
            best, at = _largest(scores)
        partner[a], badness[a] = at, -best
        if received.shape[0] and times:
            badness[a] += _rounded(times, received[token])


@part
def rank(image: Any, given: Any) -> Any:
    """An image's even tokens, [a], by the edges that were found, the best first."""
    badness = of_image(image, given.badness, (given.evens,))
    ranked = np.argsort(badness, kind="mergesort")  # stable
    even_tiles, odd_tiles = _tiles_of(image, given)
    if not even_tiles.shape[0]:
        return ranked
    return _in_rounds(ranked, partners(image, given), even_tiles, odd_tiles, given.equal_quota)
