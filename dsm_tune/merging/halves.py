"""A block of timm in two halves, composed from its own submodules.

So whatever a block has (LayerScale, DropPath, qk-norm) is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor

from dsm_tune.merging import compiled_halves
from dsm_tune.merging.on_cpu import (
    attention,
    is_idle,
    is_watched,
    linear,
    linear_gelu,
    product,
    suits,
)

__all__ = [
    "Projections",
    "attend",
    "attend_prefix",
    "attention_output",
    "feed_forward",
    "project",
    "run",
]


class Projections(NamedTuple):
    """Queries, keys (after qk-norm) and values of a block: [B, H, N, d] each, and its scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def run(block: Block, x: Tensor) -> Tensor:
    """A block in which nothing merges: [B, N, C] to the same."""
    if not suits(x) or is_watched(block) or is_watched(block.attn):
        result: Tensor = block(x)
        return result
    return feed_forward(block, attend(block, x, None)[0])


def attend(block: Block, x: Tensor, log_size: Tensor | None) -> tuple[Tensor, Projections]:
    """The attention half of a block: ``x + Attn(norm1(x))``.

    Args:
        block: of a model that ``backbone.read_geometry`` accepts.
        x: [B, N, C].
        log_size: [B, N], added to the attention logits of each key (ToMe, eq. 1), or ``None``.

    Returns:
        [B, N, C], and the projections it was computed from.
    """
    quick = compiled_halves.attend(block, x, log_size)
    if quick is not None:
        out, q, k, v = quick
        return out, Projections(q, k, v, block.attn.scale)
    parts = project(block, x)
    return x + attention_output(block, parts, _bias(parts, log_size)), parts


def project(block: Block, x: Tensor) -> Projections:
    """Queries, keys and values of [B, N, C]."""
    attn, (batch, count, _) = block.attn, x.shape
    qkv = linear(attn.qkv, block.norm1(x)).reshape(batch, count, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return Projections(_through(attn.q_norm, q), _through(attn.k_norm, k), v, attn.scale)


def _bias(parts: Projections, log_size: Tensor | None) -> Tensor | None:
    """[B, N] as attention takes it: [B, 1, 1, N]."""
    if log_size is None:
        return None
    batch, _, count, _ = parts.k.shape
    return log_size.to(parts.q.dtype).view(batch, 1, 1, count)


def _through(module: Any, x: Tensor) -> Tensor:
    """Apply a module, unless it does nothing: to call it takes as long as a small operator."""
    result: Tensor = x if is_idle(module) else module(x)
    return result


def attention_output(block: Block, parts: Projections, bias: Tensor | None) -> Tensor:
    """``Attn`` of what was projected, [B, N, C]; ``bias`` [B, 1, 1, N] is added to its logits."""
    attn = block.attn
    dropout = attn.attn_drop.p if attn.training else 0.0
    heads = attention(parts.q, parts.k, parts.v, parts.scale, bias, dropout=dropout)
    mixed = linear(attn.proj, _through(attn.norm, heads))
    return _through(block.drop_path1, _through(block.ls1, _through(attn.proj_drop, mixed)))


def attend_prefix(block: Block, x: Tensor, log_size: Tensor | None, prefix: int) -> Tensor:
    """The attention half of a block for its prefix tokens alone: [B, p, C]."""
    quick = compiled_halves.attend_prefix(block, x, log_size, prefix)
    if quick is not None:
        return quick
    attn = block.attn
    batch, count, width = x.shape
    normed = block.norm1(x)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    q = product(normed[:, :prefix], weight[:width], q_bias)
    kv = product(normed, weight[width:], kv_bias)
    q = q.reshape(batch, prefix, attn.num_heads, attn.head_dim).transpose(1, 2)
    k, v = (
        kv.reshape(batch, count, 2, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    )
    parts = Projections(_through(attn.q_norm, q), _through(attn.k_norm, k), v, attn.scale)
    return x[:, :prefix] + attention_output(block, parts, _bias(parts, log_size))


def feed_forward(block: Block, x: Tensor) -> Tensor:
    """The MLP half of a block: ``x + MLP(norm2(x))``, [B, N, C] to [B, N, C].

    Args:
        block: of a model that ``backbone.read_geometry`` accepts.
        x: [B, N, C].
    """
    quick = compiled_halves.feed_forward(block, x)
    if quick is not None:
        return quick
    mlp, normed = block.mlp, block.norm2(x)
    if type(mlp) is Mlp and not is_watched(mlp):
        hidden = _through(mlp.norm, _through(mlp.drop1, linear_gelu(mlp.fc1, mlp.act, normed)))
        mixed = _through(mlp.drop2, linear(mlp.fc2, hidden))
    else:
        mixed = mlp(normed)
    return x + _through(block.drop_path2, _through(block.ls2, mixed))
