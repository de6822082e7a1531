"""Where attention goes and how long tokens grow, block by block: attention sinks and outliers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune.errors import ImagesError
from dsm_tune.merging import backbone, halves
from dsm_tune.merging.scores import attention_to

__all__ = ["Sinks", "attention_sinks"]


@dataclasses.dataclass(frozen=True)
class Sinks:
    """What each token of each image receives and is, in each block of the dense model.

    Attributes:
        received: [B, depth, N] float32, attention that a token receives, the mean over heads and
            over all tokens that look, relative to an equal share: 1 on average.
        norms: [B, depth, N] float32, L2 norm of the token that leaves the block.
    """

    received: Tensor
    norms: Tensor


@torch.no_grad()
def attention_sinks(model: nn.Module, images: Tensor) -> Sinks:
    """Measure the attention that tokens receive, and their norms, over depth.

    Args:
        model: a timm ``VisionTransformer`` or ``VisionTransformerDistilled`` in evaluation mode,
            not merged.
        images: [B, 3, H, W], normalised, on the model's device; B >= 1.

    Raises:
        ModelError: if the model is of another kind.
        ImagesError: if ``images`` has another shape.
    """
    backbone.read_geometry(model)
    if images.ndim != 4 or not len(images):
        raise ImagesError(f"images must have the shape [B, 3, H, W], but got {list(images.shape)}")
    blocks: Any = model.blocks
    x = backbone.stem(model, images)
    received, norms = [], []
    for block in blocks:
        x, parts = halves.attend(block, x, None)
        received.append(attention_to("received", parts, None) * x.shape[1])
        x = halves.feed_forward(block, x)
        norms.append(torch.linalg.vector_norm(x.float(), dim=-1))
    return Sinks(torch.stack(received, dim=1).cpu(), torch.stack(norms, dim=1).cpu())
