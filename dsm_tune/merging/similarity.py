"""The similarity curve of a model and the delay D that it shows (DSM, eq. 2 and section 3.2)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsm_tune.errors import ImagesError
from dsm_tune.merging.backbone import read_geometry

__all__ = [
    "delay_stability",
    "detect_delay",
    "find_transition",
    "similarity_curve",
    "similarity_curves",
]

SWING = 0.25  # a rise or fall counts from this share of the curve's range on; dips below are noise


def similarity_curve(model: nn.Module, images: Tensor, *, batch_size: int = 32) -> list[float]:
    """Mean cosine between the tokens of an image, after the attention half of each block.

    Args:
        model: a timm ``VisionTransformer`` or ``VisionTransformerDistilled``.
        images: [B, 3, H, W], normalised, on the model's device; B >= 1.
        batch_size: images per forward.

    Returns:
        One number from -1 to 1 per block, the mean over images.

    Raises:
        ModelError: if the model's tokens cannot be merged.
        ImagesError: if ``images`` has another shape.
    """
    return [
        float(value)
        for value in similarity_curves(model, images, batch_size=batch_size).mean(dim=0)
    ]


@torch.no_grad()
def similarity_curves(model: nn.Module, images: Tensor, *, batch_size: int = 32) -> Tensor:
    """The similarity curve of each image: [B, depth] float64 on the CPU; else as above."""
    read_geometry(model)
    if images.ndim != 4 or not len(images):
        raise ImagesError(f"images must have the shape [B, 3, H, W], but got {list(images.shape)}")
    blocks: Any = model.blocks
    columns: list[list[Tensor]] = [[] for _ in blocks]

    def watch(column: list[Tensor]) -> Any:
        return lambda _, inputs: column.append(_mean_cosine(inputs[0]))

    # The input of norm2 is the residual stream right after attention, where merging happens.
    hooks = [
        block.norm2.register_forward_pre_hook(watch(column))
        for block, column in zip(blocks, columns, strict=True)
    ]
    was_training = model.training
    try:
        model.eval()
        for start in range(0, len(images), batch_size):
            model(images[start : start + batch_size])
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.cat(column) for column in columns], dim=1)


def _mean_cosine(x: Tensor) -> Tensor:
    """``(‖Σ x̂‖² - n) / (n (n - 1))`` of the tokens [B, n, C]: [B] float64 on the CPU."""
    unit = F.normalize(x.double(), dim=-1)
    count = x.shape[1]
    total = unit.sum(dim=1).square().sum(dim=-1)
    return ((total - count) / (count * max(count - 1, 1))).cpu()


def find_transition(curve: Sequence[float]) -> int | None:
    """The block where tokens begin to converge, or ``None`` if the curve shows none.

    The curve is split into rises and falls of at least a quarter of its range. The transition
    is where the largest rise begins that follows a fall: so a lower value before the diverging
    phase, a small dip on the way up and a fall in the last blocks do not move it.
    """
    largest, begin = 0.0, None
    for low, high in _rises_after_a_fall(list(curve)):
        if curve[high] - curve[low] > largest:
            largest, begin = curve[high] - curve[low], low
    return begin


def _rises_after_a_fall(curve: list[float]) -> list[tuple[int, int]]:
    threshold = SWING * (max(curve) - min(curve))
    turns, low, high, rising = [0], 0, 0, None
    for i, value in enumerate(curve):
        low = i if value < curve[low] else low
        high = i if value > curve[high] else high
        if rising is not False and curve[high] - value >= threshold > 0 and high != i:
            turns += [high] if rising else []
            rising, low = False, i
            high = i
        elif rising is not True and value - curve[low] >= threshold > 0 and low != i:
            turns += [low] if rising is False else []
            rising, high = True, i
            low = i
    if rising is None:
        return []
    turns.append(high if rising else low)
    swings = list(itertools.pairwise(turns))
    return [
        (start, end) for n, (start, end) in enumerate(swings) if n > 0 and curve[end] > curve[start]
    ]


def detect_delay(curve: Sequence[float]) -> int:
    """The delay D: the block where the similarity curve begins to converge.

    Args:
        curve: one number per block, as from :func:`similarity_curve`.

    Returns:
        From 0 to ``len(curve) - 1``; ``round(len(curve) / 6)`` where :func:`find_transition` finds
        no transition.

    Raises:
        ImagesError: if the curve is empty or holds a number that is not finite.
    """
    if not len(curve) or any(not -torch.inf < value < torch.inf for value in curve):
        raise ImagesError(
            f"a similarity curve must hold finite numbers, but got {list(curve)!r:.80}"
        )
    transition = find_transition(curve)
    return round(len(curve) / 6) if transition is None else transition


def delay_stability(curves: Tensor, *, seed: int = 0, resamples: int = 200) -> dict[int, float]:
    """How often each delay is found when the images are drawn again with replacement.

    Args:
        curves: [B, depth], one curve per image.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        Share of the draws for each delay that occurred, the most frequent first.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, int] = {}
    for _ in range(resamples):
        drawn = torch.randint(len(curves), (len(curves),), generator=generator)
        delay = detect_delay([float(value) for value in curves[drawn].mean(dim=0)])
        found[delay] = found.get(delay, 0) + 1
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return {delay: count / resamples for delay, count in ranked}
