"""The similarity curve of a model on some images, and the delay D that it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dsm_tune.config import TuneConfig
from dsm_tune.inputs import CURVE_IMAGES, load_inputs
from dsm_tune.merging.similarity import (
    delay_stability,
    detect_delay,
    find_transition,
    similarity_curves,
)
from dsm_tune.reviewing import figures

__all__ = ["draw", "facts_of", "measure"]


def measure(config: TuneConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the curve on the images that a tune of this configuration would take for it.

    Returns:
        What ``dsm-tune curve --json`` prints.
    """
    inputs = load_inputs(config)
    for line in inputs.skipped:
        say(f"skipped {line}")
    images = inputs.search.pixels[:CURVE_IMAGES]
    return {"model": config.model_name, **facts_of(inputs.model, images, seed=config.seed)}


def facts_of(model: nn.Module, images: Tensor, *, seed: int) -> dict[str, Any]:
    """The curve of a model on some images, D, and how often each D is found in resamples.

    Args:
        model: accepted by :func:`~dsm_tune.merging.backbone.read_geometry`.
        images: [B, 3, H, W], normalised.
        seed: of the resamples.
    """
    curves = similarity_curves(model, images)
    curve = [float(value) for value in curves.mean(dim=0)]
    return {
        "images": len(images),
        "similarity_curve": curve,
        "delay": detect_delay(curve),
        "transition": find_transition(curve) is not None,
        "stability": {str(d): s for d, s in delay_stability(curves, seed=seed).items()},
    }


def draw(measured: Mapping[str, Any], form: str) -> bytes:
    """Draw it as ``png`` or ``svg``."""
    draw_one = figures.similarity_curve_png if form == "png" else figures.similarity_curve_svg
    return draw_one(measured["similarity_curve"], measured["delay"])
