"""A merge from its scores on, the quickest way there is: compiled loops on a CPU, eager.

They are in :mod:`~dsm_tune.merging.loops`, which is imported when the first tokens merge, and take
the place of some forty operators. Elsewhere the tensor functions do it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsm_tune.merging import on_cpu
from dsm_tune.merging.joining import Tokens, follow, merge, positions
from dsm_tune.merging.matching import Choice, choose_edges, first_positions, unit

__all__ = ["merge_best", "suits", "unit_mean"]

NONE, NO_PLACES = np.empty((0, 0), np.float32), np.empty((0, 0, 0), np.float32)


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
    """Whether a merge of tokens [B, N, C] may be done by compiled loops."""
    return on_cpu.suits(x) and _loops() is not None


def unit_mean(x: Tensor) -> Tensor:
    """The mean over heads of [B, H, N, d], each of unit length: [B, N, d]."""
    if not suits(x):
        return unit(on_cpu.mean_over_heads(x))
    batch, heads, count, width = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    image, head, token, _ = x.stride()
    memory = x.as_strided((x.untyped_storage().size() // x.itemsize,), (1,), 0).numpy()
    found = x.new_empty(batch, count, width)
    _loops().unit_mean(memory, x.storage_offset(), image, head, token, heads, found.numpy())
    return found


def merge_best(
    tokens: Tokens,
    scores: Tensor,
    r: int,
    prefix: int,
    *,
    bonus: Tensor | None = None,
    tiles: tuple[Tensor, Tensor] | None = None,
    equal_quota: bool = True,
    weight: Tensor | None = None,
    norm: str = "free",
    centroid: bool = False,
) -> Tokens:
    """What ``choose_edges`` and then ``merge`` give, of the same arguments.

    Args:
        tokens: N tokens.
        scores: as of :func:`~dsm_tune.merging.matching.choose_edges`, like ``r``, ``bonus``,
            ``tiles`` and ``equal_quota``.
        r: edges that merge.
        prefix: as of :func:`~dsm_tune.merging.joining.merge`, like ``weight``, ``norm`` and
            ``centroid``.
        bonus: [B, a] or ``None``.
        tiles: [B, a] and [B, b], or ``None``.
        equal_quota: with tiles, whether edges are taken in rounds.
        weight: [B, N] or ``None``.
        norm: ``free``, ``mean`` or ``largest``.
        centroid: whether a merged token stands at the weighted mean of the places.
    """
    if not suits(tokens.x):
        choice = choose_edges(scores, r, bonus=bonus, tiles=tiles, equal_quota=equal_quota)
        return merge(tokens, choice, prefix, weight=weight, norm=norm, centroid=centroid)
    (batch, count, width), evens = tokens.x.shape, scores.shape[1]
    left = batch, count - r
    # By torch, whose memory is aligned for wide registers.
    x, size = tokens.x.new_empty(*left, width), tokens.x.new_empty(left)
    place = None if tokens.place is None else tokens.x.new_empty(*left, 2)
    order, destination = np.empty((batch, evens), np.int64), np.empty((batch, r), np.int64)
    even_tiles, odd_tiles = tiles or (None, None)
    loops = _loops()
    loops.step(
        _array(scores), _array(bonus), _array(even_tiles), _array(odd_tiles), equal_quota,
        prefix, *first_positions(prefix), loops.NORMS[norm], centroid,
        _array(tokens.x), _array(tokens.size), _array(tokens.place, NO_PLACES), _array(weight),
        x.numpy(), size.numpy(), _array(place, NO_PLACES), order, destination,
    )  # fmt: skip
    origin = tokens.origin
    if origin is not None:
        choice = Choice(torch.from_numpy(order), torch.from_numpy(destination))
        origin = follow(origin, positions(choice, count, prefix))
    return Tokens(x, size, place, origin)


def _array(x: Tensor | None, none: Any = NONE) -> Any:
    """A tensor as the loop takes it."""
    return none if x is None else x.contiguous().numpy()
