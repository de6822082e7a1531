"""What the traced operators become in an ONNX graph: few nodes, static shapes, no scatter.

Letters in shapes as in :mod:`dsm_tune.merging.matching`. Every node is of a kind that ONNX Runtime
and TensorRT 10 both take. Of equal scores the lower index comes first, as TopK and ArgMax have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx_ir.passes import common

from dsm_tune.exporting.edges import edges
from dsm_tune.exporting.nodes import (
    Layout,
    Value,
    ascending,
    constant,
    cut,
    flipped,
    integers,
    op,
    repeated,
    rows,
)
from dsm_tune.plan import MergePlan

__all__ = ["tidied", "translations"]


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
        traced.aten.clamp_min.default: _at_least,
    }


def tidied(model: onnx_ir.Model, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The graph with each node once, its numbers as initializers, and no trace of its making."""
    common.ClearMetadataAndDocStringPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    model.metadata_props.update(metadata)
    return onnx_ir.to_proto(model)


def _at_least(x: Value, least: float) -> Value:
    """Of float32, as the lengths are that are bounded so."""
    return op.Max(x, constant(least, np.float32))


def _view(x: Value, shape: Sequence[Any]) -> Value:
    """One side may be the batch, which any runtime finds by itself."""
    sides = [side if isinstance(side, int) else -1 for side in shape]
    if sides.count(-1) > 1:
        raise NotImplementedError("one side of any length only")
    return op.Reshape(x, integers(*sides))


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
    logits = op.Mul(logits, constant(scale, np.float32))
    return op.Softmax(logits if mask is None else op.Add(logits, mask), axis=-1)


def _attention_received(q: Value, k: Value, log_size: Value, scale: float, whose: str) -> Value:
    """[B, N]. The block's own attention has the same nodes; they are merged with these."""
    mask = None
    if log_size is not None:
        # Unsqueezed as tracing unsqueezes the mask of the block, for both to be the same node.
        mask = op.Unsqueeze(op.Unsqueeze(log_size, integers(1)), integers(2))
    shares = _probabilities(q, k, mask, scale)
    if whose == "class":
        return op.ReduceMean(op.Gather(shares, constant(0), axis=2), integers(1), keepdims=0)
    return op.ReduceMean(shares, integers(1, 2), keepdims=0)


def _prune(x: Value, scores: Value, size: Value, place: Value, plan: str, block: int) -> Any:
    """Keep the patch tokens with the highest scores, in order."""
    layout = Layout(MergePlan.from_json(plan), block)
    prefix, left = layout.prefix, layout.count - layout.prefix - layout.r
    best = op.TopK(cut(scores, prefix, layout.count), integers(left), axis=1)[1]
    kept = op.Unsqueeze(op.Add(ascending(best, left), constant(prefix)), integers(2))

    def keep(values: Value) -> Value:
        return op.Concat(cut(values, 0, prefix), rows(values, kept), axis=1)

    if place is None:
        place = repeated(x, layout.places())
    new_size = x
    if size is not None:
        new_size = op.Squeeze(keep(op.Unsqueeze(size, integers(2))), integers(2))
    return keep(x), new_size, keep(place)


def _merge(
    x: Value, feature: Value, size: Value, place: Value, received: Value, plan: str, block: int
) -> Any:
    """Match, then merge, as :mod:`dsm_tune.merging.matching` does it."""
    whole = MergePlan.from_json(plan)
    options, layout = whole.matching, Layout(whole, block)
    if place is None:
        place = repeated(x, layout.places())
    order, partner = edges(x, feature, size, place, received, options, layout)
    source, kept, target = _parted(order, partner, layout)
    arrives = op.Cast(op.Equal(target, constant(np.arange(len(layout.odd)))), to=1)
    weight = _weight(received, options, layout)
    mass = size if weight is None else weight if size is None else op.Mul(size, weight)
    came, stayed, total = _masses(mass, arrives, source, layout)
    joins, stays = flipped(op.Div(came, total)), flipped(op.Div(stayed, total))

    def mean(values: Value, norm: str = "free") -> Value:
        odd, sources = op.Gather(values, constant(layout.odd), axis=1), rows(values, source)
        merged = op.Add(op.Mul(odd, stays), op.MatMul(joins, sources))
        return merged if norm == "free" else _scaled(merged, odd, sources, joins, stays, norm)

    def join(values: Value, odd: Value) -> Value:
        there = [cut(values, 0, layout.prefix)] if layout.prefix else []
        there += [rows(values, kept)] if layout.rest else []
        return op.Concat(*there, odd, axis=1)

    if options.position == "centroid":
        new_place = join(place, mean(place))
    else:
        new_place = join(place, op.Gather(place, constant(layout.odd), axis=1))
    if weight is not None:
        total = _masses(size, arrives, source, layout)[2]
    if size is None:
        known = repeated(x, np.ones((layout.count, 1)))
    else:
        known = op.Unsqueeze(size, integers(2))
    new_size = op.Squeeze(join(known, flipped(total)), integers(2))
    return join(x, mean(x, options.norm)), new_size, new_place


def _parted(order: Value, partner: Value, layout: Layout) -> Any:
    """Positions of sources [B, r, 1] and of even tokens that stay, and the sources' partners."""
    target = op.GatherElements(partner, cut(order, 0, layout.r), axis=1)
    position = op.Add(op.Mul(order, constant(2)), constant(layout.even[0]))
    source, kept = cut(position, 0, layout.r), None
    if layout.rest:
        kept = ascending(cut(position, layout.r, len(layout.even)), layout.rest)
    return source, kept, target


def _weight(received: Value, options: Any, layout: Layout) -> Value:
    if received is None or not options.attention_weight:
        return None
    share = op.Mul(received, constant(layout.count, np.float32))
    weight = op.Max(share, constant(1e-3, np.float32))
    power = options.attention_weight
    return weight if power == 1 else op.Pow(weight, constant(power, np.float32))


def _masses(mass: Value, arrives: Value, source: Value, layout: Layout) -> Any:
    """What comes to each odd token [B, r, b], what was there and the total: [B, 1, b]."""
    came, stayed = arrives, constant([[[1.0]]], np.float32)
    if mass is not None:
        leaving = op.GatherElements(op.Unsqueeze(mass, integers(2)), source, axis=1)
        came = op.Mul(arrives, leaving)
        stayed = op.Unsqueeze(op.Gather(mass, constant(layout.odd), axis=1), integers(1))
    return came, stayed, op.Add(stayed, op.ReduceSum(came, integers(1), keepdims=1))


def _scaled(
    merged: Value, odd: Value, sources: Value, joins: Value, stays: Value, norm: str
) -> Value:
    """Scale merged tokens to the weighted mean or the largest length of what was merged.

    A token that nothing merges into has the same length before and after: the factor 1.
    """
    own = op.ReduceL2(odd, integers(2), keepdims=1)
    theirs = op.ReduceL2(sources, integers(2), keepdims=1)
    if norm == "mean":
        wanted = op.Add(op.Mul(own, stays), op.MatMul(joins, theirs))
    else:
        joined = op.Cast(op.Greater(joins, constant(0.0, np.float32)), to=1)
        longest = op.ReduceMax(op.Mul(joined, flipped(theirs)), integers(2), keepdims=1)
        wanted = op.Max(own, longest)
    length = op.ReduceL2(merged, integers(2), keepdims=1)
    return op.Mul(merged, op.Div(wanted, op.Max(length, constant(1e-6, np.float32))))
