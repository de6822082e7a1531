"""A merge from its scores on, the quickest way there is: compiled loops on a CPU, eager.

They are in :mod:`~dsm_tune.merging.loops`, which is imported when the first tokens merge, and take
the place of some forty operators. Elsewhere the tensor functions do it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from dsm_tune.merging import on_cpu, team
from dsm_tune.merging.joining import Tokens, follow, merge, positions
from dsm_tune.merging.matching import Choice, choose_edges, first_positions, unit

__all__ = ["merge_best", "suits", "unit_mean"]


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
    batch, _, count, width = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    loops, found = _loops(), x.new_empty(batch, count, width)
    team.run(
        loops.unit_mean, *x.shape, *x.stride()[:3], x.data_ptr(), found.data_ptr(),
        shares=-(batch * count // -loops.TOKENS),
    )  # fmt: skip
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
    (batch, count, width), (_, evens, odds) = tokens.x.shape, scores.shape
    loops, left = _loops(), (batch, count - r)
    x, size = tokens.x.new_empty(*left, width), tokens.x.new_empty(left)
    place = None if tokens.place is None else tokens.x.new_empty(*left, 2)
    order = torch.empty(batch, evens, dtype=torch.int64)
    destination = torch.empty(batch, r, dtype=torch.int64)
    given = (scores, bonus, *(tiles or (None, None)), tokens.x, tokens.size, tokens.place, weight)
    given = [None if one is None else one.contiguous() for one in given]
    team.run(
        loops.step, batch, count, width, evens, odds, r, prefix, *first_positions(prefix),
        equal_quota, loops.NORMS[norm], centroid,
        *map(_address, (*given, x, size, place, order, destination)),
        shares=batch,
    )  # fmt: skip
    origin = tokens.origin
    if origin is not None:
        origin = follow(origin, positions(Choice(order, destination), count, prefix))
    return Tokens(x, size, place, origin)


def _address(x: Tensor | None) -> int:
    """Of its first number; 0 for none."""
    return 0 if x is None else x.data_ptr()
