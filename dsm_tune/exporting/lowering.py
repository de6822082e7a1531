"""What the traced operators become in an ONNX graph: few nodes, static shapes, no scatter.

Letters in shapes as in :mod:`dsm_tune.merging.matching`; m tokens are left after a step. Every node
is of a kind that ONNX Runtime and TensorRT 10 both take. Keys that are sorted by are made distinct,
so that no order depends on how a runtime breaks ties, save for equal scores: the lower index first,
as in TopK.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import numpy_helper
from onnx_ir.passes import common
from onnxscript import opset20 as op

from dsm_tune.merging.matching import PLACE_TOLERANCE
from dsm_tune.plan import MergePlan

__all__ = ["OPSET", "tidied", "translations"]

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
        traced.aten.view.default: _view,
    }


def _constant(value: Any, kind: Any = np.int64) -> Value:
    return op.Constant(value=numpy_helper.from_array(np.asarray(value, dtype=kind)))


def _integers(*values: int) -> Value:
    return _constant(values)


def tidied(model: onnx_ir.Model, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The graph with each node once, its numbers as initializers, and no word of how it was made."""
    common.ClearMetadataAndDocStringPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    model.metadata_props.update(metadata)
    return onnx_ir.to_proto(model)


def _view(x: Value, shape: Sequence[Any]) -> Value:
    """One side may be the batch, which any runtime finds by itself."""
    sides = [side if isinstance(side, int) else -1 for side in shape]
    if sides.count(-1) > 1:
        raise NotImplementedError("one side of any length only")
    return op.Reshape(x, _integers(*sides))


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
    """Rows of [B, n, C] at [B, m, 1]: [B, m, C]."""
    return op.GatherND(x, index, batch_dims=1)


def _cut(x: Value, first: int, end: int) -> Value:
    """Tokens of [B, n, ...]."""
    return op.Slice(x, _integers(first), _integers(end), _integers(1))


def _ascending(index: Value, count: int) -> Value:
    return op.TopK(index, _integers(count), axis=1, largest=0)[0]


def _flipped(x: Value) -> Value:
    return op.Transpose(x, perm=[0, 2, 1])


def _repeated(x: Value, rows: Any, kind: Any = np.float32) -> Value:
    """[n, ...] numbers once for each image of ``x``: [B, n, ...]."""
    batch = op.Shape(x, start=0, end=1)
    shape = op.Concat(batch, _integers(*np.shape(rows)), axis=0)
    return op.Expand(_constant(np.asarray(rows)[None], kind), shape)


class _Layout:
    """Where things are in the sequence of N tokens that enters a step; plain numbers."""

    def __init__(self, plan: MergePlan, block: int) -> None:
        self.geometry, self.prefix = plan.geometry, plan.geometry.prefix
        self.count, self.r = plan.tokens[block], plan.removed[block]
        self.even = np.arange(self.prefix + self.prefix % 2, self.count, 2)
        self.odd = np.arange(self.prefix + 1 - self.prefix % 2, self.count, 2)
        self.rest = len(self.even) - self.r
        self.window = next(s.window for s in plan.active_steps if s.block == block)

    def places(self) -> Any:
        """[N, 2] row and column in the original grid, while no token has left; prefix: 0, 0."""
        columns, at = self.geometry.grid[1], np.arange(self.geometry.patches)
        grid = np.stack([at // columns, at % columns], axis=1)
        return np.concatenate([np.zeros((self.prefix, 2)), grid])


def _prune(x: Value, scores: Value, size: Value, place: Value, plan: str, block: int) -> Any:
    """Keep the patch tokens with the highest scores, in order."""
    layout = _Layout(MergePlan.from_json(plan), block)
    prefix, left = layout.prefix, layout.count - layout.prefix - layout.r
    best = op.TopK(_cut(scores, prefix, layout.count), _integers(left), axis=1)[1]
    kept = op.Unsqueeze(op.Add(_ascending(best, left), _constant(prefix)), _integers(2))

    def keep(values: Value) -> Value:
        return op.Concat(_cut(values, 0, prefix), _rows(values, kept), axis=1)

    if place is None:
        place = _repeated(x, layout.places())
    new_size = x
    if size is not None:
        new_size = op.Squeeze(keep(op.Unsqueeze(size, _integers(2))), _integers(2))
    return keep(x), new_size, keep(place)


def _merge(
    x: Value, feature: Value, size: Value, place: Value, received: Value, plan: str, block: int
) -> Any:
    """Match, then merge, as :mod:`dsm_tune.merging.matching` does it."""
    whole = MergePlan.from_json(plan)
    options, layout = whole.matching, _Layout(whole, block)
    if place is None:
        place = _repeated(x, layout.places())
    order, partner = _edges(x, feature, size, place, received, options, layout)
    source, kept, target = _parted(order, partner, layout)
    arrives = op.Cast(op.Equal(target, _constant(np.arange(len(layout.odd)))), to=1)
    weight = _weight(received, options, layout)
    mass = size if weight is None else weight if size is None else op.Mul(size, weight)
    came, stayed, total = _masses(mass, arrives, source, layout)
    joins, stays = _flipped(op.Div(came, total)), _flipped(op.Div(stayed, total))

    def mean(values: Value, norm: str = "free") -> Value:
        odd, sources = op.Gather(values, _constant(layout.odd), axis=1), _rows(values, source)
        merged = op.Add(op.Mul(odd, stays), op.MatMul(joins, sources))
        return merged if norm == "free" else _scaled(merged, odd, sources, joins, stays, norm)

    def join(values: Value, odd: Value) -> Value:
        there = [_cut(values, 0, layout.prefix)] if layout.prefix else []
        there += [_rows(values, kept)] if layout.rest else []
        return op.Concat(*there, odd, axis=1)

    if options.position == "centroid":
        new_place = join(place, mean(place))
    else:
        new_place = join(place, op.Gather(place, _constant(layout.odd), axis=1))
    if weight is not None:
        total = _masses(size, arrives, source, layout)[2]
    if size is None:
        known = _repeated(x, np.ones((layout.count, 1)))
    else:
        known = op.Unsqueeze(size, _integers(2))
    new_size = op.Squeeze(join(known, _flipped(total)), _integers(2))
    return join(x, mean(x, options.norm)), new_size, new_place


def _parted(order: Value, partner: Value, layout: _Layout) -> Any:
    """Positions of sources [B, r, 1] and of even tokens that stay, and the sources' partners."""
    target = op.GatherElements(partner, _cut(order, 0, layout.r), axis=1)
    position = op.Add(op.Mul(order, _constant(2)), _constant(layout.even[0]))
    source, kept = _cut(position, 0, layout.r), None
    if layout.rest:
        kept = _ascending(_cut(position, layout.r, len(layout.even)), layout.rest)
    return source, kept, target


def _weight(received: Value, options: Any, layout: _Layout) -> Value:
    if received is None or not options.attention_weight:
        return None
    share = op.Mul(received, _constant(layout.count, np.float32))
    weight = op.Max(share, _constant(1e-3, np.float32))
    power = options.attention_weight
    return weight if power == 1 else op.Pow(weight, _constant(power, np.float32))


def _masses(mass: Value, arrives: Value, source: Value, layout: _Layout) -> Any:
    """What comes to each odd token [B, r, b], what was there and the total: [B, 1, b]."""
    came, stayed = arrives, _constant([[[1.0]]], np.float32)
    if mass is not None:
        leaving = op.GatherElements(op.Unsqueeze(mass, _integers(2)), source, axis=1)
        came = op.Mul(arrives, leaving)
        stayed = op.Unsqueeze(op.Gather(mass, _constant(layout.odd), axis=1), _integers(1))
    return came, stayed, op.Add(stayed, op.ReduceSum(came, _integers(1), keepdims=1))


def _scaled(
    merged: Value, odd: Value, sources: Value, joins: Value, stays: Value, norm: str
) -> Value:
    """Scale merged tokens to the weighted mean or the largest length of what was merged.

    A token that nothing merges into has the same length before and after: the factor 1.
    """
    own = op.ReduceL2(odd, _integers(2), keepdims=1)
    theirs = op.ReduceL2(sources, _integers(2), keepdims=1)
    if norm == "mean":
        wanted = op.Add(op.Mul(own, stays), op.MatMul(joins, theirs))
    else:
        joined = op.Cast(op.Greater(joins, _constant(0.0, np.float32)), to=1)
        longest = op.ReduceMax(op.Mul(joined, _flipped(theirs)), _integers(2), keepdims=1)
        wanted = op.Max(own, longest)
    length = op.ReduceL2(merged, _integers(2), keepdims=1)
    return op.Mul(merged, op.Div(wanted, op.Max(length, _constant(1e-6, np.float32))))


def _edges(
    x: Value,
    feature: Value,
    size: Value,
    place: Value,
    received: Value,
    options: Any,
    layout: _Layout,
) -> Any:
    """Even tokens in the order in which their edges are taken, and the partner of each: [B, a, 1]."""
    even, odd, count = _constant(layout.even), _constant(layout.odd), len(layout.even)
    scores, unit = _scores(x, feature, size, options, layout)
    best, partner = _largest(scores)
    tiles = crosses = None
    if layout.window:
        tile = _tiles(place, layout.window)
        tiles = op.Gather(tile, even, axis=1)
        same = op.Equal(tiles, _flipped(op.Gather(tile, odd, axis=1)))
        inside, inside_partner = _largest(op.Where(same, scores, _constant(NEVER, np.float32)))
        crosses = op.Less(inside, _constant(NEVER / 2, np.float32))
        best = op.Where(crosses, best, inside)
        partner = op.Where(crosses, partner, inside_partner)
    if received is not None and options.salience:
        bonus = _constant(-options.salience * layout.count * unit, np.float32)
        salient = op.Unsqueeze(op.Gather(received, even, axis=1), _integers(2))
        best = op.Add(best, op.Mul(salient, bonus))
    order = op.TopK(best, _integers(count), axis=1)[1]
    if layout.window:
        order = _in_rounds(order, tiles, crosses, count, options.quota == "equal")
    return order, partner


def _scores(x: Value, feature: Value, size: Value, options: Any, layout: _Layout) -> Any:
    """Scores [B, a, b], and the number that they are a multiple by.

    With a size penalty β they are divided by it: ``cosine / β + log(1 / s_a + 1 / s_b)``, for
    ``s_a s_b / (s_a + s_b)`` is the inverse of ``1 / s_a + 1 / s_b``.
    """
    even, odd = _constant(layout.even), _constant(layout.odd)
    length = op.ReduceL2(feature, _integers(-1), keepdims=1)
    unit = op.Div(feature, op.Max(length, _constant(1e-6, np.float32)))
    cosine = op.MatMul(op.Gather(unit, even, axis=1), _flipped(op.Gather(unit, odd, axis=1)))
    if options.size_penalty and size is not None:
        inverse = op.Reciprocal(size)
        across = op.Unsqueeze(op.Gather(inverse, even, axis=1), _integers(2))
        down = op.Unsqueeze(op.Gather(inverse, odd, axis=1), _integers(1))
        times = 1 / options.size_penalty
        scaled = op.Mul(cosine, _constant(times, np.float32))
        return op.Add(scaled, op.Log(op.Add(across, down))), times
    if options.feature == "random":  # one row for all images so far
        cosine = op.Add(cosine, _repeated(x, np.zeros((1, 1))))
    return cosine, 1.0


def _largest(scores: Value) -> Any:
    """Largest of each row of [B, a, b] and its index: [B, a, 1] each."""
    return op.ReduceMax(scores, _integers(2), keepdims=1), op.ArgMax(scores, axis=2, keepdims=1)


def _tiles(place: Value, window: int) -> Value:
    """Number of the tile in which each place is: [B, N, 1]."""
    shifted = op.Add(place, _constant(PLACE_TOLERANCE, np.float32))
    corner = op.Floor(op.Div(shifted, _constant(window, np.float32)))
    return op.MatMul(corner, _constant([[4096.0], [1.0]], np.float32))


def _in_rounds(order: Value, tiles: Value, crosses: Value, count: int, equal: bool) -> Value:
    """Reorder [B, a, 1]: one edge of each tile per round, or as they are; crossing edges last."""
    crossing = op.GatherElements(op.Cast(crosses, to=1), order, axis=1)
    turn = op.Mul(crossing, _constant(count, np.float32))
    if equal:
        # A crossing edge stands in no tile, so that it delays no other.
        aside = op.Mul(crossing, _constant(-1e9, np.float32))
        ranked = op.Add(op.GatherElements(tiles, order, axis=1), aside)
        earlier = _constant(np.tri(count, k=-1), np.bool_)
        before = op.Cast(op.And(op.Equal(ranked, _flipped(ranked)), earlier), to=1)
        turn = op.Add(turn, op.ReduceSum(before, _integers(2), keepdims=1))
    # Within a round the order stays; distinct keys leave no tie to the runtime.
    key = op.Mul(turn, _constant(count, np.float32))
    key = op.Add(key, _constant(np.arange(count)[:, None], np.float32))
    return op.GatherElements(order, op.TopK(key, _integers(count), axis=1, largest=0)[1], axis=1)
