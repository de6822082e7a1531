"""What becomes of tokens when the least worthy leave: prune and fuse, pure functions on tensors.

Letters in shapes are those of :mod:`~dsm_tune.merging.matching`. Everything has a static shape and
gives the same bits twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsm_tune.merging.joining import Tokens, follow, rows_at

__all__ = ["fuse", "prune"]


def prune(tokens: Tokens, scores: Tensor, r: int, prefix: int) -> Tokens:
    """Drop the r patch tokens with the lowest scores; the rest stays in order.

    Args:
        tokens: N tokens.
        scores: [B, N - p]; of equal scores, the token with the lower index stays.
        r: tokens to drop, less than N - p.
        prefix: p.
    """
    kept = _by_worth(scores)[:, : scores.shape[1] - r]
    return _keep(tokens, kept, prefix)


def fuse(
    tokens: Tokens,
    scores: Tensor,
    r: int,
    prefix: int,
    *,
    norm: str = "free",
    centroid: bool = False,
) -> Tokens:
    """Make one token of the r + 1 patch tokens with the lowest scores; the rest stays in order.

    EViT's inattentive token fusion (Liang et al., ICLR 2022), as a mean: its sum
    ``Σ score · x`` is divided by ``Σ score``, so that nothing need be trained to its length.

    Args:
        tokens: N tokens.
        scores: [B, N - p] float32, 0 or more: which tokens leave, and their weights in the mean.
        r: tokens that are gone afterwards, from 1 to N - p - 1.
        prefix: p.
        norm: as of :func:`~dsm_tune.merging.joining.merge`.
        centroid: whether the fused token stands at the weighted mean of the places, instead of at
            the place of the one among them with the highest score.

    Returns:
        N - r tokens: those that stayed, then the fused one, of the size of all it is made of.
    """
    order = _by_worth(scores)
    most = scores.shape[1] - r - 1
    kept, least = order[:, :most], order[:, most:]
    share = scores.gather(1, least).clamp_min(1e-12).unsqueeze(2)
    share = share / share.sum(dim=1, keepdim=True)
    rest, least = _keep(tokens, kept, prefix), least + prefix
    parts = rows_at(tokens.x, least).float()
    fused = (parts * share).sum(dim=1, keepdim=True)
    if norm != "free":
        length = torch.linalg.vector_norm(parts, dim=2, keepdim=True)
        wanted = (
            (length * share).sum(dim=1, keepdim=True) if norm == "mean" else length.amax(1, True)
        )
        actual = torch.linalg.vector_norm(fused, dim=2, keepdim=True)
        fused = fused * (wanted / actual.clamp_min(1e-6))
    size = tokens.size
    if size is None:
        size = tokens.x.new_ones(tokens.x.shape[:2], dtype=torch.float32)
    whole = size.gather(1, least).sum(dim=1, keepdim=True)
    stayed = size.new_ones(rest.x.shape[:2]) if rest.size is None else rest.size
    place = rest.place
    if tokens.place is not None and place is not None:
        places = rows_at(tokens.place, least)
        here = (places * share).sum(dim=1, keepdim=True) if centroid else places[:, :1]
        place = torch.cat([place, here], dim=1)
    origin = rest.origin
    if tokens.origin is not None and origin is not None:
        joined = origin.masked_fill(origin < 0, rest.x.shape[1])
        origin = joined.masked_fill(tokens.origin < 0, -1)
    x = torch.cat([rest.x, fused.to(tokens.x.dtype)], dim=1)
    return Tokens(x, torch.cat([stayed, whole], dim=1), place, origin)


def _by_worth(scores: Tensor) -> Tensor:
    """Patch tokens from the highest score to the lowest, of equal ones the first first: [B, n]."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def _keep(tokens: Tokens, kept: Tensor, prefix: int) -> Tokens:
    """The prefix and the patch tokens [B, m] of any order, in the order of the sequence."""
    kept = kept.sort(dim=1).values + prefix
    first = torch.arange(prefix, device=kept.device).expand(kept.shape[0], prefix)
    index = torch.cat([first, kept], dim=1)
    origin = tokens.origin
    if origin is not None:
        position = torch.full_like(tokens.x[..., 0], -1, dtype=torch.int64)
        ranks = torch.arange(index.shape[1], device=index.device).expand_as(index)
        origin = follow(origin, position.scatter(1, index, ranks))
    size = None if tokens.size is None else tokens.size.gather(1, index)
    place = None if tokens.place is None else rows_at(tokens.place, index)
    return Tokens(rows_at(tokens.x, index), size, place, origin)
