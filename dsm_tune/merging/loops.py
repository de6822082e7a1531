"""Matching and merging on a CPU as compiled loops over images.

They do exactly what the tensor functions do that they name, which are their oracle in the tests;
sums may differ by rounding. An array of no elements stands for ``None``. numba keeps the machine
code beside this file, or in the user's cache folder, so that it is made once per machine.

Letters in shapes are those of :mod:`~dsm_tune.merging.matching`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = ["NORMS", "step", "unit_mean"]

NORMS = {"free": 0, "mean": 1, "largest": 2}
WIDE = {"contract", "reassoc", "nsz"}  # what lets sums use wide registers
part = numba.njit(nogil=True, fastmath=WIDE)  # of the loop; compiled with it


def _compiled(signature: str) -> Callable[[Callable[..., None]], Any]:
    """Compile a function for one signature; keep the code, if there is a place to."""

    def compile_one(function: Callable[..., None]) -> Any:
        jit = functools.partial(numba.njit, signature, nogil=True, fastmath=WIDE)
        try:
            return jit(cache=True)(function)
        except (OSError, RuntimeError):  # a full disk; numba's, where no folder can be written
            return jit()(function)

    return compile_one


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


@_compiled("(f4[::1], i8, i8, i8, i8, i8, f4[:,:,::1])")
def unit_mean(
    memory: Any, start: Any, image: Any, head: Any, token: Any, heads: Any, unit: Any
) -> None:
    """As ``matching.unit`` of ``on_cpu.mean_over_heads`` of [B, H, N, d].

    Args:
        memory: that holds the numbers.
        start: of the first one in it.
        image: from there to the next image; those of a row of d stand side by side.
        head: to the next head.
        token: to the next token.
        heads: H.
        unit: [B, N, d], filled in.
    """
    width = unit.shape[2]
    for i in range(unit.shape[0]):
        for n in range(unit.shape[1]):
            row, at = unit[i, n], start + i * image + n * token
            row[:] = 0.0
            for h in range(heads):
                one = memory[at + h * head : at + h * head + width]
                for c in range(width):
                    row[c] += one[c]
            share = np.float32(1.0 / heads)
            for c in range(width):
                row[c] *= share
            scale = np.float32(1.0) / max(_length(row), np.float32(1e-6))
            for c in range(width):
                row[c] *= scale


@_compiled(
    "(f4[:,:,::1], f4[:,::1], f4[:,::1], f4[:,::1], b1, i8, i8, i8, i8, b1,"
    " f4[:,:,::1], f4[:,::1], f4[:,:,::1], f4[:,::1],"
    " f4[:,:,::1], f4[:,::1], f4[:,:,::1], i8[:,::1], i8[:,::1])"
)
def step(
    pairs: Any,
    bonus: Any,
    even_tiles: Any,
    odd_tiles: Any,
    equal_quota: Any,
    prefix: Any,
    even_at: Any,
    odd_at: Any,
    norm: Any,
    centroid: Any,
    x: Any,
    size: Any,
    place: Any,
    weight: Any,
    merged: Any,
    new_size: Any,
    new_place: Any,
    order: Any,
    destination: Any,
) -> None:
    """As ``matching.choose_edges``, and then ``joining.merge``.

    Args:
        pairs: [B, a, b], the score of each edge.
        bonus: [B, a] or none, added to the score of each even token's edge.
        even_tiles: [B, a] or none, the tile of each even token, and
        odd_tiles: [B, b] or none, of each odd one.
        equal_quota: whether edges are taken in rounds, one from each tile per round.
        prefix: p.
        even_at: position of the first patch token at an even position, and
        odd_at: at an odd one.
        norm: of :data:`NORMS`.
        centroid: whether a merged token stands at the weighted mean of the places.
        x: [B, N, C].
        size: [B, N], or none: all 1.
        place: [B, N, 2] or none.
        weight: [B, N] or none, multiplied with the sizes for the weights of the mean.
        merged: [B, N - r, C], filled in.
        new_size: [B, N - r], filled in.
        new_place: [B, N - r, 2], filled in if there are places.
        order: [B, a], filled in: even tokens, the r that merge first, by rank.
        destination: [B, r], filled in: the odd tokens that they join.
    """
    (batch, evens), r, left = order.shape, destination.shape[1], new_size.shape[1]
    partner, rows = np.empty(evens, np.int64), np.empty(left, np.int64)
    source, target = np.empty(r, np.int64), np.empty(r, np.int64)
    share, total = np.empty(r, np.float32), np.empty(left, np.float32)
    one, none = np.float32(1.0), np.empty(0, np.float32)
    for image in range(batch):
        ranked = _choose(
            pairs[image],
            bonus[image] if bonus.shape[0] else none,
            even_tiles[image] if even_tiles.shape[0] else none,
            odd_tiles[image] if odd_tiles.shape[0] else none,
            equal_quota,
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
        _join(x[image], rows, source, target, share, norm, merged[image])
        if place.shape[0] and centroid:
            _join(place[image], rows, source, target, share, 0, new_place[image])
        elif place.shape[0]:
            for i in range(left):
                for c in range(2):
                    new_place[image, i, c] = place[image, rows[i], c]
