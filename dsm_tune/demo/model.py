"""The demo model: timm's ``VisionTransformer``, small enough for a slow CPU, and its weights."""

from __future__ import annotations

from importlib import resources
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer

from dsm_tune.demo import CLASS_NAMES, MEAN, MODEL_NAME, STD
from dsm_tune.demo.digits import SIDE
from dsm_tune.errors import ModelError

__all__ = ["WEIGHTS", "create_model", "untrained_model"]

WEIGHTS = "digits_vit.safetensors"


def create_model() -> VisionTransformer:
    """Return the model in eval mode with the packaged weights, float32, on the CPU.

    Images ``[B, 3, 28, 28]`` go in, logits ``[B, 10]`` come out.

    Raises:
        ModelError: if the packaged weights are missing or do not fit.
    """
    model = untrained_model()
    try:
        packed = resources.files("dsm_tune.demo").joinpath(WEIGHTS).read_bytes()
        model.load_state_dict(safetensors.torch.load(packed))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"the demo weights dsm_tune/demo/{WEIGHTS} must be readable and fit the demo model, "
            f"but got: {reason}; 'python -m dsm_tune.demo.train' writes them"
        ) from None
    return model.eval()


def untrained_model(*, patch_drop_rate: float = 0.0) -> VisionTransformer:
    """Return the architecture with weights drawn from torch's global generator.

    Args:
        patch_drop_rate: share of the patch tokens left out of each training step, from 0 to
            below 1; it changes no parameter, and nothing in eval mode.
    """
    model = VisionTransformer(
        img_size=SIDE,
        patch_size=2,
        num_classes=len(CLASS_NAMES),
        global_pool="token",
        embed_dim=32,
        depth=5,
        num_heads=1,
        mlp_ratio=2.0,
        act_layer="relu",
        patch_drop_rate=patch_drop_rate,
    )
    described: Any = model  # Module's annotations know no attribute that is a plain dict
    described.pretrained_cfg = {
        "architecture": MODEL_NAME,
        "input_size": (3, SIDE, SIDE),
        "fixed_input_size": True,
        "num_classes": len(CLASS_NAMES),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "label_names": CLASS_NAMES,
    }
    return model
