"""The published plans for a model: ToMe's and DSM's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dsm_tune import schedules
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.plan import MergePlan

__all__ = ["dsm_plan", "model_name", "tome_plan"]


def model_name(model: nn.Module) -> str:
    """The timm name of a model, or the name of its class."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def tome_plan(model: nn.Module, r: int | Sequence[int], *, inflection: float = 0.0) -> MergePlan:
    """Return ToMe's plan for a model: every block merges r tokens globally (Bolya et al., 2023).

    Args:
        model: a timm ``VisionTransformer`` or ``VisionTransformerDistilled``.
        r: tokens per block, >= 0, or one number for each block.
        inflection: from -1 to 1; -1 is the decreasing schedule, from 2r to 0, with the same total.

    Raises:
        ModelError: if the model cannot be merged.
        PlanError: if an argument is out of range.
    """
    return schedules.tome(read_geometry(model), r, inflection=inflection, model=model_name(model))


def dsm_plan(
    model: nn.Module,
    r: int,
    *,
    delay: int | None = None,
    window: int | None = None,
    local_blocks: int = 3,
) -> MergePlan:
    """Return the plan of "Delayed Spatial Merging" for a model (Heo et al., arXiv 2303.02331).

    Args:
        model: a timm ``VisionTransformer`` or ``VisionTransformerDistilled``.
        r: tokens per block from the delay on, >= 0.
        delay: D, the first block that merges; ``None`` for ``round(depth / 6)``.
        window: side of the windows in the first local block, growing by 1 per block; ``None``
            for half the grid, rounded up.
        local_blocks: T, blocks that merge inside windows before merging is global.

    Raises:
        ModelError: if the model cannot be merged.
        PlanError: if an argument is out of range.
    """
    return schedules.dsm(
        read_geometry(model),
        r,
        delay=delay,
        window=window,
        local_blocks=local_blocks,
        model=model_name(model),
    )
