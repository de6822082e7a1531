"""Small timm Vision Transformers with weights that make tokens differ, one per kind of model."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from timm.layers import RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dsm_tune.merging.backbone import read_geometry
from dsm_tune.plan import Geometry, MergePlan, Step

KINDS: dict[str, dict[str, Any]] = {
    "class": {},
    "distilled": {},
    "registers": {"reg_tokens": 4},
    "avg": {"class_token": False, "global_pool": "avg"},
    "avg_class": {"global_pool": "avg", "fc_norm": False},
    "avg_prefix": {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True},
    "layerscale": {"init_values": 0.5},
    "qk_norm": {"qk_norm": True},
    "pre_norm": {"pre_norm": True, "qkv_bias": False},
    "map": {"class_token": False, "global_pool": "map"},
    "map_registers": {"class_token": False, "global_pool": "map", "reg_tokens": 3},
    "swiglu": {"mlp_layer": SwiGLU, "norm_layer": RmsNorm},
}
GRIDS = [(4, 4), (14, 14), (13, 17), (24, 24)]
PATCH = 2


@functools.lru_cache(maxsize=64)
def small_vit(
    kind: str = "class", grid: tuple[int, int] = (4, 4), depth: int = 4
) -> VisionTransformer:
    """A small ViT in eval mode: width 16, 2 heads, 5 classes; the same weights each time."""
    build = VisionTransformerDistilled if kind == "distilled" else VisionTransformer
    options = {"embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5, **KINDS[kind]}
    size = (grid[0] * PATCH, grid[1] * PATCH)
    model = build(img_size=size, patch_size=PATCH, depth=depth, **options).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim in (2, 4):
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.3 * noise)
    return model


def images_for(model: VisionTransformer, count: int = 2, seed: int = 0) -> Tensor:
    """Random images of the model's size, smooth in space: neighbours resemble each other."""
    rows, columns = model.patch_embed.img_size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 1 + rows // 6, 1 + columns // 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(rows, columns), mode="bilinear")
    return smooth + 0.3 * torch.randn(count, 3, rows, columns, generator=generator)


def plan_for(
    model: VisionTransformer, *steps: tuple[int, str, int, int | None], **options: Any
) -> MergePlan:
    """A plan from (block, kind, r, window) rows."""
    return MergePlan("", read_geometry(model), tuple(Step(*step) for step in steps), **options)


def geometry(kind: str = "class", grid: tuple[int, int] = (4, 4), depth: int = 4) -> Geometry:
    """The geometry of the small ViT of that kind."""
    return read_geometry(small_vit(kind, grid, depth))
