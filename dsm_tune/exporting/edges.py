"""Which edges merge, as ONNX nodes: what :func:`dsm_tune.merging.matching.choose_edges` chooses."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsm_tune.exporting.nodes import Layout, Value, constant, flipped, integers, op, repeated
from dsm_tune.merging.matching import PLACE_TOLERANCE

__all__ = ["edges"]

NEVER = -1e30  # below every score; infinity is what some runtimes are careless with


def edges(
    x: Value,
    feature: Value,
    size: Value,
    place: Value,
    received: Value,
    options: Any,
    layout: Layout,
) -> Any:
    """Even tokens in the order in which their edges are taken, and their partners: [B, a, 1]."""
    even, odd, count = constant(layout.even), constant(layout.odd), len(layout.even)
    scores, unit = _scores(x, feature, size, options, layout)
    best, partner = _largest(scores)
    tiles = crosses = None
    if layout.window:
        tile = _tiles(place, layout.window)
        tiles = op.Gather(tile, even, axis=1)
        same = op.Equal(tiles, flipped(op.Gather(tile, odd, axis=1)))
        inside, inside_partner = _largest(op.Where(same, scores, constant(NEVER, np.float32)))
        crosses = op.Less(inside, constant(NEVER / 2, np.float32))
        best = op.Where(crosses, best, inside)
        partner = op.Where(crosses, partner, inside_partner)
    if received is not None and options.salience:
        bonus = constant(-options.salience * layout.count * unit, np.float32)
        salient = op.Unsqueeze(op.Gather(received, even, axis=1), integers(2))
        best = op.Add(best, op.Mul(salient, bonus))
    order = op.TopK(best, integers(count), axis=1)[1]
    if layout.window:
        order = _in_rounds(order, tiles, crosses, count, options.quota == "equal")
    return order, partner


def _scores(x: Value, feature: Value, size: Value, options: Any, layout: Layout) -> Any:
    """Scores [B, a, b], and the number that they are a multiple by.

    With a size penalty β they are divided by it: ``cosine / β + log(1 / s_a + 1 / s_b)``, for
    ``s_a s_b / (s_a + s_b)`` is the inverse of ``1 / s_a + 1 / s_b``.
    """
    even, odd = constant(layout.even), constant(layout.odd)
    length = op.ReduceL2(feature, integers(-1), keepdims=1)
    unit = op.Div(feature, op.Max(length, constant(1e-6, np.float32)))
    cosine = op.MatMul(op.Gather(unit, even, axis=1), flipped(op.Gather(unit, odd, axis=1)))
    if options.size_penalty and size is not None:
        inverse = op.Reciprocal(size)
        across = op.Unsqueeze(op.Gather(inverse, even, axis=1), integers(2))
        down = op.Unsqueeze(op.Gather(inverse, odd, axis=1), integers(1))
        times = 1 / options.size_penalty
        scaled = op.Mul(cosine, constant(times, np.float32))
        return op.Add(scaled, op.Log(op.Add(across, down))), times
    if options.feature == "random":  # one row for all images so far
        cosine = op.Add(cosine, repeated(x, np.zeros((1, 1))))
    return cosine, 1.0


def _largest(scores: Value) -> Any:
    """Largest of each row of [B, a, b] and its index: [B, a, 1] each."""
    return op.ReduceMax(scores, integers(2), keepdims=1), op.ArgMax(scores, axis=2, keepdims=1)


def _tiles(place: Value, window: int) -> Value:
    """Number of the tile in which each place is: [B, N, 1]."""
    shifted = op.Add(place, constant(PLACE_TOLERANCE, np.float32))
    corner = op.Floor(op.Div(shifted, constant(window, np.float32)))
    return op.MatMul(corner, constant([[4096.0], [1.0]], np.float32))


def _in_rounds(order: Value, tiles: Value, crosses: Value, count: int, equal: bool) -> Value:
    """Reorder [B, a, 1]: one edge of each tile per round, or as they are; crossing edges last."""
    crossing = op.GatherElements(op.Cast(crosses, to=1), order, axis=1)
    turn = op.Mul(crossing, constant(count, np.float32))
    if equal:
        # A crossing edge stands in no tile, so that it delays no other.
        aside = op.Mul(crossing, constant(-1e9, np.float32))
        ranked = op.Add(op.GatherElements(tiles, order, axis=1), aside)
        earlier = constant(np.tri(count, k=-1), np.bool_)
        before = op.Cast(op.And(op.Equal(ranked, flipped(ranked)), earlier), to=1)
        turn = op.Add(turn, op.ReduceSum(before, integers(2), keepdims=1))
    # Within a round the order stays; distinct keys leave no tie to the runtime.
    key = op.Mul(turn, constant(count, np.float32))
    key = op.Add(key, constant(np.arange(count)[:, None], np.float32))
    return op.GatherElements(order, op.TopK(key, integers(count), axis=1, largest=0)[1], axis=1)
