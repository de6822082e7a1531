"""The steps of a plan as one operator each, so that a traced model holds them whole.

What such an operator becomes in an ONNX graph is written down in
:mod:`dsm_tune.exporting.lowering`, in fewer and cheaper nodes than its tensor functions would give
one by one. Traced only: none of them computes anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune.merging import scores
from dsm_tune.merging.backbone import Projections
from dsm_tune.merging.joining import Tokens
from dsm_tune.merging.merged import MergedBlocks, merged_view
from dsm_tune.plan import MergePlan, Step

__all__ = ["attention_step", "merge_step", "prune_step", "view_to_trace"]


@torch.library.custom_op("dsm_tune::attention", mutates_args=())
def attention_step(
    q: Tensor, k: Tensor, log_size: Tensor | None, scale: float, whose: str
) -> Tensor:
    """What :func:`~dsm_tune.merging.scores.attention_to` gives: [B, N] float32."""
    raise NotImplementedError("only traced")


@torch.library.custom_op("dsm_tune::merge", mutates_args=())
def merge_step(
    x: Tensor,
    feature: Tensor,
    size: Tensor | None,
    place: Tensor | None,
    received: Tensor | None,
    plan: str,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, sizes and places after the merge of a block; ``plan`` is its JSON."""
    raise NotImplementedError("only traced")


@torch.library.custom_op("dsm_tune::prune", mutates_args=())
def prune_step(
    x: Tensor, scores: Tensor, size: Tensor | None, place: Tensor | None, plan: str, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, sizes and places after the pruning of a block; ``plan`` is its JSON."""
    raise NotImplementedError("only traced")


@attention_step.register_fake
def _(q: Tensor, k: Tensor, log_size: Tensor | None, scale: float, whose: str) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)


@merge_step.register_fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(x, *others[-2:])


@prune_step.register_fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(x, *others[-2:])


def _shapes(x: Tensor, plan: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    left = x.shape[1] - MergePlan.from_json(plan).removed[block]
    size = x.new_empty(x.shape[0], left, dtype=torch.float32)
    place = x.new_empty(x.shape[0], left, 2, dtype=torch.float32)
    return x.new_empty(x.shape[0], left, x.shape[2]), size, place


def view_to_trace(model: nn.Module, plan: MergePlan) -> nn.Module:
    """Return a view of a model under a plan whose steps are the operators of this module.

    Args:
        model: not merged; it shares its weights with the view and stays as it is.
        plan: made for its geometry.

    Raises:
        ModelError: if the model cannot be merged or is merged already.
        PlanError: if the plan is for another geometry.
    """
    view = merged_view(model, plan)
    blocks: Any = view.blocks

    def take_step(
        tokens: Tokens, step: Step, parts: Projections, log_size: Tensor | None
    ) -> Tokens:
        return _take_step(blocks, tokens, step, parts, log_size)

    object.__setattr__(blocks, "_take_step", take_step)
    return view


def _take_step(
    blocks: MergedBlocks, tokens: Tokens, step: Step, parts: Projections, log_size: Tensor | None
) -> Tokens:
    plan = blocks.plan
    options, written = plan.matching, plan.to_json()
    whose = options.prune_score if step.kind == "prune" else options.attention
    received = None
    if whose != "norm" and (step.kind == "prune" or options.needs_attention):
        received = attention_step(parts.q, parts.k, log_size, parts.scale, whose)
    if step.kind == "merge" or received is None:
        feature = _feature(blocks, tokens.x, step, parts)
    known = tokens.size, tokens.place
    if step.kind == "merge":
        x, size, place = merge_step(tokens.x, feature, *known, received, written, step.block)
    else:
        worth = feature.float().norm(dim=-1) if received is None else received
        x, size, place = prune_step(tokens.x, worth, *known, written, step.block)
    has_size = step.kind == "merge" or tokens.size is not None
    has_place = step.block < blocks.last_local
    return Tokens(x, size if has_size else None, place if has_place else None)


def _feature(blocks: MergedBlocks, x: Tensor, step: Step, parts: Projections) -> Tensor:
    """[B, N, F]; [1, N, F] where it is random."""
    kind = blocks.plan.matching.feature
    if kind == "random":
        fixed: Tensor = getattr(blocks, f"random_feature_{step.block}")
        if step.kind == "prune":
            return fixed.expand(x.shape[0], -1, -1)
        return fixed
    return scores.feature_of(kind, x, parts, level=step.kind == "merge")
