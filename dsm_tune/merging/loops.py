"""Matching and merging on a CPU as one compiled loop, which several threads may run at once.

It does exactly what the tensor functions do that it names, which are its oracle in the tests; sums
may differ by rounding. Threads share one record of numbers, the first of which counts the images
that were taken; what becomes of an image does not depend on who takes it. An array of no elements
stands for ``None``. numba keeps the machine code beside this file, or in the user's cache folder,
so that it is made once per machine.

Letters in shapes are those of :mod:`~dsm_tune.merging.matching`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

__all__ = ["GIVEN", "NORMS", "step"]

NORMS = {"free": 0, "mean": 1, "largest": 2}
FOUR, REGISTER = 4, 16  # even tokens multiplied at once; float32 numbers in the widest register
WIDE = {"contract", "reassoc", "nsz"}  # what lets sums use wide registers
part = njit(nogil=True, fastmath=WIDE)  # of the loop; compiled with it

# What the loop is given, in order, each as int64; what follows `feature` is an address, 0 for none.
GIVEN = (
    *("taken", "images", "tokens", "channels", "heads", "width"),
    *("to_image", "to_head", "to_token"),  # from a number of the feature to the same one there
    *("evens", "odds", "r", "prefix", "first_even", "first_odd"),
    *("equal_quota", "norm", "centroid"),
    *("feature", "penalty", "bonus", "even_tiles", "odd_tiles", "x", "size", "place", "weight"),
    *("new_x", "new_size", "new_place", "order", "destination"),  # filled in
)
NUMBERS: Any = types.CPointer  # of a kind
RECORD = types.Record.make_c_struct([(name, types.int64) for name in GIVEN])


def _compiled(function: Callable[[Any], None]) -> Any:
    """Compile what threads call; keep the code, if there is a place to."""
    compiled = functools.partial(cfunc, types.void(NUMBERS(RECORD)), fastmath=WIDE)
    try:
        return compiled(cache=True)(function)
    except (OSError, RuntimeError):  # a full disk; numba's, where no folder can be written
        return compiled()(function)


@intrinsic
def _take_image(typing: Any, given: Any) -> Any:
    """The number of an image that nobody has taken, from 0."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        counter = builder.bitcast(given[0], context.get_value_type(NUMBERS(types.int64)))
        return builder.atomic_rmw("add", counter, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(given), code


_next_image: Any = _take_image


def _at(kind: Any) -> Any:
    """Of an address, a pointer to numbers of a kind."""

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

        return NUMBERS(kind)(types.int64), code

    return pointer


_floats, _integers = _at(types.float32), _at(types.int64)


@part
def _of(image: Any, address: Any, shape: Any) -> Any:
    """The float32 numbers of an image, of as many for each at an address; none at 0."""
    several = 4 * image
    for size in shape:
        several *= size
    return carray(_floats(address + several), shape if address else (0, *shape[1:]))


@part
def _length(row: Any) -> Any:
    total = np.float32(0.0)
    for c in range(row.shape[0]):
        total += row[c] * row[c]
    return np.sqrt(total)


@part
def _unit_mean(memory: Any, at: Any, to_head: Any, heads: Any, unit: Any) -> None:
    """As ``matching.unit`` of the mean over heads, of one token: fill in [d]."""
    width = unit.shape[0]
    unit[:] = 0.0
    for h in range(heads):
        row = memory[at + h * to_head : at + h * to_head + width]
        for c in range(width):
            unit[c] += row[c]
    scale = np.float32(1.0) / np.float32(heads)
    for c in range(width):
        unit[c] *= scale
    scale = np.float32(1.0) / max(_length(unit), np.float32(1e-6))
    for c in range(width):
        unit[c] *= scale


@part
def _products(rows: Any, columns: Any, found: Any) -> None:
    """Fill in the products [4, b] of four rows [4, d] with the columns of [d, b]; d by fours.

    Sixteen multiply-adds for four numbers that are read: one by one, reading is what takes long.
    """
    found[:] = 0.0
    w, x, y, z = found[0], found[1], found[2], found[3]
    for d in range(0, columns.shape[0], 4):
        first, second, third, fourth = columns[d], columns[d + 1], columns[d + 2], columns[d + 3]
        # Read here, since for all that the compiler knows the loop writes to them.
        w0, w1, w2, w3 = rows[0, d], rows[0, d + 1], rows[0, d + 2], rows[0, d + 3]
        x0, x1, x2, x3 = rows[1, d], rows[1, d + 1], rows[1, d + 2], rows[1, d + 3]
        y0, y1, y2, y3 = rows[2, d], rows[2, d + 1], rows[2, d + 2], rows[2, d + 3]
        z0, z1, z2, z3 = rows[3, d], rows[3, d + 1], rows[3, d + 2], rows[3, d + 3]
        for b in range(columns.shape[1]):
            i, j, k, m = first[b], second[b], third[b], fourth[b]
            w[b] += w0 * i + w1 * j + w2 * k + w3 * m
            x[b] += x0 * i + x1 * j + x2 * k + x3 * m
            y[b] += y0 * i + y1 * j + y2 * k + y3 * m
            z[b] += z0 * i + z1 * j + z2 * k + z3 * m


@njit(nogil=True, fastmath={*WIDE, "nnan"})
def _largest(row: Any) -> Any:
    """The largest of [b], and the first place where it stands."""
    best, odds = row[0], row.shape[0]
    for b in range(1, odds):
        best = max(best, row[b])
    at = odds
    for b in range(odds):
        at = min(at, b if row[b] == best else odds)
    return best, min(at, odds - 1)  # of numbers that are none, too


@part
def _largest_inside(row: Any, tile: Any, tiles: Any) -> Any:
    """The largest of [b] within a tile, and the first place where it stands, or -1."""
    best, at = np.float32(0.0), -1
    for b in range(row.shape[0]):
        if tiles[b] == tile and (at < 0 or row[b] > best):
            best, at = row[b], b
    return best, at


@part
def _in_rounds(ranked: Any, tiles: Any, crosses: Any, equal_quota: Any) -> Any:
    """Edges [a] in rounds of one per tile, or as they are; crossing ones last."""
    evens = ranked.shape[0]
    turn = np.zeros(evens, np.int64)
    for i in range(evens):
        a = ranked[i]
        if crosses[a]:
            turn[i] = evens
        elif equal_quota:
            for j in range(i):
                other = ranked[j]
                turn[i] += tiles[other] == tiles[a] and not crosses[other]
    return ranked[np.argsort(turn, kind="mergesort")]


@part
def _match(image: Any, given: Any, partner: Any) -> Any:
    """Rank the even tokens of an image, [a], by their best edges; fill in their partners, [a]."""
    evens, odds, width = given.evens, given.odds, given.width
    last = (given.heads - 1) * given.to_head + (given.tokens - 1) * given.to_token + width
    feature = carray(_floats(given.feature + 4 * image * given.to_image), (last,))
    penalty = _of(image, given.penalty, (evens, odds))
    bonus = _of(image, given.bonus, (evens,))
    even_tiles, odd_tiles = (
        _of(image, given.even_tiles, (evens,)),
        _of(image, given.odd_tiles, (odds,)),
    )
    deep, wide = -(width // -FOUR) * FOUR, -(odds // -REGISTER) * REGISTER
    columns, one = np.zeros((deep, wide), np.float32), np.empty(width, np.float32)
    for b in range(odds):
        at = (given.first_odd + 2 * b) * given.to_token
        _unit_mean(feature, at, given.to_head, given.heads, one)
        for d in range(width):
            columns[d, b] = one[d]
    rows, found = np.zeros((FOUR, deep), np.float32), np.empty((FOUR, wide), np.float32)
    worst = np.empty(evens, np.float32)  # the score, negated: a stable sort is ascending
    crosses = np.zeros(evens, np.bool_)
    for a in range(evens):
        if a % FOUR == 0:
            for i in range(min(FOUR, evens - a)):
                at = (given.first_even + 2 * (a + i)) * given.to_token
                _unit_mean(feature, at, given.to_head, given.heads, rows[i, :width])
            _products(rows, columns, found)
        scores = found[a % FOUR, :odds]
        if penalty.shape[0]:
            for b in range(odds):
                scores[b] -= penalty[a, b]
        best, at = np.float32(0.0), -1
        if even_tiles.shape[0]:
            best, at = _largest_inside(scores, even_tiles[a], odd_tiles)
            crosses[a] = at < 0
        if at < 0:
            best, at = _largest(scores)
        partner[a] = at
        worst[a] = -(best + bonus[a]) if bonus.shape[0] else -best
    ranked = np.argsort(worst, kind="mergesort")
    if not even_tiles.shape[0]:
        return ranked
    return _in_rounds(ranked, even_tiles, crosses, given.equal_quota)


@part
def _seat(ranked: Any, given: Any, rows: Any) -> Any:
    """Fill in the rows of those that stay, [N - r], in their new order; returns the first odd."""
    stays = np.ones(given.evens, np.bool_)
    for i in range(given.r):
        stays[ranked[i]] = False
    at = 0
    for token in range(given.prefix):
        rows[at] = token
        at += 1
    for a in range(given.evens):
        if stays[a]:
            rows[at] = given.first_even + 2 * a
            at += 1
    for b in range(given.odds):
        rows[at + b] = given.first_odd + 2 * b
    return at


@part
def _join(x: Any, rows: Any, source: Any, target: Any, share: Any, norm: Any, merged: Any) -> None:
    """Fill in what [N, C] becomes, [N - r, C]: those that stay, with shares of those that join.

    ``source`` and ``target`` are [r]: the row of x that leaves, the one of ``merged`` it joins.
    """
    r, channels = source.shape[0], x.shape[1]
    for i in range(rows.shape[0]):
        into, one = merged[i], x[rows[i]]
        for c in range(channels):
            into[c] = one[c]
    for i in range(r):
        into, one, own = merged[target[i]], x[source[i]], x[rows[target[i]]]
        for c in range(channels):
            into[c] += share[i] * (one[c] - own[c])
    for i in range(r if norm else 0):
        is_first = True
        for j in range(i):
            is_first = is_first and target[j] != target[i]
        if not is_first:
            continue
        length = _length(x[rows[target[i]]])
        wanted = length
        for j in range(i, r):
            if target[j] == target[i]:
                other = _length(x[source[j]])
                wanted = max(wanted, other) if norm == 2 else wanted + share[j] * (other - length)
        into = merged[target[i]]
        scale = wanted / max(_length(into), np.float32(1e-6))
        for c in range(channels):
            into[c] *= scale


@part
def _merge(image: Any, given: Any, ranked: Any, partner: Any) -> None:
    """As ``joining.merge``, for an image."""
    count, channels, r = given.tokens, given.channels, given.r
    left = count - r
    size, weight = _of(image, given.size, (count,)), _of(image, given.weight, (count,))
    new_size = _of(image, given.new_size, (left,))
    rows, source, target = np.empty(left, np.int64), np.empty(r, np.int64), np.empty(r, np.int64)
    share, total = np.empty(r, np.float32), np.empty(left, np.float32)
    one = np.float32(1.0)
    first = _seat(ranked, given, rows)
    for i in range(left):
        new_size[i] = size[rows[i]] if size.shape[0] else one
        total[i] = new_size[i] * (weight[rows[i]] if weight.shape[0] else one)
    for i in range(r):
        source[i] = given.first_even + 2 * ranked[i]
        target[i] = first + partner[ranked[i]]
        own = size[source[i]] if size.shape[0] else one
        share[i] = own * (weight[source[i]] if weight.shape[0] else one)
        new_size[target[i]] += own
        total[target[i]] += share[i]
    for i in range(r):
        share[i] /= total[target[i]]
    x, merged = _of(image, given.x, (count, channels)), _of(image, given.new_x, (left, channels))
    _join(x, rows, source, target, share, given.norm, merged)
    place, new_place = _of(image, given.place, (count, 2)), _of(image, given.new_place, (left, 2))
    if place.shape[0] and given.centroid:
        _join(place, rows, source, target, share, 0, new_place)
    elif place.shape[0]:
        for i in range(left):
            for c in range(2):
                new_place[i, c] = place[rows[i], c]


@_compiled
def step(given: Any) -> None:
    """A merge, as the tensor functions do it one after the other.

    These are ``on_cpu.mean_over_heads``, ``matching.similarity``, ``matching.choose_edges`` and
    ``joining.merge``. A feature is [B, H, N, d], of any strides but that those of d stand side by
    side; a penalty [B, a, b] is subtracted from the scores; ``order`` [B, a] and ``destination``
    [B, r], int64, are those of ``matching.Choice``; all else is float32, of the shapes that these
    functions name, and contiguous.

    Args:
        given: all of :data:`GIVEN`.
    """
    one = carray(given, 1)[0]
    partner = np.empty(one.evens, np.int64)
    image = _next_image(given)
    while image < one.images:
        ranked = _match(image, one, partner)
        if one.order:
            order = carray(_integers(one.order + 8 * image * one.evens), (one.evens,))
            destination = carray(_integers(one.destination + 8 * image * one.r), (one.r,))
            for i in range(one.evens):
                order[i] = ranked[i]
            for i in range(one.r):
                destination[i] = partner[ranked[i]]
        _merge(image, one, ranked, partner)
        image = _next_image(given)
