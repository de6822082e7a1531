"""The halves of a block, the quickest way there is: each one compiled loop on a CPU, eager.

torch gives float32 products on a CPU to MKL, which on processors of AMD leaves half of their speed,
and to call ten operators takes as long as what half of them do for a single image. The loops are
those of :mod:`.loops.halves`; elsewhere, and for other blocks, operators do it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

from dsm_tune.merging import loops, on_cpu
from dsm_tune.merging.loops import team
from dsm_tune.merging.on_cpu import is_idle, is_watched

__all__ = [
    "WIDEST",
    "AttentionHalf",
    "MlpHalf",
    "attend",
    "attend_prefix",
    "attention_half",
    "feed_forward",
    "loop_for",
    "mlp_half",
]

WIDEST = 512  # channels; where there are more, oneDNN's products were measured to be quicker
NORMS, STORED = (nn.LayerNorm, LayerNorm), (nn.Parameter, Tensor)


class _OtherError(Exception):
    """A block is not what a loop does."""


class AttentionHalf(NamedTuple):
    """What an attention half that a loop can do is made of; a bias or a gain may be ``None``."""

    heads: int
    scale: float
    epsilon: float
    norm: tuple[Tensor, Tensor]  # weight and bias, [C] each
    layers: tuple[Tensor | None, ...]  # [3C, C], [3C]; [C, C], [C]; the gain, [C]

    def numbers(
        self, batch: int, count: int, x: int, log_size: int, qkv: int, result: int, out: int
    ) -> tuple[int, ...]:
        """What ``ATTENTION_HALF`` names, of [B, N, C]; from ``x`` on, addresses.

        Queries, keys and values are [B, N, 3, C].
        """
        width = self.norm[0].shape[0]
        places = qkv, 3 * width, qkv + 4 * width, qkv + 8 * width, 3 * width
        return self._numbers(batch, count, count, x, log_size, places, result, out)

    def prefix_numbers(
        self, batch: int, count: int, prefix: int,
        x: int, log_size: int, q: int, kv: int, result: int, out: int,
    ) -> tuple[int, ...]:  # fmt: skip
        """The same for ``prefix_half``: queries are [B, p, C], keys and values [B, N, 2, C]."""
        width = self.norm[0].shape[0]
        places = q, width, kv, kv + 4 * width, 2 * width
        return self._numbers(batch, count, prefix, x, log_size, places, result, out)

    def _numbers(
        self, batch: int, count: int, queries: int, x: int, log_size: int,
        places: tuple[int, ...], result: int, out: int,
    ) -> tuple[int, ...]:  # fmt: skip
        width = self.norm[0].shape[0]
        d, (query, to_query, key, value, to_key) = width // self.heads, places
        of_query = query, 4 * queries * to_query, 4 * d, 4 * to_query
        strides = 4 * count * to_key, 4 * d, 4 * to_key
        return (
            *(x, batch * count, width, *map(team.address_of, self.norm), *team.bits(self.epsilon)),
            *(batch, self.heads, queries, count, d, *of_query, key, *strides, value, *strides),
            *(log_size, *team.bits(self.scale), result, query),
            *(*map(team.address_of, self.layers), out),
        )


class MlpHalf(NamedTuple):
    """What an MLP half that a loop can do is made of, likewise."""

    hidden: int
    activation: int
    epsilon: float
    norm: tuple[Tensor, Tensor]
    layers: tuple[Tensor | None, ...]  # [hidden, C], [hidden]; [C, hidden], [C]; the gain, [C]

    def numbers(self, rows: int, x: int, out: int) -> tuple[int, ...]:
        """What ``MLP_HALF`` names, of [rows, C]."""
        return (
            *(x, rows, self.norm[0].shape[0], *map(team.address_of, self.norm)),
            *(
                *team.bits(self.epsilon),
                self.hidden,
                self.activation,
                *map(team.address_of, self.layers),
                out,
            ),
        )


def attend(
    block: Block, x: Tensor, log_size: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The attention half of a block, if a loop can do it.

    Args:
        block: of a model that ``backbone.read_geometry`` accepts.
        x: [B, N, C].
        log_size: [B, N] float32, added to the attention logits of each key, or ``None``.

    Returns:
        [B, N, C]; queries, keys and values, [B, H, N, d] each. ``None`` if no loop can do it.
    """
    (batch, count, width), loop = x.shape, loop_for(x)
    half = None if loop is None else attention_half(block, count, width, loop)
    if loop is None or half is None or not _fits(log_size, batch, count):
        return None
    log_size = None if log_size is None else log_size.contiguous()
    x, qkv = x.contiguous(), x.new_empty(batch, count, 3, half.heads, width // half.heads)
    result, out = x.new_empty(batch, count, width), x.new_empty(batch, count, width)
    filled = map(team.address_of, (x, log_size, qkv, result, out))
    team.run(loop.attention_half, *half.numbers(batch, count, *filled), shares=batch * count)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return out, q, k, v


def _fits(log_size: Tensor | None, *shape: int) -> bool:
    return log_size is None or (log_size.dtype is torch.float32 and log_size.shape == shape)


def attend_prefix(block: Block, x: Tensor, log_size: Tensor | None, prefix: int) -> Tensor | None:
    """The attention half of a block for its p prefix tokens, [B, p, C], if a loop can do it."""
    (batch, count, width), loop = x.shape, loop_for(x)
    half = None if loop is None else attention_half(block, count, width, loop)
    if loop is None or half is None or not _fits(log_size, batch, count):
        return None
    log_size = None if log_size is None else log_size.contiguous()
    x, kv = x.contiguous(), x.new_empty(batch, count, 2, width)
    q, result, out = (x.new_empty(batch, prefix, width) for _ in range(3))
    filled = map(team.address_of, (x, log_size, q, kv, result, out))
    numbers = half.prefix_numbers(batch, count, prefix, *filled)
    team.run(loop.prefix_half, *numbers, shares=batch * count)
    return out


def feed_forward(block: Block, x: Tensor) -> Tensor | None:
    """The MLP half of a block, [B, N, C] to [B, N, C]; ``None`` if no loop can do it."""
    loop = loop_for(x)
    half = None if loop is None else mlp_half(block, x.shape[2], loop)
    if loop is None or half is None:
        return None
    x = x.contiguous()
    out, rows = torch.empty_like(x), x.shape[0] * x.shape[1]
    team.run(loop.mlp_half, *half.numbers(rows, x.data_ptr(), out.data_ptr()), shares=rows)
    return out


def attention_half(block: Block, count: int, width: int, loop: Any) -> AttentionHalf | None:
    """The attention half of a block for [B, N, C], if a loop can do it."""
    own = block._modules
    attn: Any = own["attn"]
    inner, heads, d = attn._modules, attn.num_heads, attn.head_dim
    if heads * d != width or min(count, d) < loop.LEAST_SIDE:
        return None
    if (attn.training and attn.attn_drop.p) or type(attn.scale) is not float:
        return None
    try:
        _check_idle(inner["q_norm"], inner["k_norm"], inner["norm"], inner["proj_drop"])
        _check_idle(own["drop_path1"])
        norm = _norm(own["norm1"], width)
        qkv, output = _linear(inner["qkv"], 3 * width, width), _linear(inner["proj"], width, width)
        gain = _gain(own["ls1"], width)
    except _OtherError:
        return None
    return AttentionHalf(heads, attn.scale, own["norm1"].eps, norm, (*qkv, *output, gain))


def mlp_half(block: Block, width: int, loop: Any) -> MlpHalf | None:
    """The MLP half of a block for [B, N, C], if a loop can do it."""
    own = block._modules
    mlp: Any = own["mlp"]
    if type(mlp) is not Mlp or is_watched(mlp):
        return None
    inner = mlp._modules
    hidden, act = getattr(inner["fc1"], "out_features", 0), inner["act"]
    is_erf = type(act) is nn.GELU and act.approximate == "none"
    if not (is_erf or type(act) is nn.ReLU) or is_watched(act):
        return None
    if not hidden or hidden % loop.EVERY:
        return None
    try:
        _check_idle(inner["drop1"], inner["norm"], inner["drop2"], own["drop_path2"])
        norm = _norm(own["norm2"], width)
        first, second = _linear(inner["fc1"], hidden, width), _linear(inner["fc2"], width, hidden)
        gain = _gain(own["ls2"], width)
    except _OtherError:
        return None
    activation = loop.GELU if is_erf else loop.RELU
    return MlpHalf(hidden, activation, own["norm2"].eps, norm, (*first, *second, gain))


def loop_for(x: Tensor) -> Any:
    """The module of the loops, where they may be used and pay; to import it compiles them."""
    if x.shape[2] > WIDEST or not on_cpu.suits(x):
        return None
    lanes = loops.module_of("lanes")
    if lanes is None or not lanes.PAYS or x.shape[2] % lanes.REGISTER:
        return None
    return loops.module_of("halves")


def _check_idle(*modules: Any) -> None:
    """That modules do nothing to what they are given."""
    if not all(map(is_idle, modules)):
        raise _OtherError


def _norm(norm: Any, width: int) -> tuple[Tensor, Tensor]:
    if type(norm) not in NORMS or is_watched(norm) or type(norm.eps) is not float:
        raise _OtherError
    return _stored(norm, "weight", width), _stored(norm, "bias", width)


def _linear(layer: Any, several: int, width: int) -> tuple[Tensor, Tensor | None]:
    if type(layer) is not nn.Linear or is_watched(layer) or "bias" not in layer._parameters:
        raise _OtherError
    weight, has_bias = _stored(layer, "weight", several, width), layer.bias is not None
    return weight, _stored(layer, "bias", several) if has_bias else None


def _gain(scale: Any, width: int) -> Tensor | None:
    if type(scale) is nn.Identity and not is_watched(scale):
        return None
    if type(scale) is not LayerScale or is_watched(scale):
        raise _OtherError
    return _stored(scale, "gamma", width)


def _stored(module: Any, name: str, *shape: int) -> Tensor:
    """A parameter of a module, as a loop reads it."""
    return _checked(module._parameters.get(name), *shape)


def _checked(numbers: Tensor | None, *shape: int) -> Tensor:
    """Numbers of this shape, contiguous in float32 on a CPU."""
    if numbers is None or type(numbers) not in STORED:
        raise _OtherError
    if not numbers.is_cpu or numbers.dtype is not torch.float32:
        raise _OtherError
    if numbers.shape != shape or not numbers.is_contiguous():
        raise _OtherError
    if not numbers.data_ptr() and numbers.numel():  # its memory was given back
        raise _OtherError
    return numbers
