"""What becomes of tokens when some merge with others, as ONNX nodes.

What :func:`dsm_tune.merging.joining.merge` computes; letters in shapes as there.
"""

from __future__ import annotations

import numpy as np

from dsm_tune.plan import Matching
from dsm_tune.runtimes.onnx.nodes import Builder, Layout, State, Value

__all__ = ["Moves", "join", "length"]

SHORTEST = 1e-20  # length of a weighted sum; only a sum of nothing is shorter


class Moves:
    """Who goes where in a step; builds what becomes of values [B, N, n] by it.

    Args:
        stays: which of all B N rows stay, in their new order: [B, N - r].
        leaves: which leave: [B, r].
        joins: whom these join, one-hot: [B, r, N - r] float32.
    """

    def __init__(self, g: Builder, stays: Value, leaves: Value, joins: Value) -> None:
        self.g, self.stays, self.leaves, self.joins = g, stays, leaves, joins

    def staying(self, x: Value) -> Value:
        """[B, N, n] to [B, N - r, n]."""
        return self.g.rows(x, self.stays)

    def leaving(self, x: Value) -> Value:
        """[B, N, n] to [B, r, n]."""
        return self.g.rows(x, self.leaves)

    def arriving(self, x: Value) -> Value:
        """What those that leave, [B, r, n], bring to those that stay: [B, N - r, n]."""
        return self.g.MatMul(self.g.flipped(self.joins), x)

    def total(self, x: Value) -> Value:
        """What meets in each token that stays: [B, N, n] to [B, N - r, n]."""
        return self.g.Add(self.staying(x), self.arriving(self.leaving(x)))


def join(
    g: Builder, state: State, weight: Value, options: Matching, layout: Layout, moves: Moves
) -> State:
    """Merge those that leave into those whom they join: weighted means.

    Args:
        g: where the nodes are put.
        state: what enters the step.
        weight: [B, N, 1] above 0, multiplied with the sizes, or ``None``.
        options: of the plan.
        layout: of the step.
        moves: of the step.
    """
    means = _by_shares if options.norm == "free" else _by_length
    return means(g, state, weight, options, layout, moves)


def _by_shares(
    g: Builder, state: State, weight: Value, options: Matching, layout: Layout, moves: Moves
) -> State:
    """Weighted means by shares, so that a token that nothing joins keeps its bits."""
    x, size, place = state

    def meet(mass: Value) -> tuple[Value, Value, Value]:
        """What comes [B, r, 1], what is there and the total: [B, N - r, 1]."""
        if mass is None:
            left = layout.count - layout.r
            there, comes = (g.constant(np.ones((1, n, 1)), np.float32) for n in (left, layout.r))
        else:
            there, comes = moves.staying(mass), moves.leaving(mass)
        return comes, there, g.Add(there, moves.arriving(comes))

    comes, there, new_size = meet(size)
    total = new_size
    if weight is not None:
        comes, there, total = meet(weight if size is None else g.Mul(size, weight))
    shares, keeps = g.Div(comes, g.MatMul(moves.joins, total)), g.Div(there, total)

    def mean(values: Value) -> Value:
        arriving = moves.arriving(g.Mul(moves.leaving(values), shares))
        return g.Add(g.Mul(moves.staying(values), keeps), arriving)

    if place is not None:
        place = mean(place) if options.position == "centroid" else moves.staying(place)
    return State(mean(x), new_size, place)


def _by_length(
    g: Builder, state: State, weight: Value, options: Matching, layout: Layout, moves: Moves
) -> State:
    """Weighted sums, scaled to the length that is wanted: no token is divided by its weight.

    What is summed besides the tokens is summed together.
    """
    x, size, place = state
    centroid = place is not None and options.position == "centroid"
    lengths = length(g, x)
    whole = g.repeated(x, np.ones((layout.count, 1))) if size is None else size
    mass = whole if weight is None else g.Mul(whole, weight)
    summed = {"size": (whole, 1)}
    if weight is not None:
        summed["mass"] = mass, 1
    if options.norm == "mean":
        summed["length"] = g.Mul(mass, lengths), 1
    if centroid:
        summed["place"] = g.Mul(place, mass), 2
    values, widths = zip(*summed.values(), strict=True)
    columns = moves.total(g.Concat(*values, axis=2) if len(values) > 1 else values[0])
    totals = dict(zip(summed, g.split(columns, *widths), strict=True))
    total = totals.get("mass", totals["size"])
    if options.norm == "mean":
        wanted = g.Div(totals["length"], total)
    else:
        brought = g.Mul(moves.joins, moves.leaving(lengths))
        longest = g.ReduceMax(brought, g.integers(1), keepdims=1)
        wanted = g.Max(moves.staying(lengths), g.flipped(longest))
    merged = moves.total(x if size is None and weight is None else g.Mul(x, mass))
    actual = g.Max(length(g, merged), g.constant(SHORTEST, np.float32))
    if place is not None:
        place = g.Div(totals["place"], total) if centroid else moves.staying(place)
    return State(g.Mul(merged, g.Div(wanted, actual)), totals["size"], place)


def length(g: Builder, x: Value) -> Value:
    """Lengths of [B, n, C]: [B, n, 1]; in three nodes, which take half of what ReduceL2 takes."""
    return g.Sqrt(g.ReduceSum(g.Mul(x, x), g.integers(2), keepdims=1))
