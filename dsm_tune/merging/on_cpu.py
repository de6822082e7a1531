"""What a block computes on a CPU, eager, by quicker operators; it differs by rounding alone.

torch gives float32 products on a CPU to MKL, which on processors of AMD leaves half of their
speed; oneDNN, which torch has too, does not, and applies GELU while a product is still at hand.
Attention, which torch gives to MKL as well, is a loop of :mod:`.loops`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dsm_tune.merging import loops
from dsm_tune.merging.loops import team

__all__ = [
    "all_are_watched",
    "attention",
    "is_idle",
    "is_watched",
    "linear",
    "linear_gelu",
    "mean_over_heads",
    "product",
    "query_key_products",
    "suits",
]


def _operator() -> Any:
    """oneDNN's linear layer, where this torch has it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return torch.ops.mkldnn._linear_pointwise.default


PRODUCT = _operator()
LEAST_QUERIES = 8  # the loop always does as many as registers take; torch is quicker for fewer
LEAST = 2_000_000  # multiply-adds; below, a call of oneDNN takes longer than it saves


def suits(x: Tensor) -> bool:
    """Whether what computes on a tensor may do so by other means than torch's operators.

    It may on a CPU in float32, if nobody wants gradients and nobody watches the operators: a
    trace, a compiler, a count, a transform.
    """
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def linear(layer: Any, x: Tensor) -> Tensor:
    """What a linear layer makes of [B, N, C]."""
    if not _is_plain(layer):
        result: Tensor = layer(x)
        return result
    return product(x, layer.weight, layer.bias)


def linear_gelu(layer: Any, activation: Any, x: Tensor) -> Tensor:
    """What a linear layer and the activation behind it make of [B, N, C]."""
    is_plain = _is_plain(layer) and type(activation) is nn.GELU and not is_watched(activation)
    if not is_plain or not _pays(x, layer.weight):
        result: Tensor = activation(linear(layer, x))
        return result
    kind = activation.approximate
    quick: Tensor = PRODUCT(x, layer.weight, layer.bias, "gelu", [], kind)
    return quick


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, N, C] times the transpose of [O, C], and [O] more: [B, N, O]."""
    if not _pays(x, weight):
        return F.linear(x, weight, bias)
    quick: Tensor = PRODUCT(x, weight, bias, "none", [], "")
    return quick


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of [B, N, C] and [O, C] is sooner done by oneDNN."""
    # A graph of any batch size must not be asked for its size: `suits` comes first.
    return PRODUCT is not None and suits(x) and x.numel() * weight.shape[0] >= LEAST


def _is_plain(layer: Any) -> bool:
    """Whether a layer is no more than its weights: not adapted, not watched."""
    return type(layer) is nn.Linear and not is_watched(layer)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody is told when a module runs: then it is to be called, not what it does."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks or "forward" in module.__dict__ or all_are_watched())


def all_are_watched() -> bool:
    """Whether somebody is told when any module runs."""
    return bool(every_module._global_forward_hooks or every_module._global_forward_pre_hooks)


def is_idle(module: nn.Module) -> bool:
    """Whether a module hands on what it is given, and nobody is told."""
    kind = type(module)
    idle = kind is nn.Identity or (kind in (nn.Dropout, DropPath) and not module.training)
    return idle and not is_watched(module)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """What queries [B, H, n, d] take of values, by keys: [B, n, H · d].

    Args:
        q: as above.
        k: [B, H, N, d].
        v: as k.
        scale: of the products of queries and keys.
        bias: [B, 1, 1, N], added to the logits of each key, or ``None``.
        dropout: chance of a weight to be left out.
    """
    lanes = loops.module_of("lanes") if suits(q) and not dropout else None
    loop = loops.module_of("attention") if lanes is not None and lanes.PAYS else None
    if loop is None or not _can_attend(loop, q, k, v, bias):
        found = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
        return found.transpose(1, 2).flatten(2)
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    rows = [team.in_rows(one) for one in (q, k, v)]
    result = q.new_empty(batch, queries, heads * width)
    bias = None if bias is None else bias.contiguous()
    team.run(
        loop.attend, batch, heads, queries, keys, width,
        *(number for one in rows for number in (one.data_ptr(), *_strides(one))),
        team.address_of(bias), *team.bits(scale), result.data_ptr(),
        shares=batch * heads * queries,
    )  # fmt: skip
    return result


def _can_attend(loop: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether a loop finds in memory what it is told is there, and pays."""
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    return (
        queries >= LEAST_QUERIES
        and min(keys, width) >= loop.LEAST_SIDE
        and k.shape == v.shape == (batch, heads, keys, width)
        and k.dtype is v.dtype is q.dtype
        and (bias is None or (bias.dtype is q.dtype and bias.shape == (batch, 1, 1, keys)))
    )


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of [B, H, N, d] in float32: bytes to the next image, head and token."""
    batch, head, token, _ = x.stride()
    return 4 * batch, 4 * head, 4 * token


def mean_over_heads(x: Tensor) -> Tensor:
    """[B, H, N, d] to [B, N, d]: head by head, where torch's own mean goes element by element."""
    first, *others = x.unbind(1)
    if not others:
        return first
    if not suits(x):
        return x.mean(dim=1)
    total = first + others[0]
    for other in others[1:]:
        total += other
    return total.mul_(1 / x.shape[1])


def query_key_products(q: Tensor, k: Tensor) -> Tensor:
    """[B, H, n, d] of queries with [B, H, N, d] of keys: [B, H, n, N].

    For one query MKL's batched product takes twice as long as to multiply and add.
    """
    if q.shape[2] > 1 or not suits(q):
        return q @ k.transpose(-2, -1)
    return (q * k).sum(dim=-1).unsqueeze(2)
