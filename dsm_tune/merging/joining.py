"""What becomes of tokens when some merge with others, as pure functions on tensors.

Letters in shapes are those of :mod:`~dsm_tune.merging.matching`. Everything has a static shape and
gives the same bits twice.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsm_tune.merging.matching import Choice, halves
from dsm_tune.merging.moves import moves_of

__all__ = ["Tokens", "follow", "merge", "rows_at"]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens between two blocks and what is known of them.

    Attributes:
        x: [B, N, C].
        size: [B, N] float32, original tokens in each token; ``None`` while all are 1.
        place: [B, N, 2] float32, row and column in the original grid; ``None`` if not needed.
        origin: [B, N0] int64, for each original token the token it is in now, -1 if it was
            pruned; ``None`` if not traced.
    """

    x: Tensor
    size: Tensor | None = None
    place: Tensor | None = None
    origin: Tensor | None = None

    def having(self, x: Tensor) -> Tokens:
        """Return the same tokens with other values, as many."""
        return Tokens(x, self.size, self.place, self.origin)


def merge(
    tokens: Tokens,
    choice: Choice,
    prefix: int,
    *,
    weight: Tensor | None = None,
    norm: str = "free",
    centroid: bool = False,
) -> Tokens:
    """Merge each source into its destination: a weighted mean, summed in float32.

    A destination d becomes ``d + Σ share · (source - d)``, where the share of a source is its part
    of all mass that meets there: a token that nothing merges into keeps its bits.

    Args:
        tokens: N tokens.
        choice: the r edges.
        prefix: p; these tokens stay as they are, in front.
        weight: [B, N] float32 > 0, multiplied with the sizes for the weights of the mean.
        norm: ``free``, or ``mean`` or ``largest``: the merged token is scaled to the weighted mean
            or the largest of the lengths of what was merged.
        centroid: whether a merged token stands at the weighted mean of the places, instead of
            at its destination's.

    Returns:
        N - r tokens: prefix, even tokens that stayed, odd tokens.
    """
    x, size = tokens.x, tokens.size
    if size is None:
        size = x.new_ones(x.shape[:2], dtype=torch.float32)
    moves = moves_of(choice, x.shape[1], prefix)
    sizes = moves.numbers(size)
    stays, joins = moves.part(sizes)
    new_size = total = moves.sum_into(stays, joins)
    if weight is not None:
        stays, joins = moves.part(sizes * moves.numbers(weight))
        total = moves.sum_into(stays, joins)
    share = joins / moves.met_by(total)
    shares = moves.column(share)

    def mean(rows: Tensor) -> Tensor:
        stays, joins = moves.part(rows)
        summed: Tensor = moves.sum_into(stays, (joins - moves.met_by(stays)).float() * shares)
        return summed

    merged = mean(x.flatten(0, 1))
    if norm != "free":
        stays, joins = moves.part(moves.numbers(_lengths(x.flatten(0, 1))))
        if norm == "mean":
            wanted = moves.sum_into(stays, (joins - moves.met_by(stays)) * share)
        else:
            wanted = moves.largest(stays, joins)
        scale = moves.ratio(wanted, moves.numbers(_lengths(merged)))
        merged = (merged * moves.column(scale)).to(x.dtype)
    place = tokens.place
    if place is not None:
        places = place.flatten(0, 1)
        place = moves.by_image(mean(places) if centroid else moves.part(places)[0])
    origin = None
    if tokens.origin is not None:
        origin = follow(tokens.origin, _positions(choice, size.shape[1], prefix))
    return Tokens(moves.by_image(merged), moves.by_image(new_size), place, origin)


def _lengths(rows: Tensor) -> Tensor:
    """Lengths of [rows, C]: [rows] float32."""
    lengths: Tensor = torch.linalg.vector_norm(rows.float(), dim=1)
    return lengths


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, n, C] at [B, m]: [B, m, C]; whole rows are copied, unlike by ``gather``."""
    batch, count, width = x.shape
    wanted = index.shape[1]
    if batch > 1:
        index = index + torch.arange(0, batch * count, count, device=x.device).unsqueeze(1)
    rows = x.reshape(batch * count, width).index_select(0, index.flatten())
    return rows.view(batch, wanted, width)


def _positions(choice: Choice, count: int, prefix: int) -> Tensor:
    """New position of each of the N tokens after a merge: [B, N]."""
    kept, source = choice.kept, choice.source
    position = torch.arange(count, device=kept.device).repeat(kept.shape[0], 1)
    even, odd = halves(position, prefix)  # views: writing to them fills `position`
    behind = prefix + kept.shape[1]
    odd.copy_(torch.arange(odd.shape[1], device=kept.device) + behind)
    ranks = torch.arange(kept.shape[1], device=kept.device).expand_as(kept) + prefix
    even.scatter_(1, kept, ranks)
    even.scatter_(1, source, choice.destination + behind)
    return position


def follow(origin: Tensor, position: Tensor) -> Tensor:
    """Where [B, N0] original tokens are, given the new position of each token [B, N]."""
    return position.gather(1, origin.clamp(min=0)).masked_fill(origin < 0, -1)
