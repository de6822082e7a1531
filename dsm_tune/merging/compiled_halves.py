"""The halves of a block, the quickest way there is: each one compiled loop on a CPU, eager.

torch gives float32 products on a CPU to MKL, which on processors of AMD leaves half of their speed,
and to call ten operators takes as long as what half of them do for a single image. The loops are
those of :mod:`.loops.halves`; elsewhere, and for other blocks, operators do it.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dsm_tune.merging import loops, on_cpu
from dsm_tune.merging.loops import team
from dsm_tune.merging.on_cpu import is_watched

__all__ = ["attend", "feed_forward"]

NORMS, DROPS, STORED = (nn.LayerNorm, LayerNorm), (nn.Dropout, DropPath), (nn.Parameter, Tensor)


class _OtherError(Exception):
    """A block is not what a loop does."""


def attend(
    block: Block, x: Tensor, log_size: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The attention half of a block, if a loop can do it.

    Args:
        block: of a model that ``backbone.read_geometry`` accepts.
        x: [B, N, C].
        log_size: [B, N], added to the attention logits of each key, or ``None``.

    Returns:
        [B, N, C]; queries, keys and values, [B, H, N, d] each.
    """
    # What is called here stands between a half and its work: a forward of one image feels it.
    loop, (batch, count, width) = _loop_for(x), x.shape
    own = block._modules
    attn: Any = own["attn"]
    inner, heads, drops = attn._modules, attn.num_heads, attn.training and attn.attn_drop.p
    if loop is None or drops or width % loop.EVERY:
        return None
    if min(count, width // heads) < loop.LEAST_SIDE:
        return None
    try:
        _check_idle(inner["q_norm"], inner["k_norm"], inner["norm"], inner["proj_drop"])
        _check_idle(own["drop_path1"])
        norm = _norm(own["norm1"], width)
        layers = *_linear(inner["qkv"], 3 * width, width), *_linear(inner["proj"], width, width)
        gain = _gain(own["ls1"], width)
        log_size = None if log_size is None else log_size.contiguous()
        bias = _address(log_size, batch, count)
    except _OtherError:
        return None
    x, d = x.contiguous(), width // heads
    qkv = x.new_empty(batch, count, 3, heads, d)
    result, out = x.new_empty(2, batch, count, width).unbind()
    first, strides = qkv.data_ptr(), (12 * count * width, 4 * d, 12 * width)
    team.run(
        loop.attention_half, x.data_ptr(), batch * count, width, *norm,
        batch, heads, count, count, d, first, *strides, first + 4 * width, *strides,
        first + 8 * width, *strides, bias, *team.bits(attn.scale), result.data_ptr(),
        first, *layers, gain, out.data_ptr(),
        shares=batch * count,
    )  # fmt: skip
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return out, q, k, v


def feed_forward(block: Block, x: Tensor) -> Tensor | None:
    """The MLP half of a block, [B, N, C] to [B, N, C], if a loop can do it."""
    loop, width, own = _loop_for(x), x.shape[2], block._modules
    mlp: Any = own["mlp"]
    if loop is None or type(mlp) is not Mlp or width % loop.EVERY:
        return None
    inner = mlp._modules
    hidden, act = getattr(inner["fc1"], "out_features", 0), inner["act"]
    exact = type(act) is nn.GELU and act.approximate == "none" and not is_watched(act)
    if not exact or hidden % loop.EVERY:
        return None
    try:
        _check_idle(inner["drop1"], inner["norm"], inner["drop2"], own["drop_path2"])
        norm = _norm(own["norm2"], width)
        layers = *_linear(inner["fc1"], hidden, width), *_linear(inner["fc2"], width, hidden)
        gain = _gain(own["ls2"], width)
    except _OtherError:
        return None
    x = x.contiguous()
    out = torch.empty_like(x)
    team.run(
        loop.mlp_half, x.data_ptr(), x.shape[0] * x.shape[1], width, *norm, hidden, *layers,
        gain, out.data_ptr(),
        shares=x.shape[0] * x.shape[1],
    )  # fmt: skip
    return out


def _loop_for(x: Tensor) -> Any:
    """The module of the loops, where they may be used and pay."""
    loop = loops.module_of("halves") if on_cpu.suits(x) else None
    pays = loop is not None and loop.PAYS and x.shape[2] <= loop.WIDEST
    return loop if pays else None


def _check_idle(*modules: Any) -> None:
    """That modules do nothing to what they are given."""
    for module in modules:
        kind = type(module)
        idle = kind is nn.Identity or (kind in DROPS and not module.training)
        if not idle or is_watched(module):
            raise _OtherError


def _norm(norm: Any, width: int) -> tuple[int, ...]:
    if type(norm) not in NORMS or is_watched(norm):
        raise _OtherError
    numbers = norm._parameters
    weight, bias = _address(numbers["weight"], width), _address(numbers["bias"], width)
    if not (weight and bias):
        raise _OtherError
    return weight, bias, *team.bits(norm.eps)


def _linear(layer: Any, several: int, width: int) -> tuple[int, int]:
    if type(layer) is not nn.Linear or is_watched(layer):
        raise _OtherError
    numbers = layer._parameters
    return _address(numbers["weight"], several, width), _address(numbers["bias"], several)


def _gain(scale: Any, width: int) -> int:
    if type(scale) is nn.Identity and not is_watched(scale):
        return 0
    if type(scale) is not LayerScale or scale.inplace or is_watched(scale):
        raise _OtherError
    return _address(scale.gamma, width)


def _address(numbers: Tensor | None, *shape: int) -> int:
    """Where contiguous numbers are that have this shape, in float32; 0 for none."""
    if numbers is None:
        return 0
    stored = type(numbers) in STORED and numbers.is_cpu and numbers.dtype is torch.float32
    if not stored or numbers.shape != shape or not numbers.is_contiguous():
        raise _OtherError
    return numbers.data_ptr()
