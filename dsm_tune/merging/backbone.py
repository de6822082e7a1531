"""What we know of timm's models: which can merge, their geometry, what is around the blocks.

A block of a kind that we do not know is refused; what is known of them is in :mod:`.halves`.
"""

from __future__ import annotations

from typing import Any

from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import Tensor, nn

from dsm_tune.errors import ModelError
from dsm_tune.merging.refusals import reason_for
from dsm_tune.plan import Geometry

__all__ = ["image_size", "pool_by_size", "read_geometry", "stem"]


def read_geometry(model: nn.Module) -> Geometry:
    """Return the sizes of a model, or refuse it.

    Args:
        model: a timm ``VisionTransformer`` or ``VisionTransformerDistilled``.

    Raises:
        ModelError: if its tokens cannot be merged, with the reason.
    """
    kind = type(model)
    if kind not in (VisionTransformer, VisionTransformerDistilled):
        raise _refusal(model, reason_for(kind))
    parts: Any = model  # timm types its submodules loosely
    patch = _patch_side(parts)
    _check_blocks(parts)
    return Geometry(
        grid=tuple(parts.patch_embed.grid_size),
        prefix=parts.num_prefix_tokens,
        depth=len(parts.blocks),
        width=parts.embed_dim,
        heads=parts.blocks[0].attn.num_heads,
        hidden=_hidden(parts.blocks[0].mlp, parts.embed_dim),
        patch=patch,
        classes=parts.num_classes,
        head=_head(parts),
    )


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of the images that a model with patches takes."""
    parts: Any = model
    height, width = parts.patch_embed.img_size
    return int(height), int(width)


def _patch_side(model: Any) -> int:
    """Side of a patch in pixels; the embedding must be one convolution over plain patches."""
    embed = model.patch_embed
    convolution = embed.proj
    plain = type(convolution) is nn.Conv2d and convolution.kernel_size == convolution.stride
    if type(embed) is HybridEmbed or not plain:
        raise _refusal(
            model, f"its patch embedding is a {type(embed).__name__}, a network before the blocks"
        )
    height, width = convolution.kernel_size
    if height != width or convolution.in_channels != 3:
        raise _refusal(
            model, f"its patches are {convolution.in_channels}×{height}×{width}, not 3×P×P"
        )
    return int(height)


def _linear_layers(mlp: Any) -> list[Any]:
    """The linear layers of an MLP that we know, gated or not; none of another."""
    names = ("fc1_g", "fc1_x", "fc2") if type(mlp) is SwiGLU else ("fc1", "fc2")
    layers = [getattr(mlp, name, None) for name in names]
    return layers if all(isinstance(layer, nn.Linear) for layer in layers) else []


def _hidden(mlp: Any, width: int) -> int:
    numbers: int = sum(layer.weight.numel() for layer in _linear_layers(mlp))
    return numbers // (2 * width)


def _refusal(model: nn.Module, reason: str) -> ModelError:
    name = getattr(model, "pretrained_cfg", None) or {}
    label = name.get("architecture") or type(model).__name__
    return ModelError(
        f"tokens of {label} cannot be merged: {reason}; accepted are timm models of the class "
        "VisionTransformer or VisionTransformerDistilled with plain blocks"
    )


def _check_blocks(model: Any) -> None:
    blocks: list[Any] = list(nn.Sequential.__iter__(model.blocks))
    for index, block in enumerate(blocks):
        if type(block) is not Block:
            name = type(block).__name__
            why = "which has no attention half and MLP half one after the other"
            if name == "ResPostBlock":
                why = "whose norms stand behind its halves"
            raise _refusal(model, f"block {index} is a {name}, {why}")
        if type(block.attn) is not Attention:
            raise _refusal(model, f"block {index} attends by {type(block.attn).__name__}")
        if getattr(block.attn, "gate", None) is not None:
            raise _refusal(model, f"block {index} has a gate on its attention")
        if block.attn.attn_dim != model.embed_dim:
            raise _refusal(model, f"the heads of block {index} do not add up to its width")
        if not _linear_layers(block.mlp):
            raise _refusal(model, f"block {index} has a {type(block.mlp).__name__} MLP")
    if getattr(model, "grad_checkpointing", False):
        raise _refusal(model, "gradient checkpointing is on")


def _head(model: Any) -> str:
    if isinstance(model, VisionTransformerDistilled):
        return "distilled"
    if model.attn_pool is not None:
        _check_attention_pool(model)
        return "map"
    if model.global_pool == "token" and model.has_class_token:
        return "token"
    if model.global_pool == "avg":
        return "avg"
    raise _refusal(model, f"its head pools by {model.global_pool!r}")


def _check_attention_pool(model: Any) -> None:
    """One latent query over the patch tokens, and an MLP as wide as the blocks' (SigLIP's head)."""
    pool, width = model.attn_pool, model.embed_dim
    if type(pool) is not AttentionPoolLatent:
        raise _refusal(
            model, f"its head pools by {type(pool).__name__}, in which patches attend one another"
        )
    if model.pool_include_prefix and model.num_prefix_tokens:
        raise _refusal(model, "its head pools prefix and patch tokens by one attention")
    plain = pool.latent_len == 1 and pool.pos_embed is None and pool.out_features == width
    if not plain or _hidden(pool.mlp, width) != _hidden(model.blocks[0].mlp, width):
        raise _refusal(model, "its attention-pooling head has other sizes than its blocks")


def pool_by_size(pool: AttentionPoolLatent, x: Tensor, size: Tensor) -> Tensor:
    """What an attention-pooling head makes of tokens that stand for several.

    Args:
        pool: of a model that :func:`read_geometry` accepts.
        x: [B, N, C] patch tokens, normed.
        size: [B, N] original tokens in each; its logarithm is added to the attention logits.

    Returns:
        [B, C].
    """
    bias = size.log()[:, None, None, :].to(x.dtype)
    pooled: Tensor = type(pool).forward(pool, x, attn_mask=bias)
    return pooled


def stem(model: nn.Module, pixels: Tensor) -> Tensor:
    """What enters the first block: [B, 3, H, W] to [B, N, C]."""
    parts: Any = model
    tokens: Tensor = parts.norm_pre(parts.patch_drop(parts._pos_embed(parts.patch_embed(pixels))))
    return tokens
