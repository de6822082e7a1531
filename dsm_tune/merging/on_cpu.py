"""What is quicker on a CPU, eager, than torch's own operators; it differs by rounding alone.

torch gives float32 products on a CPU to MKL, which on processors of AMD leaves half of their
speed; oneDNN, which torch has too, does not, and applies GELU while a product is still at hand.
A step of a plan is some forty brief operators; as compiled loops it is two calls.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "Seats",
    "choose",
    "is_watched",
    "joined",
    "linear",
    "linear_gelu",
    "loops_suit",
    "mean_over_heads",
    "product",
    "products",
    "seat",
    "suits",
]


def _operator() -> Any:
    """oneDNN's linear layer, where this torch has it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return torch.ops.mkldnn._linear_pointwise.default


PRODUCT = _operator()


def suits(x: Tensor) -> bool:
    """Whether what computes on a tensor may do so by other means than torch's operators.

    It may on a CPU in float32, if nobody wants gradients and nobody watches the operators: a
    trace, a compiler, a count.
    """
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()
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
    if not is_plain or PRODUCT is None or not suits(x):
        result: Tensor = activation(linear(layer, x))
        return result
    kind = activation.approximate
    quick: Tensor = PRODUCT(x, layer.weight, layer.bias, "gelu", [], kind)
    return quick


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, N, C] times the transpose of [O, C], and [O] more: [B, N, O]."""
    if PRODUCT is None or not suits(x):
        return nn.functional.linear(x, weight, bias)
    quick: Tensor = PRODUCT(x, weight, bias, "none", [], "")
    return quick


def _is_plain(layer: Any) -> bool:
    """Whether a layer is no more than its weights: not adapted, not watched."""
    return type(layer) is nn.Linear and not is_watched(layer)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody is told when a module runs: then it is to be called, not what it does."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def mean_over_heads(x: Tensor) -> Tensor:
    """[B, H, N, d] to [B, N, d]: head by head, where torch's own mean goes element by element."""
    first, *others = x.unbind(1)
    if not others or not suits(x):
        return x.mean(dim=1)
    total = first + others[0]
    for other in others[1:]:
        total += other
    return total.mul_(1 / x.shape[1])


def products(q: Tensor, k: Tensor) -> Tensor:
    """[B, H, n, d] of queries with [B, H, N, d] of keys: [B, H, n, N].

    For one query MKL's batched product takes twice as long as to multiply and add.
    """
    if q.shape[2] > 1 or not suits(q):
        return q @ k.transpose(-2, -1)
    return (q * k).sum(dim=-1).unsqueeze(2)


# -- steps, in compiled loops -------------------------------------------------------------------


@functools.cache
def _loops() -> Any:
    """The compiled loops; ``None`` where numba is not installed."""
    try:
        return importlib.import_module("dsm_tune.merging.loops")
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        return None


def loops_suit(x: Tensor) -> bool:
    """Whether what a step does to a tensor may be done by compiled loops."""
    return suits(x) and _loops() is not None


NONE = np.empty((0, 0), np.float32)


def _array(x: Tensor | None) -> Any:
    """A tensor as the loops take it."""
    return NONE if x is None else x.contiguous().numpy()


def choose(
    scores: Tensor,
    r: int,
    bonus: Tensor | None,
    tiles: tuple[Tensor, Tensor] | None,
    equal_quota: bool,
) -> tuple[Tensor, Tensor]:
    """Order [B, a] and destination [B, r], as ``matching.choose_edges`` has them."""
    batch, evens, _ = scores.shape
    order, destination = np.empty((batch, evens), np.int64), np.empty((batch, r), np.int64)
    even, odd = tiles or (None, None)
    given = _array(bonus), _array(even), _array(odd)
    _loops().choose(_array(scores), r, *given, equal_quota, order, destination)
    return torch.from_numpy(order), torch.from_numpy(destination)


@dataclasses.dataclass(frozen=True)
class Seats:
    """Where the tokens of a merge go; the rows of B images stand behind one another.

    Attributes:
        rows: [B (N - r)] of the B N rows: those that stay, in their new order.
        size: [B, N - r] float32, original tokens in each.
        moves: an array [B, r, 3]: the row that leaves, the one that it joins, and the one that
            this is among those that stay.
        share: an array [B, r]: the part of the merged token that each source has.
    """

    rows: Tensor
    size: Tensor
    moves: Any
    share: Any


def seat(
    order: Tensor,
    destination: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    prefix: int,
    count: int,
) -> Seats:
    """Seat the N tokens after the merges of a choice."""
    batch, r = destination.shape
    rows, new_size = (
        np.empty((batch, count - r), np.int64),
        np.empty((batch, count - r), np.float32),
    )
    moves, share = np.empty((batch, r, 3), np.int64), np.empty((batch, r), np.float32)
    given = order.numpy(), destination.numpy(), _array(size), _array(weight)
    _loops().seat(*given, prefix, rows, new_size, moves, share)
    return Seats(torch.from_numpy(rows).view(-1), torch.from_numpy(new_size), moves, share)


def joined(values: Tensor, seats: Seats, norm: str | None = "free") -> Tensor:
    """[B, N, C] of the tokens to [B, N - r, C] of what they became.

    Args:
        values: float32.
        seats: of the merge.
        norm: as of ``joining.merge``; ``None``: the tokens that stay have what they had.
    """
    rows = values.flatten(0, 1)
    stay = rows.index_select(0, seats.rows)
    if norm is not None:
        kind = _loops().NORMS[norm]
        _loops().join(_array(rows), seats.moves, seats.share, kind, stay.numpy())
    return stay.view(*seats.size.shape, -1)
