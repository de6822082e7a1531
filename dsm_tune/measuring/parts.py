"""What a device profile times: the parts of a model, and what the steps of a plan may do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune.merging import backbone, halves
from dsm_tune.merging.blocks import MergedBlocks
from dsm_tune.merging.joining import Tokens
from dsm_tune.merging.on_cpu import suits
from dsm_tune.plan import ATTENTIONS, Geometry, Matching, MergePlan, Step
from dsm_tune.runtimes.forwards import Call, prepared

__all__ = ["Named", "part_calls", "step_plans", "tokens_for"]

Named = Iterable[tuple[str, Call]]  # parts of a profile, and what runs them


def tokens_for(geometry: Geometry, pixels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What parts are timed on: random tokens [B, N, C], and their sizes [B, N], all 1."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(len(pixels), count, geometry.width, generator=generator)
    size = torch.ones(len(pixels), count, device=pixels.device)
    return x.to(pixels.device, pixels.dtype), size


def part_calls(
    model: nn.Module, pixels: Tensor, runtime: str, count: int, matchings: Sequence[Matching]
) -> Named:
    """Name each part at a token count and give a call that runs it, eager or captured.

    Args:
        model: in evaluation mode, on its device and in its dtype.
        pixels: [B, 3, H, W], likewise.
        runtime: as of :func:`~dsm_tune.runtimes.forwards.prepared`.
        count: tokens, prefix included.
        matchings: whose features and terms are timed.
    """
    for name, call in _eager_calls(model, pixels, count, matchings):
        yield name, prepared(call, runtime)


def _eager_calls(
    model: nn.Module, pixels: Tensor, count: int, matchings: Sequence[Matching]
) -> Named:
    parts: Any = model
    geometry = backbone.read_geometry(model)
    block = parts.blocks[geometry.depth // 2]
    x, size = tokens_for(geometry, pixels, count)
    log_size = size.log()
    if suits(x):  # the dense model's blocks run as they are, unlike those of a plan
        yield "block", partial(block, x)
    yield "attention", partial(halves.attend, block, x, None)
    yield "attention_sized", lambda: halves.attend(block, x, size.log())
    yield "mlp", partial(halves.feed_forward, block, x)
    if geometry.reads_prefix_only:
        yield (
            "prefix_block",
            lambda: halves.feed_forward(
                block, halves.attend_prefix(block, x, log_size, geometry.prefix)
            ),
        )
    yield "stem", partial(backbone.stem, model, pixels)
    yield "head", lambda: parts.forward_head(parts.norm(x))
    projections = halves.attend(block, x, log_size)[1]
    for name, plan in step_plans(geometry, count, matchings):
        take = MergedBlocks(nn.Sequential(block), plan).take_step
        yield name, partial(take, Tokens(x, size), plan.active_steps[0], projections, log_size)


def step_plans(
    geometry: Geometry, count: int, matchings: Sequence[Matching]
) -> Iterable[tuple[str, MergePlan]]:
    """Plans of one step each, by the part that it times: plans of one block with ``count`` tokens.

    All tokens stand in one column, which costs the same.
    """
    small = dataclasses.replace(geometry, depth=1, grid=(max(count - geometry.prefix, 1), 1))
    for name, matching, step in _steps(geometry, count, matchings):
        plan = MergePlan("", small, (step,), matching)
        if plan.active_steps:
            yield name, plan


def _steps(
    geometry: Geometry, count: int, matchings: Sequence[Matching]
) -> Iterable[tuple[str, Matching, Step]]:
    """What to time: each feature plain, then each further term on top of the keys."""
    r = max((count - geometry.prefix) // 12, 1)
    merge, side = Step(0, "merge", r), max(int(count**0.5) // 2, 1)
    features = dict.fromkeys(["k", *(m.feature for m in matchings if m.feature != "random")])
    for feature in features:
        yield f"merge_{feature}", Matching(feature=feature), merge
    yield "local", Matching(), Step(0, "merge", r, side)
    yield "size_penalty", Matching(size_penalty=0.1), merge
    yield "norm", Matching(norm="mean"), merge
    attentions = [a for a in ATTENTIONS if a != "class" or geometry.prefix]
    for attention in attentions:
        yield (
            f"salience_{attention}",
            Matching(salience=0.1, attention_weight=1.0, attention=attention),
            merge,
        )
    for score in ("norm", *attentions, *(["ats"] if geometry.prefix else [])):
        yield f"prune_{score}", Matching(prune_score=score), Step(0, "prune", r)
    yield "fuse", Matching(), Step(0, "fuse", r)
