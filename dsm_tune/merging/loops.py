"""Matching and merging on a CPU as compiled loops: what some forty operators do, in two calls.

Each loop does exactly what the tensor functions of :mod:`~dsm_tune.merging.matching` and
:mod:`~dsm_tune.merging.joining` do, which are its oracle in the tests; sums may differ by
rounding. An array of no elements stands for ``None``. numba keeps the machine code beside this
file, or in the user's cache folder, so that it is made once per machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = ["choose", "join", "seat"]

NORMS = {"free": 0, "mean": 1, "largest": 2}
WIDE = {"contract", "reassoc", "nsz"}  # what lets sums use wide registers


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
def _largest(pairs: Any, image: Any, a: Any) -> Any:
    """The largest of a row, and the first place where it stands."""
    best, odds = pairs[image, a, 0], pairs.shape[2]
    for b in range(1, odds):
        best = max(best, pairs[image, a, b])
    at = odds
    for b in range(odds):
        at = min(at, b if pairs[image, a, b] == best else odds)
    return best, min(at, odds - 1)  # of numbers that are none, too


@numba.njit(nogil=True)
def _largest_inside(pairs: Any, image: Any, a: Any, even_tiles: Any, odd_tiles: Any) -> Any:
    """The largest of a row within the tile, and the first place where it stands, or -1."""
    best, at = np.float32(0.0), -1
    for b in range(pairs.shape[2]):
        same = even_tiles[image, a] == odd_tiles[image, b]
        if same and (at < 0 or pairs[image, a, b] > best):
            best, at = pairs[image, a, b], b
    return best, at


@_compiled("(f4[:,:,::1], i8, f4[:,::1], f4[:,::1], f4[:,::1], b1, i8[:,::1], i8[:,::1])")
def choose(
    pairs: Any,
    r: Any,
    bonus: Any,
    even_tiles: Any,
    odd_tiles: Any,
    equal_quota: Any,
    order: Any,
    destination: Any,
) -> None:
    """As :func:`~dsm_tune.merging.matching.choose_edges`; fills in what a ``Choice`` holds."""
    batch, evens, _ = pairs.shape
    worst = np.empty(evens, np.float32)  # the score, negated: a stable sort is ascending
    partner, turn = np.empty(evens, np.int64), np.empty(evens, np.int64)
    crosses = np.zeros(evens, np.bool_)
    for image in range(batch):
        for a in range(evens):
            best, at = np.float32(0.0), -1
            if even_tiles.shape[0]:
                best, at = _largest_inside(pairs, image, a, even_tiles, odd_tiles)
                crosses[a] = at < 0
            if at < 0:
                best, at = _largest(pairs, image, a)
            partner[a] = at
            worst[a] = -(best + bonus[image, a]) if bonus.shape[0] else -best
        ranked = np.argsort(worst, kind="mergesort")
        if even_tiles.shape[0]:
            for i in range(evens):
                a, turn[i] = ranked[i], 0
                if crosses[a]:
                    turn[i] = evens
                elif equal_quota:
                    for j in range(i):
                        other = ranked[j]
                        same = even_tiles[image, other] == even_tiles[image, a]
                        turn[i] += same and not crosses[other]
            ranked = ranked[np.argsort(turn, kind="mergesort")]
        for i in range(evens):
            order[image, i] = ranked[i]
        for i in range(r):
            destination[image, i] = partner[order[image, i]]


@numba.njit(nogil=True, fastmath=WIDE)
def _length(x: Any, row: Any) -> Any:
    total = np.float32(0.0)
    for c in range(x.shape[1]):
        total += x[row, c] * x[row, c]
    return np.sqrt(total)


@_compiled(
    "(i8[:,::1], i8[:,::1], f4[:,::1], f4[:,::1], i8, i8[:,::1], f4[:,::1], i8[:,:,::1], f4[:,::1])"
)
def seat(
    order: Any,
    destination: Any,
    size: Any,
    weight: Any,
    prefix: Any,
    rows: Any,
    new_size: Any,
    moves: Any,
    share: Any,
) -> None:
    """Where the tokens of a merge go, and what part of a merged token each source has.

    Args:
        order: [B, a] and
        destination: [B, r], of a choice.
        size: [B, N], or none: all 1.
        weight: [B, N] or none, multiplied with the sizes for the shares.
        prefix: p.
        rows: [B, N - r], filled with the rows of [B N, …] that stay.
        new_size: [B, N - r], filled.
        moves: [B, r, 3], filled with the row that leaves, the one it joins, and the one that this
            is among those that stay.
        share: [B, r], filled.
    """
    (batch, evens), r, left = order.shape, destination.shape[1], rows.shape[1]
    count = left + r
    even_at, odd_at = prefix + prefix % 2, prefix + 1 - prefix % 2
    stays = np.empty(evens, np.bool_)
    total = np.empty(left, np.float32)
    for image in range(batch):
        stays[:] = True
        for i in range(r):
            stays[order[image, i]] = False
        at, first = 0, image * count
        for token in range(prefix):
            rows[image, at] = token
            at += 1
        for a in range(evens):
            if stays[a]:
                rows[image, at] = even_at + 2 * a
                at += 1
        odds = at
        for token in range(odd_at, count, 2):
            rows[image, at] = token
            at += 1
        for i in range(left):
            token = rows[image, i]
            new_size[image, i] = size[image, token] if size.shape[0] else 1.0
            total[i] = new_size[image, i] * (weight[image, token] if weight.shape[0] else 1.0)
            rows[image, i] = first + token
        for i in range(r):
            source, target = even_at + 2 * order[image, i], odds + destination[image, i]
            own = size[image, source] if size.shape[0] else np.float32(1.0)
            new_size[image, target] += own
            share[image, i] = own * (weight[image, source] if weight.shape[0] else 1.0)
            total[target] += share[image, i]
            moves[image, i, 0] = first + source
            moves[image, i, 1] = rows[image, target]
            moves[image, i, 2] = image * left + target
        for i in range(r):
            share[image, i] /= total[moves[image, i, 2] - image * left]


@_compiled("(f4[:,::1], i8[:,:,::1], f4[:,::1], i8, f4[:,::1])")
def join(x: Any, moves: Any, share: Any, norm: Any, merged: Any) -> None:
    """Add to each token that stays its shares of those that join it.

    Args:
        x: [B N, C].
        moves: [B, r, 3] and
        share: [B, r], of :func:`seat`.
        norm: of :data:`NORMS`.
        merged: [B (N - r), C], the rows that stay; changed in place.
    """
    (batch, r), channels = share.shape, x.shape[1]
    wanted = np.empty(r, np.float32)
    for image in range(batch):
        if norm:
            for i in range(r):
                target = moves[image, i, 2]
                own = _length(x, moves[image, i, 1])
                wanted[i] = own
                for j in range(r):
                    if moves[image, j, 2] == target:
                        other = _length(x, moves[image, j, 0])
                        if norm == 2:
                            wanted[i] = max(wanted[i], other)
                        else:
                            wanted[i] += share[image, j] * (other - own)
        for i in range(r):
            source, old, new = moves[image, i, 0], moves[image, i, 1], moves[image, i, 2]
            for c in range(channels):
                merged[new, c] += share[image, i] * (x[source, c] - x[old, c])
        if norm:
            for i in range(r):
                new, is_first = moves[image, i, 2], True
                for j in range(i):
                    is_first = is_first and moves[image, j, 2] != new
                if is_first:
                    scale = wanted[i] / max(_length(merged, new), np.float32(1e-6))
                    for c in range(channels):
                        merged[new, c] *= scale
