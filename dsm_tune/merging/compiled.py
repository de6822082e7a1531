"""A step of a plan on a CPU, eager: two calls of compiled loops instead of forty operators.

The loops are in :mod:`~dsm_tune.merging.loops`, which is imported when the first tokens merge.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsm_tune.merging import on_cpu

__all__ = ["Seats", "choose", "joined", "seat", "suits"]

NONE = np.empty((0, 0), np.float32)


@functools.cache
def _loops() -> Any:
    """The compiled loops; ``None`` where numba is not installed."""
    try:
        return importlib.import_module("dsm_tune.merging.loops")
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        return None


def suits(x: Tensor) -> bool:
    """Whether what a step does to a tensor may be done by compiled loops."""
    return on_cpu.suits(x) and _loops() is not None


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
    left = (batch, count - r)
    rows, new_size = np.empty(left, np.int64), np.empty(left, np.float32)
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


def _array(x: Tensor | None) -> Any:
    """A tensor as the loops take it."""
    return NONE if x is None else x.contiguous().numpy()
