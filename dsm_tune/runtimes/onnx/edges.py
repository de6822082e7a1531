"""Which edges merge, as ONNX nodes: what :func:`dsm_tune.merging.matching.choose_edges` chooses."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsm_tune.merging.matching import PLACE_TOLERANCE
from dsm_tune.plan import Matching
from dsm_tune.runtimes.onnx.nodes import Builder, Layout, State, Value

__all__ = ["edges", "unit"]

NEVER = -1e30  # below every score; infinity is what some runtimes are careless with


def edges(
    g: Builder, state: State, feature: Value, received: Value, options: Matching, layout: Layout
) -> tuple[Value, Value]:
    """The edges that merge: sources among the even tokens, targets among the odd: [B, r] each."""
    even, odd = g.constant(layout.even), g.constant(layout.odd)
    scores, times = _scores(g, feature, state.size, options, layout)
    best, partner = _largest(g, scores)
    tiles = crosses = None
    if layout.window:
        tile = _tiles(g, state.place, layout.window)
        tiles = g.Gather(tile, even, axis=1)
        across, down = g.column(tiles), g.row(g.Gather(tile, odd, axis=1))
        inside = g.Where(g.Equal(across, down), scores, g.constant(NEVER, np.float32))
        best_inside, partner_inside = _largest(g, inside)
        crosses = g.Less(best_inside, g.constant(NEVER / 2, np.float32))
        best = g.Where(crosses, best, best_inside)
        partner = g.Where(crosses, partner, partner_inside)
    if received is not None and options.salience:
        bonus = g.constant(-options.salience * layout.count * times, np.float32)
        best = g.Add(best, g.Mul(g.Gather(received, even, axis=1), bonus))
    if layout.window:
        order = g.TopK(best, g.integers(len(layout.even)), axis=1)[1]
        order = _in_rounds(g, order, tiles, crosses, layout, options.quota == "equal")
    else:
        order = g.TopK(best, g.integers(layout.r), axis=1)[1]
    return order, g.GatherElements(partner, order, axis=1)


def _scores(g: Builder, feature: Value, size: Value, options: Matching, layout: Layout) -> Any:
    """Scores [B, a, b], and the number that they are a multiple by.

    With a size penalty β they are divided by it: ``cosine / β + log(1 / s_a + 1 / s_b)``, for
    ``s_a s_b / (s_a + s_b)`` is the inverse of ``1 / s_a + 1 / s_b``.
    """
    even, odd = g.constant(layout.even), g.constant(layout.odd)
    level = unit(g, feature)
    cosine = g.MatMul(g.Gather(level, even, axis=1), g.flipped(g.Gather(level, odd, axis=1)))
    if options.size_penalty and size is not None:
        inverse = g.Reciprocal(size)
        across, down = (g.Gather(inverse, half, axis=1) for half in (even, odd))
        times = 1 / options.size_penalty
        scaled = g.Mul(cosine, g.constant(times, np.float32))
        return g.Add(scaled, g.Log(g.Add(across, g.row(down)))), times
    return cosine, 1.0


def unit(g: Builder, feature: Value) -> Value:
    """Scale the rows of [B, N, F] to length 1; zero rows stay."""
    return g.LpNormalization(feature, axis=-1, p=2)


def _largest(g: Builder, scores: Value) -> tuple[Value, Value]:
    """Largest of each row of [B, a, b] and its index: [B, a] each."""
    return g.ReduceMax(scores, g.integers(2), keepdims=0), g.ArgMax(scores, axis=2, keepdims=0)


def _tiles(g: Builder, place: Value, window: int) -> Value:
    """Number of the tile in which each place is: [B, N]."""
    shifted = g.Add(place, g.constant(PLACE_TOLERANCE, np.float32))
    corner = g.Floor(g.Div(shifted, g.constant(window, np.float32)))
    return g.flat(g.MatMul(corner, g.constant([[4096.0], [1.0]], np.float32)))


def _in_rounds(
    g: Builder, order: Value, tiles: Value, crosses: Value, layout: Layout, equal: bool
) -> Value:
    """First r of [B, a] in rounds of one edge per tile, or as they are; crossing ones last."""
    count = len(layout.even)
    crossing = g.GatherElements(g.Cast(crosses, to=1), order, axis=1)
    turn = g.Mul(crossing, g.constant(count, np.float32))
    if equal:
        # A crossing edge stands in no tile, so that it delays no other.
        aside = g.Mul(crossing, g.constant(-1e9, np.float32))
        ranked = g.Add(g.GatherElements(tiles, order, axis=1), aside)
        earlier = g.constant(np.tri(count, k=-1), np.bool_)
        before = g.Cast(g.And(g.Equal(g.column(ranked), g.row(ranked)), earlier), to=1)
        turn = g.Add(turn, g.ReduceSum(before, g.integers(2), keepdims=0))
    # Within a round the order stays; distinct keys leave no tie to the runtime.
    key = g.Mul(turn, g.constant(count, np.float32))
    key = g.Add(key, g.constant(np.arange(count), np.float32))
    first = g.TopK(key, g.integers(layout.r), axis=1, largest=0)[1]
    return g.GatherElements(order, first, axis=1)
