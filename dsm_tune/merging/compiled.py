"""A merge, the quickest way there is: one compiled loop on a CPU, eager.

It is in :mod:`~dsm_tune.merging.loops`, which is imported when the first tokens merge, and takes
the place of some fifty operators. Elsewhere the tensor functions do it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from dsm_tune.merging import on_cpu, team
from dsm_tune.merging.joining import Tokens, follow, merge, positions
from dsm_tune.merging.matching import Choice, choose_edges, first_positions, similarity

__all__ = ["merge_best", "suits"]


@functools.cache
def _loops() -> Any:
    """The compiled loop; ``None`` where numba is not installed."""
    try:
        return importlib.import_module("dsm_tune.merging.loops")
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        return None


def suits(x: Tensor) -> bool:
    """Whether a merge of tokens [B, N, C] may be done by the compiled loop."""
    return on_cpu.suits(x) and _loops() is not None


def merge_best(
    tokens: Tokens,
    feature: Tensor,
    r: int,
    prefix: int,
    *,
    penalty: Tensor | None = None,
    bonus: Tensor | None = None,
    tiles: tuple[Tensor, Tensor] | None = None,
    equal_quota: bool = True,
    weight: Tensor | None = None,
    norm: str = "free",
    centroid: bool = False,
) -> Tokens:
    """What ``similarity``, ``choose_edges`` and ``merge`` give, one after the other.

    Args:
        tokens: N tokens.
        feature: [B, H, N, d], whose mean over heads tokens are compared by.
        r: edges that merge, at least 1.
        prefix: p.
        penalty: [B, a, b] or ``None``, subtracted from the similarity.
        bonus: as of :func:`~dsm_tune.merging.matching.choose_edges`, like ``tiles`` and
            ``equal_quota``.
        tiles: [B, a] and [B, b], or ``None``.
        equal_quota: with tiles, whether edges are taken in rounds.
        weight: as of :func:`~dsm_tune.merging.joining.merge`, like ``norm`` and ``centroid``.
        norm: ``free``, ``mean`` or ``largest``.
        centroid: whether a merged token stands at the weighted mean of the places.
    """
    if not suits(tokens.x):
        scores = similarity(on_cpu.mean_over_heads(feature), prefix)
        scores = scores if penalty is None else scores - penalty
        choice = choose_edges(scores, r, bonus=bonus, tiles=tiles, equal_quota=equal_quota)
        return merge(tokens, choice, prefix, weight=weight, norm=norm, centroid=centroid)
    # What is called here stands between a step and its work: a forward of one image feels it.
    (batch, count, channels), loops = tokens.x.shape, _loops()
    even, odd = first_positions(prefix)
    evens, odds, left = (count - even + 1) // 2, (count - odd + 1) // 2, count - r
    if feature.stride(3) != 1:
        feature = feature.contiguous()
    x, size = tokens.x.new_empty(batch, left, channels), tokens.x.new_empty(batch, left)
    place = order = destination = None
    if tokens.place is not None:
        place = tokens.x.new_empty(batch, left, 2)
    if tokens.origin is not None:
        order = torch.empty(batch, evens, dtype=torch.int64)
        destination = torch.empty(batch, r, dtype=torch.int64)
    given = (penalty, bonus, *(tiles or (None, None)), tokens.x, tokens.size, tokens.place, weight)
    given = tuple(None if one is None else one.contiguous() for one in given)
    team.run(
        loops.step, batch, count, channels, feature.shape[1], feature.shape[3],
        *feature.stride()[:3], evens, odds, r, prefix, even, odd,
        equal_quota, loops.NORMS[norm], centroid,
        *map(_address, (feature, *given, x, size, place, order, destination)), shares=batch,
    )  # fmt: skip
    origin = tokens.origin
    if order is not None and destination is not None and origin is not None:
        origin = follow(origin, positions(Choice(order, destination), count, prefix))
    return Tokens(x, size, place, origin)


def _address(x: Tensor | None) -> int:
    """Of its first number; 0 for none."""
    return 0 if x is None else x.data_ptr()
