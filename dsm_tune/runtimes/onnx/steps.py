"""The steps of a plan as ONNX nodes: few, of static shapes, without a scatter.

Letters in shapes as in :mod:`dsm_tune.merging.matching`. Every node is of a kind that ONNX Runtime
and TensorRT 10 both take. Of equal scores the lower index comes first, as TopK and ArgMax have it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsm_tune.merging.backbone import Projections
from dsm_tune.plan import Matching
from dsm_tune.runtimes.onnx.edges import edges, unit
from dsm_tune.runtimes.onnx.nodes import Builder, Layout, State, Value

__all__ = ["feature_of", "merge", "prune", "received_by"]


def received_by(g: Builder, shares: Value, whose: str) -> Value:
    """Attention that each token receives, mean over heads: of [B, H, N, N] shares, [B, N]."""
    if whose == "class":
        return g.ReduceMean(g.Gather(shares, g.constant(0), axis=2), g.integers(1), keepdims=0)
    return g.ReduceMean(shares, g.integers(1, 2), keepdims=0)


def feature_of(g: Builder, kind: str, x: Value, parts: Projections, *, level: bool) -> Value:
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
            halves.append(g.ReduceMean(heads, g.integers(1), keepdims=0))
    if len(halves) == 1:
        return halves[0]
    return g.Concat(*[unit(g, half) if level else half for half in halves], axis=2)


def prune(g: Builder, state: State, scores: Value, layout: Layout) -> State:
    """Keep the patch tokens with the highest scores, in order."""
    x, size, place = state
    prefix, left = layout.prefix, layout.count - layout.prefix - layout.r
    best = g.TopK(g.cut(scores, prefix, layout.count), g.integers(left), axis=1)[1]
    kept = g.Unsqueeze(g.Add(g.ascending(best, left), g.constant(prefix)), g.integers(2))

    def keep(values: Value) -> Value:
        return g.Concat(g.cut(values, 0, prefix), g.rows(values, kept), axis=1)

    if size is not None:
        size = g.Squeeze(keep(g.Unsqueeze(size, g.integers(2))), g.integers(2))
    return State(keep(x), size, None if place is None else keep(place))


def merge(
    g: Builder, state: State, feature: Value, received: Value, options: Matching, layout: Layout
) -> State:
    """Match, then merge, as ``dsm_tune.merging`` does it."""
    x, size, place = state
    order, partner = edges(g, state, feature, received, options, layout)
    source, kept, target = _parted(g, order, partner, layout)
    arrives = g.Cast(g.Equal(target, g.constant(np.arange(len(layout.odd)))), to=1)
    weight = _weight(g, received, options, layout)
    mass = size if weight is None else weight if size is None else g.Mul(size, weight)
    came, stayed, total = _masses(g, mass, arrives, source, layout)
    joins, stays = g.flipped(g.Div(came, total)), g.flipped(g.Div(stayed, total))

    def mean(values: Value, norm: str = "free") -> Value:
        odd, sources = g.Gather(values, g.constant(layout.odd), axis=1), g.rows(values, source)
        merged = g.Add(g.Mul(odd, stays), g.MatMul(joins, sources))
        return merged if norm == "free" else _scaled(g, merged, odd, sources, joins, stays, norm)

    def join(values: Value, odd: Value) -> Value:
        there = [g.cut(values, 0, layout.prefix)] if layout.prefix else []
        there += [g.rows(values, kept)] if layout.rest else []
        return g.Concat(*there, odd, axis=1)

    if place is not None and options.position == "centroid":
        place = join(place, mean(place))
    elif place is not None:
        place = join(place, g.Gather(place, g.constant(layout.odd), axis=1))
    if weight is not None:
        total = _masses(g, size, arrives, source, layout)[2]
    if size is None:
        known = g.repeated(x, np.ones((layout.count, 1)))
    else:
        known = g.Unsqueeze(size, g.integers(2))
    new_size = g.Squeeze(join(known, g.flipped(total)), g.integers(2))
    return State(join(x, mean(x, options.norm)), new_size, place)


def _parted(g: Builder, order: Value, partner: Value, layout: Layout) -> Any:
    """Positions of sources [B, r, 1] and of even tokens that stay, and the sources' partners."""
    target = g.GatherElements(partner, g.cut(order, 0, layout.r), axis=1)
    position = g.Add(g.Mul(order, g.constant(2)), g.constant(layout.even[0]))
    source, kept = g.cut(position, 0, layout.r), None
    if layout.rest:
        kept = g.ascending(g.cut(position, layout.r, len(layout.even)), layout.rest)
    return source, kept, target


def _weight(g: Builder, received: Value, options: Any, layout: Layout) -> Value:
    if received is None or not options.attention_weight:
        return None
    share = g.Mul(received, g.constant(layout.count, np.float32))
    weight = g.Max(share, g.constant(1e-3, np.float32))
    power = options.attention_weight
    return weight if power == 1 else g.Pow(weight, g.constant(power, np.float32))


def _masses(g: Builder, mass: Value, arrives: Value, source: Value, layout: Layout) -> Any:
    """What comes to each odd token [B, r, b], what was there and the total: [B, 1, b]."""
    came, stayed = arrives, g.constant([[[1.0]]], np.float32)
    if mass is not None:
        leaving = g.GatherElements(g.Unsqueeze(mass, g.integers(2)), source, axis=1)
        came = g.Mul(arrives, leaving)
        stayed = g.Unsqueeze(g.Gather(mass, g.constant(layout.odd), axis=1), g.integers(1))
    return came, stayed, g.Add(stayed, g.ReduceSum(came, g.integers(1), keepdims=1))


def _scaled(
    g: Builder, merged: Value, odd: Value, sources: Value, joins: Value, stays: Value, norm: str
) -> Value:
    """Scale merged tokens to the weighted mean or the largest length of what was merged.

    A token that nothing merges into has the same length before and after: the factor 1.
    """
    own = g.ReduceL2(odd, g.integers(2), keepdims=1)
    theirs = g.ReduceL2(sources, g.integers(2), keepdims=1)
    if norm == "mean":
        wanted = g.Add(g.Mul(own, stays), g.MatMul(joins, theirs))
    else:
        joined = g.Cast(g.Greater(joins, g.constant(0.0, np.float32)), to=1)
        longest = g.ReduceMax(g.Mul(joined, g.flipped(theirs)), g.integers(2), keepdims=1)
        wanted = g.Max(own, longest)
    length = g.ReduceL2(merged, g.integers(2), keepdims=1)
    return g.Mul(merged, g.Div(wanted, g.Max(length, g.constant(1e-6, np.float32))))
