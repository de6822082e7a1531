"""Matching and merging on a CPU as compiled loops, which several threads may run at once.

They do exactly what the tensor functions do that they name, which are their oracle in the tests;
sums may differ by rounding. Each thread of a team calls ``step`` or ``unit_mean`` with the same
numbers, the first of which counts the shares of the work that were taken: a share is an image, or
some tokens, and what becomes of it does not depend on who takes it. An array of no elements stands
for ``None``. numba keeps the machine code beside this file, or in the user's cache folder, so that
it is made once per machine.

Letters in shapes are those of :mod:`~dsm_tune.merging.matching`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

__all__ = ["NORMS", "TOKENS", "step", "unit_mean"]

NORMS = {"free": 0, "mean": 1, "largest": 2}
TOKENS = 48  # whose means are one share of the work
WIDE = {"contract", "reassoc", "nsz"}  # what lets sums use wide registers
part = numba.njit(nogil=True, fastmath=WIDE)  # of a loop; compiled with it


def _compiled(function: Callable[[Any], None]) -> Any:
    """Compile what threads call with an address of int64; keep the code, if there is a place to."""
    compiled = functools.partial(numba.cfunc, "void(CPointer(int64))", fastmath=WIDE)
    try:
        return compiled(cache=True)(function)
    except (OSError, RuntimeError):  # a full disk; numba's, where no folder can be written
        return compiled()(function)


@intrinsic  # type: ignore[untyped-decorator]
def _next_share(typing: Any, counter: Any) -> Any:
    """The number of a share of the work that nobody has taken, from 0."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        one = context.get_constant(types.int64, 1)
        return builder.atomic_rmw("add", given[0], one, "monotonic")

    return types.int64(types.CPointer(types.int64)), code


def _at(kind: Any) -> Any:
    """Of an address, a pointer to numbers of a kind."""

    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), code

    return pointer


_floats, _integers = _at(types.float32), _at(types.int64)


@part
def _numbers(address: Any, shape: Any) -> Any:
    """The float32 numbers at an address; none at 0."""
    return numba.carray(_floats(address), shape if address else (0, *shape[1:]))


@numba.njit(nogil=True, fastmath={*WIDE, "nnan"})
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
def _choose(
    pairs: Any, bonus: Any, even_tiles: Any, odd_tiles: Any, equal_quota: Any, partner: Any
) -> Any:
    """Rank the even tokens of an image, [a], by their best edges; fill in their partners, [a]."""
    evens = pairs.shape[0]
    worst = np.empty(evens, np.float32)  # the score, negated: a stable sort is ascending
    crosses = np.zeros(evens, np.bool_)
    for a in range(evens):
        best, at = np.float32(0.0), -1
        if even_tiles.shape[0]:
            best, at = _largest_inside(pairs[a], even_tiles[a], odd_tiles)
            crosses[a] = at < 0
        if at < 0:
            best, at = _largest(pairs[a])
        partner[a] = at
        worst[a] = -(best + bonus[a]) if bonus.shape[0] else -best
    ranked = np.argsort(worst, kind="mergesort")
    if not even_tiles.shape[0]:
        return ranked
    turn = np.zeros(evens, np.int64)  # the round in which each edge is taken
    for i in range(evens):
        a = ranked[i]
        if crosses[a]:
            turn[i] = evens
        elif equal_quota:
            for j in range(i):
                other = ranked[j]
                turn[i] += even_tiles[other] == even_tiles[a] and not crosses[other]
    return ranked[np.argsort(turn, kind="mergesort")]


@part
def _seat(order: Any, r: Any, prefix: Any, even_at: Any, odd_at: Any, rows: Any) -> Any:
    """Fill in the rows of those that stay, [N - r], in their new order; returns the first odd."""
    evens, left = order.shape[0], rows.shape[0]
    stays = np.ones(evens, np.bool_)
    for i in range(r):
        stays[order[i]] = False
    at = 0
    for token in range(prefix):
        rows[at] = token
        at += 1
    for a in range(evens):
        if stays[a]:
            rows[at] = even_at + 2 * a
            at += 1
    first = at
    for token in range(odd_at, left + r, 2):
        rows[at] = token
        at += 1
    return first


@part
def _length(row: Any) -> Any:
    total = np.float32(0.0)
    for c in range(row.shape[0]):
        total += row[c] * row[c]
    return np.sqrt(total)


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


@_compiled
def unit_mean(given: Any) -> None:
    """As ``matching.unit`` of ``on_cpu.mean_over_heads`` of [B, H, N, d].

    Args:
        given: a counter; B, H, N, d; how far it is from a number to that of the next image, head
            and token, while those of d stand side by side; addresses of the first number, and of
            [B, N, d], which is filled in.
    """
    batch, heads, count, width = given[1], given[2], given[3], given[4]
    image, head, token = given[5], given[6], given[7]
    last = (batch - 1) * image + (heads - 1) * head + (count - 1) * token
    memory = _numbers(given[8], (last + width,))
    unit = _numbers(given[9], (batch * count, width))
    factor = np.float32(1.0 / heads)
    first = _next_share(given) * TOKENS
    while first < batch * count:
        for n in range(first, min(first + TOKENS, batch * count)):
            row, at = unit[n], n // count * image + n % count * token
            row[:] = 0.0
            for h in range(heads):
                one = memory[at + h * head : at + h * head + width]
                for c in range(width):
                    row[c] += one[c]
            for c in range(width):
                row[c] *= factor
            scale = np.float32(1.0) / max(_length(row), np.float32(1e-6))
            for c in range(width):
                row[c] *= scale
        first = _next_share(given) * TOKENS


@_compiled
def step(given: Any) -> None:
    """As ``matching.choose_edges``, and then ``joining.merge``.

    Args:
        given: a counter; B, N, C, a, b, r, p; positions of the first patch token at an even
            position and at an odd one; whether edges are taken in rounds, one from each tile per
            round; the norm, of :data:`NORMS`; whether a merged token stands at the weighted mean
            of the places. Addresses, 0 for none: scores [B, a, b], a bonus for each even token's
            edge [B, a], tiles of the even [B, a] and of the odd tokens [B, b]; tokens [B, N, C],
            sizes [B, N], places [B, N, 2], weights [B, N]; what is filled in: tokens
            [B, N - r, C], sizes [B, N - r], places [B, N - r, 2], and as int64 the even tokens by
            rank [B, a] and the odd ones that the first r of them join [B, r].
    """
    batch, count, channels, evens = given[1], given[2], given[3], given[4]
    odds, r, prefix, even_at, odd_at = given[5], given[6], given[7], given[8], given[9]
    left = count - r
    pairs, bonus = _numbers(given[13], (batch, evens, odds)), _numbers(given[14], (batch, evens))
    even_tiles, odd_tiles = _numbers(given[15], (batch, evens)), _numbers(given[16], (batch, odds))
    x, size = _numbers(given[17], (batch, count, channels)), _numbers(given[18], (batch, count))
    place, weight = _numbers(given[19], (batch, count, 2)), _numbers(given[20], (batch, count))
    merged = _numbers(given[21], (batch, left, channels))
    new_size, new_place = _numbers(given[22], (batch, left)), _numbers(given[23], (batch, left, 2))
    order = numba.carray(_integers(given[24]), (batch, evens))
    destination = numba.carray(_integers(given[25]), (batch, r))
    partner, rows = np.empty(evens, np.int64), np.empty(left, np.int64)
    source, target = np.empty(r, np.int64), np.empty(r, np.int64)
    share, total = np.empty(r, np.float32), np.empty(left, np.float32)
    one, none = np.float32(1.0), np.empty(0, np.float32)
    image = _next_share(given)
    while image < batch:
        ranked = _choose(
            pairs[image],
            bonus[image] if bonus.shape[0] else none,
            even_tiles[image] if even_tiles.shape[0] else none,
            odd_tiles[image] if odd_tiles.shape[0] else none,
            given[10],
            partner,
        )
        first = _seat(ranked, r, prefix, even_at, odd_at, rows)
        for i in range(evens):
            order[image, i] = ranked[i]
        for i in range(left):
            new_size[image, i] = size[image, rows[i]] if size.shape[0] else one
            total[i] = new_size[image, i] * (weight[image, rows[i]] if weight.shape[0] else one)
        for i in range(r):
            destination[image, i] = partner[ranked[i]]
            source[i] = even_at + 2 * ranked[i]
            target[i] = first + partner[ranked[i]]
            own = size[image, source[i]] if size.shape[0] else one
            share[i] = own * (weight[image, source[i]] if weight.shape[0] else one)
            new_size[image, target[i]] += own
            total[target[i]] += share[i]
        for i in range(r):
            share[i] /= total[target[i]]
        _join(x[image], rows, source, target, share, given[11], merged[image])
        if place.shape[0] and given[12]:
            _join(place[image], rows, source, target, share, 0, new_place[image])
        elif place.shape[0]:
            for i in range(left):
                for c in range(2):
                    new_place[image, i, c] = place[image, rows[i], c]
        image = _next_share(given)
