"""The steps of a plan as ONNX nodes: few, of static shapes, of kinds that are fast everywhere.

Letters in shapes as in :mod:`dsm_tune.merging.matching`. Every node is of a kind that ONNX Runtime
and TensorRT 10 both take. Of equal scores the lower index comes first, as TopK and ArgMax have it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsm_tune.merging.halves import Projections
from dsm_tune.merging.scores import LEAST_SHARE
from dsm_tune.plan import Matching
from dsm_tune.runtimes.onnx.edges import edges, unit
from dsm_tune.runtimes.onnx.joining import Moves, join, length
from dsm_tune.runtimes.onnx.nodes import Builder, Layout, State, Value

__all__ = [
    "attention_to_values",
    "feature_of",
    "fuse",
    "merge",
    "prune",
    "received_by",
]


def received_by(g: Builder, shares: Value, whose: str) -> Value:
    """Attention that each token receives, mean over heads: of [B, H, N, N] shares, [B, N]."""
    if whose == "class":
        return g.ReduceMean(g.Gather(shares, g.constant(0), axis=2), g.integers(1), keepdims=0)
    return g.ReduceMean(shares, g.integers(1, 2), keepdims=0)


def attention_to_values(g: Builder, shares: Value, values: Value, layout: Layout) -> Value:
    """What :func:`dsm_tune.merging.scores.attention_to_values` gives, 0 for the prefix: [B, N]."""
    squares = g.ReduceSum(g.Mul(values, values), g.integers(3), keepdims=0)
    of_class = g.Gather(shares, g.constant(0), axis=2)
    is_patch = g.constant(np.arange(layout.count) >= layout.prefix, np.float32)
    worth = g.Mul(g.Mul(of_class, g.Sqrt(squares)), is_patch)
    total = g.Max(g.ReduceSum(worth, g.integers(2), keepdims=1), g.constant(1e-12, np.float32))
    return g.ReduceMean(g.Div(worth, total), g.integers(1), keepdims=0)


def feature_of(
    g: Builder, kind: str, x: Value, parts: Projections, layout: Layout, *, level: bool
) -> Value:
    """What :func:`dsm_tune.merging.scores.feature_of` gives: [B, N, F]."""
    if kind == "x":
        return x
    halves = []
    for name in kind.removesuffix("_all"):
        heads = getattr(parts, name)
        if kind.endswith("_all"):
            together = g.Transpose(heads, perm=[0, 2, 1, 3])
            halves.append(g.Reshape(together, g.integers(0, 0, -1)))
        else:
            halves.append(_mean_of_heads(g, heads, layout))
    if len(halves) == 1:
        return halves[0]
    return g.Concat(*[unit(g, half) if level else half for half in halves], axis=2)


def _mean_of_heads(g: Builder, heads: Value, layout: Layout) -> Value:
    """[B, H, N, d] to [B, N, d]; as a product, which takes a tenth of what ReduceMean takes."""
    count = layout.geometry.heads
    rows = g.Reshape(heads, g.integers(0, count, -1))
    mean = g.MatMul(g.constant(np.full((1, count), 1 / count), np.float32), rows)
    return g.Reshape(mean, g.integers(0, layout.count, -1))


def prune(g: Builder, state: State, scores: Value, layout: Layout) -> State:
    """Keep the patch tokens with the highest scores, in order."""
    stays, _, _ = _least(g, scores, layout.r, layout)
    return State(*(None if part is None else g.rows(part, stays) for part in state))


def fuse(g: Builder, state: State, scores: Value, options: Matching, layout: Layout) -> State:
    """What :func:`dsm_tune.merging.dropping.fuse` gives."""
    several = layout.r + 1
    stays, leaves, least = _least(g, scores, several, layout)
    weight = g.Max(g.GatherElements(scores, least, axis=1), g.constant(1e-12, np.float32))
    share = g.row(g.Div(weight, g.ReduceSum(weight, g.integers(1), keepdims=1)))
    parts = g.rows(state.x, leaves)
    fused = g.MatMul(share, parts)
    if options.norm != "free":
        lengths = length(g, parts)
        longest = g.ReduceMax(lengths, g.integers(1), keepdims=1)
        wanted = g.MatMul(share, lengths) if options.norm == "mean" else longest
        actual = g.Max(length(g, fused), g.constant(1e-6, np.float32))
        fused = g.Mul(fused, g.Div(wanted, actual))
    if state.size is None:
        numbers = np.append(np.ones(layout.count - several), several)
        size = g.repeated(state.x, numbers[:, None])
    else:
        whole = g.ReduceSum(g.rows(state.size, leaves), g.integers(1), keepdims=1)
        size = g.Concat(g.rows(state.size, stays), whole, axis=1)
    place = state.place
    if place is not None:
        places = g.rows(place, leaves)
        here = g.MatMul(share, places) if options.position == "centroid" else g.cut(places, 0, 1)
        place = g.Concat(g.rows(place, stays), here, axis=1)
    return State(g.Concat(g.rows(state.x, stays), fused, axis=1), size, place)


def _least(g: Builder, scores: Value, several: int, layout: Layout) -> tuple[Value, Value, Value]:
    """Rows of the B N tokens that stay and of the several that leave, and places of these: [B, …].

    Those that leave are in the order of their scores [B, N], the highest first.
    """
    prefix, left = layout.prefix, layout.count - layout.prefix
    worst = g.TopK(g.cut(scores, prefix, layout.count), g.integers(left), axis=1)[1]
    least = g.Add(g.cut(worst, left - several, left), g.constant(prefix))
    seats = _seats(g, least, np.arange(layout.count), layout, several)
    stay = layout.count - several
    return g.cut(seats, 0, stay), g.cut(seats, stay, layout.count), least


def merge(
    g: Builder, state: State, feature: Value, received: Value, options: Matching, layout: Layout
) -> State:
    """Match, then merge, as ``dsm_tune.merging`` does it.

    The tokens that stay are fetched in their new order; to those among them that are joined, a
    product with a one-hot [B, N - r, r] adds what comes.
    """
    order, target = edges(g, state, feature, received, options, layout)
    left, behind = layout.count - layout.r, layout.prefix + layout.rest
    sources = g.Gather(g.constant(layout.even), order)
    seats = _seats(g, sources, layout.ranks(), layout, layout.r)
    places = np.eye(len(layout.odd), left, k=behind)
    joins = g.Gather(g.constant(places, np.float32), target)
    moves = Moves(g, g.cut(seats, 0, left), g.cut(seats, left, layout.count), joins)
    return join(g, state, _weight(g, received, options, layout), options, layout, moves)


def _seats(g: Builder, leaves: Value, ranks: Any, layout: Layout, several: int) -> Value:
    """Rows of the B N tokens in their new order, those that leave behind all others: [B, N].

    Args:
        leaves: positions of those, [B, several].
        ranks: [N] where each token would go if none left.
        several: how many leave.
    """
    count = layout.count
    behind = layout.geometry.tokens + np.arange(several)  # the same in all steps: made once
    late, keys = (g.Add(g.zeros(), g.constant(numbers, np.float32)) for numbers in (behind, ranks))
    keys = g.ScatterElements(keys, leaves, late, axis=1)
    order = g.TopK(keys, g.integers(count), axis=1, largest=0)[1]
    return g.Add(order, g.Mul(g.images(), g.constant(count)))


def _weight(g: Builder, received: Value, options: Matching, layout: Layout) -> Value:
    """What :func:`dsm_tune.merging.scores.attention_weight` gives, up to a factor: [B, N, 1]."""
    if received is None or not options.attention_weight:
        return None
    weight = g.column(g.Max(received, g.constant(LEAST_SHARE / layout.count, np.float32)))
    power = options.attention_weight
    return weight if power == 1 else g.Pow(weight, g.constant(power, np.float32))
