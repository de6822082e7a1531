"""What the traced operators become in an ONNX graph: few nodes, static shapes, no scatter.

Letters in shapes as in :mod:`dsm_tune.merging.matching`; m tokens are left after a step. Every node
is of a kind that ONNX Runtime and TensorRT 10 both take. Keys that are sorted by are made distinct,
so that no order depends on how a runtime breaks ties, save for equal scores: the lower index first,
as in TopK.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from onnxscript import opset20 as op

from dsm_tune.merging.matching import PLACE_TOLERANCE
from dsm_tune.plan import MergePlan

__all__ = ["OPSET", "translations"]

OPSET = 20
NEVER = -1e30  # below every score; infinity is what some runtimes are careless with

Value = Any  # a tensor of the graph


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What each traced operator becomes, for ``torch.onnx.export``."""
    traced: Any = torch.ops
    return {
        traced.dsm_tune.attention.default: _attention_received,
        traced.dsm_tune.merge.default: _merge,
        traced.dsm_tune.prune.default: _prune,
        traced.aten.scaled_dot_product_attention.default: _attend,
        traced.aten.gelu.default: _gelu,
    }


def _constant(value: Any, kind: Any = np.int64) -> Value:
    return op.Constant(value=numpy_helper.from_array(np.asarray(value, dtype=kind)))


def _integers(*values: int) -> Value:
    return _constant(values)


def _gelu(x: Value, approximate: str = "none") -> Value:
    return op.Gelu(x, approximate=approximate)


def _attend(
    q: Value,
    k: Value,
    v: Value,
    attn_mask: Value = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """``softmax(q kᵀ · scale + mask) v``; [B, H, N, d], the mask [B, 1, 1, N]."""
    if is_causal or dropout_p or enable_gqa:
        raise NotImplementedError("plain attention only")
    return op.MatMul(_probabilities(q, k, attn_mask, scale or q.shape[-1] ** -0.5), v)


def _probabilities(q: Value, k: Value, mask: Value, scale: float) -> Value:
    logits = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    logits = op.Mul(logits, _constant(scale, np.float32))
    return op.Softmax(logits if mask is None else op.Add(logits, mask), axis=-1)


def _attention_received(q: Value, k: Value, log_size: Value, scale: float, whose: str) -> Value:
    """[B, N]. The block's own attention has the same nodes; they are merged with these."""
    mask = None
    if log_size is not None:
        # Unsqueezed as tracing unsqueezes the mask of the block, for both to be the same node.
        mask = op.Unsqueeze(op.Unsqueeze(log_size, _integers(1)), _integers(2))
    shares = _probabilities(q, k, mask, scale)
    if whose == "class":
        return op.ReduceMean(op.Gather(shares, _constant(0), axis=2), _integers(1), keepdims=0)
    return op.ReduceMean(shares, _integers(1, 2), keepdims=0)


def _rows(x: Value, index: Value) -> Value:
    """Rows of [B, n, C] at [B, m]: [B, m, C]."""
    return op.GatherND(x, op.Unsqueeze(index, _integers(2)), batch_dims=1)


def _unit(feature: Value) -> Value:
    length = op.ReduceL2(feature, _integers(-1), keepdims=1)
    return op.Div(feature, op.Max(length, _constant(1e-6, np.float32)))


def _batch_of(x: Value) -> Value:
    return op.Shape(x, start=0, end=1)


def _repeated(x: Value, row: Any, kind: Any = np.int64) -> Value:
    """n numbers once for each image of ``x``: [B, n]; ``None`` if n is 0."""
    if not len(row):
        return None
    return op.Expand(_constant([list(row)], kind), op.Concat(_batch_of(x), _integers(1), axis=0))


def _joined(*parts: Value) -> Value:
    """[B, n] of what there is."""
    there = [part for part in parts if part is not None]
    return op.Concat(*there, axis=1) if len(there) > 1 else there[0]


def _cut(x: Value, first: int, end: int) -> Value:
    """Columns of [B, n]."""
    return op.Slice(x, _integers(first), _integers(end), _integers(1))


class _Layout:
    """Where things are in the sequence of N tokens that enters a step; plain numbers."""

    def __init__(self, plan: MergePlan, block: int) -> None:
        self.prefix = plan.geometry.prefix
        self.count = plan.tokens[block]
        self.r = plan.removed[block]
        self.even = np.arange(self.prefix + self.prefix % 2, self.count, 2)
        self.odd = np.arange(self.prefix + 1 - self.prefix % 2, self.count, 2)
        self.step = next(step for step in plan.active_steps if step.block == block)
        columns = plan.geometry.grid[1]
        at = np.arange(plan.geometry.patches)
        grid = np.stack([at // columns, at % columns], axis=1)
        self.first_places = np.concatenate([np.zeros((self.prefix, 2)), grid])


def _prune(x: Value, scores: Value, size: Value, place: Value, plan: str, block: int) -> Any:
    """Keep the patch tokens with the highest scores, in order."""
    layout = _Layout(MergePlan.from_json(plan), block)
    prefix, left = layout.prefix, layout.count - layout.prefix - layout.r
    worth = _cut(scores, prefix, layout.count) if prefix else scores
    best = op.TopK(worth, _integers(left), axis=1)[1]
    stay = op.Add(_ascending(best, left), _constant(prefix))
    index = _joined(_repeated(x, range(prefix)), stay)
    new_size = x if size is None else op.GatherElements(size, index, axis=1)
    return _rows(x, index), new_size, _places(place, layout, index)


def _ascending(index: Value, count: int) -> Value:
    return op.TopK(index, _integers(count), axis=1, largest=0)[0]


def _places(place: Value, layout: _Layout, index: Value) -> Value:
    """[B, m, 2]: places at [B, m]; ``None`` for places means those of the first block."""
    if place is not None:
        return _rows(place, index)
    return op.Gather(_constant(layout.first_places, np.float32), index, axis=0)


def _merge(
    x: Value,
    feature: Value,
    size: Value,
    place: Value,
    received: Value,
    plan: str,
    block: int,
) -> Any:
    """Match, then merge, as :mod:`dsm_tune.merging.matching` does it.

    All m tokens that are left are gathered at once; what merges into them is added by a product
    with a matrix [m, r], whose rows are zero for the tokens that nothing merges into.
    """
    whole = MergePlan.from_json(plan)
    options, layout = whole.matching, _Layout(whole, block)
    order, partner = _edges(x, feature, size, place, received, options, layout)
    rest = len(layout.even) - layout.r
    chosen = _cut(order, 0, layout.r)
    target = op.GatherElements(partner, chosen, axis=1)
    source = _even_positions(chosen, layout)
    kept = [_even_positions(_cut(order, layout.r, len(layout.even)), layout)] if rest else []
    index = _joined(
        _repeated(x, range(layout.prefix)),
        *(_ascending(positions, rest) for positions in kept),
        _repeated(x, layout.odd),
    )
    slots = _constant(np.arange(layout.count - layout.r)[None, :, None] - layout.prefix - rest)
    arrives = op.Equal(op.Unsqueeze(target, _integers(1)), slots)
    weight = _weight(received, options, layout)
    came, stayed, total = _masses(size, weight, arrives, source, index)
    joins, stays = op.Div(came, total), op.Div(stayed, total)

    def mean(rows: Value, sources: Value) -> Value:
        return op.Add(op.Mul(rows, stays), op.MatMul(joins, sources))

    rows, sources = _rows(x, index), _rows(x, source)
    merged = mean(rows, sources)
    if options.norm != "free":
        merged = _scaled(merged, rows, sources, joins, stays, options.norm)
    new_place = _places(place, layout, index)
    if options.position == "centroid":
        new_place = mean(new_place, _places(place, layout, source))
    if weight is not None:
        total = _masses(size, None, arrives, source, index)[2]
    return merged, op.Squeeze(total, _integers(2)), new_place


def _even_positions(index: Value, layout: _Layout) -> Value:
    doubled = op.Mul(index, _constant(2))
    return op.Add(doubled, _constant(layout.even[0])) if layout.even[0] else doubled


def _weight(received: Value, options: Any, layout: _Layout) -> Value:
    if received is None or not options.attention_weight:
        return None
    share = op.Mul(received, _constant(layout.count, np.float32))
    weight = op.Max(share, _constant(1e-3, np.float32))
    power = options.attention_weight
    return weight if power == 1 else op.Pow(weight, _constant(power, np.float32))


def _masses(size: Value, weight: Value, arrives: Value, source: Value, index: Value) -> Any:
    """What comes to each token [B, m, r], what was there and the total, [B, m, 1]."""
    mass = size if weight is None else weight if size is None else op.Mul(size, weight)
    if mass is None:
        came = op.Cast(arrives, to=1)
        stayed = _constant(1.0, np.float32)
    else:
        leaving = op.Unsqueeze(op.GatherElements(mass, source, axis=1), _integers(1))
        came = op.Where(arrives, leaving, _constant(0.0, np.float32))
        stayed = op.Unsqueeze(op.GatherElements(mass, index, axis=1), _integers(2))
    return came, stayed, op.Add(stayed, op.ReduceSum(came, _integers(2), keepdims=1))


def _scaled(
    merged: Value, rows: Value, sources: Value, joins: Value, stays: Value, norm: str
) -> Value:
    """Scale merged tokens to the weighted mean or the largest length of what was merged."""
    own = op.ReduceL2(rows, _integers(2), keepdims=1)
    theirs = op.ReduceL2(sources, _integers(2), keepdims=1)
    if norm == "mean":
        wanted = op.Add(op.Mul(own, stays), op.MatMul(joins, theirs))
    else:
        joined = op.Greater(joins, _constant(0.0, np.float32))
        row = op.Transpose(theirs, perm=[0, 2, 1])
        lengths = op.Where(joined, row, _constant(0.0, np.float32))
        wanted = op.Max(own, op.ReduceMax(lengths, _integers(2), keepdims=1))
    length = op.ReduceL2(merged, _integers(2), keepdims=1)
    factor = op.Div(wanted, op.Max(length, _constant(1e-6, np.float32)))
    alone = op.Equal(stays, _constant(1.0, np.float32))
    return op.Mul(merged, op.Where(alone, _constant(1.0, np.float32), factor))


def _edges(
    x: Value,
    feature: Value,
    size: Value,
    place: Value,
    received: Value,
    options: Any,
    layout: _Layout,
) -> Any:
    """Even tokens in the order in which their edges are taken, and the partner of each: [B, a]."""
    even, odd = _constant(layout.even), _constant(layout.odd)
    unit = _unit(feature)
    scores = op.MatMul(
        op.Gather(unit, even, axis=1), op.Transpose(op.Gather(unit, odd, axis=1), perm=[0, 2, 1])
    )
    if options.size_penalty and size is not None:
        inverse = op.Reciprocal(size)
        across = op.Unsqueeze(op.Gather(inverse, even, axis=1), _integers(2))
        down = op.Unsqueeze(op.Gather(inverse, odd, axis=1), _integers(1))
        # log(s_a s_b / (s_a + s_b)) = -log(1 / s_a + 1 / s_b)
        penalty = op.Mul(op.Log(op.Add(across, down)), _constant(options.size_penalty, np.float32))
        scores = op.Add(scores, penalty)
    if options.feature == "random" and not (options.size_penalty and size is not None):
        shape = op.Concat(_batch_of(x), _integers(1, 1), axis=0)
        scores = op.Expand(scores, shape)
    best, partner = _largest(scores)
    tiles = crosses = None
    if layout.step.window:
        tiles, apart = _tiles(x, place, even, odd, layout)
        inside, inside_partner = _largest(op.Where(apart, _constant(NEVER, np.float32), scores))
        crosses = op.Less(inside, _constant(NEVER / 2, np.float32))
        best = op.Where(crosses, best, inside)
        partner = op.Where(crosses, partner, inside_partner)
    if received is not None and options.salience:
        bonus = _constant(-options.salience * layout.count, np.float32)
        best = op.Add(best, op.Mul(op.Gather(received, even, axis=1), bonus))
    count = len(layout.even)
    order = op.TopK(best, _integers(count), axis=1)[1]
    if layout.step.window:
        order = _in_rounds(order, tiles, crosses, count, options.quota == "equal")
    return order, partner


def _largest(scores: Value) -> Any:
    """Largest of each row of [B, a, b] and its index: [B, a] each."""
    return (
        op.ReduceMax(scores, _integers(2), keepdims=0),
        op.ArgMax(scores, axis=2, keepdims=0),
    )


def _tiles(x: Value, place: Value, even: Value, odd: Value, layout: _Layout) -> Any:
    """Tile of each even token [B, a], and whether an odd one is in another [B, a, b]."""
    window = layout.step.window
    if place is None:
        corner = np.floor((layout.first_places + PLACE_TOLERANCE) / window)
        tile = corner[:, 0] * 4096 + corner[:, 1]
        apart = tile[layout.even][:, None] != tile[layout.odd][None, :]
        return _repeated(x, tile[layout.even], np.float32), _constant(apart[None], np.bool_)
    shifted = op.Add(place, _constant(PLACE_TOLERANCE, np.float32))
    corner = op.Floor(op.Div(shifted, _constant(window, np.float32)))
    number = op.MatMul(corner, _constant([4096.0, 1.0], np.float32))
    tile, other = op.Gather(number, even, axis=1), op.Gather(number, odd, axis=1)
    same = op.Equal(op.Unsqueeze(tile, _integers(2)), op.Unsqueeze(other, _integers(1)))
    return tile, op.Not(same)


def _in_rounds(order: Value, tiles: Value, crosses: Value, count: int, equal: bool) -> Value:
    """Reorder [B, a]: one edge of each tile per round, or as they are; crossing edges last."""
    crossing = op.GatherElements(op.Cast(crosses, to=1), order, axis=1)
    last = op.Mul(crossing, _constant(count, np.float32))
    if equal:
        # A crossing edge stands in a tile of its own, so that it delays no other.
        ranked = op.Sub(op.GatherElements(tiles, order, axis=1), op.Mul(crossing, _constant(1e7, np.float32)))
        same = op.Equal(op.Unsqueeze(ranked, _integers(2)), op.Unsqueeze(ranked, _integers(1)))
        earlier = _constant(np.tri(count, k=-1)[None], np.bool_)
        before = op.Cast(op.And(same, earlier), to=1)
        last = op.Add(last, op.ReduceSum(before, _integers(2), keepdims=0))
    key = op.Add(op.Mul(last, _constant(count, np.float32)), _constant(np.arange(count), np.float32))
    return op.GatherElements(order, op.TopK(key, _integers(count), axis=1, largest=0)[1], axis=1)
