"""What a plan makes of images, patch by patch; of a few held-out ones it is kept in the study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from dsm_tune.inputs import Inputs
from dsm_tune.measuring.images import photograph
from dsm_tune.merging.merged import trace
from dsm_tune.plan import MergePlan
from dsm_tune.reviewing.merged_tokens import Sample
from dsm_tune.reviewing.pictures import Array

__all__ = ["patch_groups", "spread", "token_samples"]

IMAGES = 3
MOST_BLOCKS = 4  # in one row beside the image


def token_samples(inputs: Inputs, plan: MergePlan) -> dict[str, Any]:
    """Run the first held-out images under a plan; return what ``outcome.artifacts`` draws.

    Args:
        inputs: model and images.
        plan: some tokens leave under it.
    """
    pixels = inputs.holdout.pixels[:IMAGES]
    groups = patch_groups(inputs.model, plan, pixels)
    blocks = spread([step.block for step in plan.active_steps])
    samples = [
        Sample(
            name,
            photograph(pixels[row], inputs.model).numpy(),
            {block: groups[block][row] for block in blocks},
        )
        for row, name in enumerate(inputs.holdout.names[: len(pixels)])
    ]
    return {"plan_digest": plan.digest, "samples": [sample.to_dict() for sample in samples]}


def patch_groups(model: nn.Module, plan: MergePlan, pixels: Tensor) -> list[Array]:
    """The token that each patch is in after each block.

    Args:
        model: not merged.
        plan: made for it.
        pixels: [B, 3, H, W], normalised.

    Returns:
        For each block [B, rows, columns] integers, -1 where a patch was pruned.
    """
    grid, prefix = plan.geometry.grid, plan.geometry.prefix
    each = np.arange(plan.geometry.patches).reshape(1, *grid)
    found = [np.repeat(each, len(pixels), axis=0)]
    for origin in trace(model, plan, pixels):
        found.append(origin[:, prefix:].reshape(-1, *grid).cpu().numpy())
    # A last block for prefix tokens alone is not traced: it moves no patch.
    return [found[min(block + 1, len(found) - 1)] for block in range(plan.geometry.depth)]


def spread(blocks: Sequence[int]) -> list[int]:
    """At most a few of some blocks, the first and the last among them."""
    at = np.linspace(0, len(blocks) - 1, min(MOST_BLOCKS, len(blocks)))
    return [blocks[round(float(place))] for place in at]
