"""Put a model under a plan, and give it back untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune.errors import ModelError, PlanError
from dsm_tune.merging import backbone
from dsm_tune.merging.blocks import MergedBlocks
from dsm_tune.merging.joining import Tokens
from dsm_tune.plan import MergePlan

__all__ = ["apply", "finish", "merged", "merged_view", "trace"]


def apply(model: nn.Module, plan: MergePlan) -> Callable[[], None]:
    """Put a model under a plan for good.

    Args:
        model: a model that :func:`~dsm_tune.merging.backbone.read_geometry` accepts.
        plan: made for that geometry.

    Returns:
        A function that gives the model back untouched.

    Raises:
        ModelError: if the model is already merged, or cannot be.
        PlanError: if the plan is for another geometry.
    """
    parts: Any = model
    if isinstance(getattr(model, "blocks", None), MergedBlocks):
        raise ModelError("a model must not be merged twice, but this one is merged already")
    geometry = backbone.read_geometry(model)
    if geometry != plan.geometry:
        raise PlanError(f"the plan is for {plan.geometry}, but the model has {geometry}")
    blocks, patch_dropping = parts.blocks, getattr(parts.patch_drop, "prob", 0.0)
    if patch_dropping and model.training:
        raise ModelError(
            "a merged model must not drop patches, but patch_drop_rate is set; use eval()"
        )
    merged_blocks = MergedBlocks(blocks, plan)
    merged_blocks.training = blocks.training  # train() would set the mode of every block too
    device = next(model.parameters()).device
    for name, buffer in merged_blocks.named_buffers(recurse=False):
        setattr(merged_blocks, name, buffer.to(device))
    norm, pool = parts.norm, parts.attn_pool
    if plan.pools_by_size:
        # No children of the blocks, or they would appear in the state_dict twice.
        object.__setattr__(merged_blocks, "final_norm", norm)
        object.__setattr__(norm, "forward", _done_already)
        merged_blocks.pooled_from = 0 if parts.pool_include_prefix else geometry.prefix
        if pool is not None:
            object.__setattr__(merged_blocks, "attention_pool", pool)
            object.__setattr__(pool, "forward", _pooled_already)
    parts.blocks = merged_blocks

    def restore() -> None:
        parts.blocks = blocks
        for module in (norm, pool):
            if module is not None:
                module.__dict__.pop("forward", None)

    return restore


def _done_already(x: Tensor) -> Tensor:
    """What the final norm does where :meth:`MergedBlocks.leave` has applied it."""
    return x


def _pooled_already(x: Tensor) -> Tensor:
    """What an attention-pooling head does of [B, 1, C] that it has pooled before."""
    return x[:, 0]


@contextmanager
def merged(model: nn.Module, plan: MergePlan) -> Iterator[nn.Module]:
    """Run a model under a plan inside a ``with`` block.

    Args:
        model: a timm ``VisionTransformer`` or ``VisionTransformerDistilled``.
        plan: made for the geometry of this model.

    Yields:
        The model itself, merging; on leaving, also by an exception, it is as it was.

    Raises:
        ModelError: if the model cannot be merged or is merged already.
        PlanError: if the plan is for another geometry.
    """
    restore = apply(model, plan)
    try:
        yield model
    finally:
        restore()


def merged_view(model: nn.Module, plan: MergePlan) -> nn.Module:
    """Return a second model that shares all weights with ``model`` and is under a plan for good."""
    view = copy.copy(model)
    view._modules = dict(model._modules)
    for name in ("norm", "attn_pool"):  # `apply` may change how they are called
        if model._modules.get(name) is not None:
            view._modules[name] = copy.copy(model._modules[name])
    apply(view, plan)
    return view


def finish(model: nn.Module, plan: MergePlan, x: Tensor, first: int) -> Tensor:
    """Logits under a plan from the tokens that enter block ``first``.

    Args:
        model: not merged; it is as it was afterwards.
        plan: that removes nothing before block ``first``.
        x: [B, N, C] tokens entering block ``first``.
        first: index of a block.

    Returns:
        [B, classes], the bits that a forward from the images gives.
    """
    with merged(model, plan) as fast:
        parts: Any = fast
        tokens = parts.blocks.run(Tokens(x), first)
        logits: Tensor = parts.forward_head(parts.norm(parts.blocks.leave(tokens)))
        return logits


@torch.no_grad()
def trace(model: nn.Module, plan: MergePlan, images: Tensor) -> list[Tensor]:
    """Follow every original token through a plan.

    Args:
        model: not merged.
        plan: made for it.
        images: [B, 3, H, W], normalised.

    Returns:
        For each block, [B, N0] int64: the token that each original token is in after the block,
        or -1 if it was pruned. A prefix-only last block traces nothing further.
    """
    origins: list[Tensor] = []
    with merged(model, plan) as fast:
        blocks: Any = fast.blocks

        def follow(x: Tensor) -> Tensor:
            count = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0], 1)
            tokens = Tokens(x, origin=count)
            for index in range(len(blocks)):
                tokens = blocks.run_block(tokens, index)
                if tokens.origin is not None:
                    origins.append(tokens.origin)
            return tokens.x

        object.__setattr__(blocks, "forward", follow)
        model(images)
    return origins
