"""What becomes of tokens when some merge with others, as pure functions on tensors.

Letters in shapes are those of :mod:`~dsm_tune.merging.matching`. Everything has a static shape and
gives the same bits twice.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from dsm_tune.merging.matching import Choice, first_positions, halves

__all__ = ["Tokens", "follow", "merge", "positions", "rows_at"]


class Tokens(NamedTuple):
    """The tokens between two blocks and what is known of them.

    Attributes:
        x: [B, N, C].
        size: [B, N] float32, original tokens in each token; ``None`` while all are 1.
        place: [B, N, 2] float32, row and column in the original grid; ``None`` if not needed.
        origin: [B, N0] int64, for each original token the token it is in now, -1 if it was
            pruned; ``None`` if not traced.
        log_size: [B, N] float32, logarithms of the sizes, if they were taken on the way.
    """

    x: Tensor
    size: Tensor | None = None
    place: Tensor | None = None
    origin: Tensor | None = None
    log_size: Tensor | None = None

    def having(self, x: Tensor) -> Tokens:
        """Return the same tokens with other values, as many."""
        return Tokens(x, self.size, self.place, self.origin, self.log_size)


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
    moves = _moves(choice, x.shape[1], prefix)
    stays, joins = moves.part(size)
    new_size = total = moves.sum_into(stays, joins)
    if weight is not None:
        stays, joins = moves.part(size * weight)
        total = moves.sum_into(stays, joins)
    share = (joins / moves.met_by(total)).unsqueeze(1)

    def mean(stays: Tensor, joins: Tensor) -> Tensor:
        return moves.sum_into(stays, (joins - moves.met_by(stays)).float() * share)

    merged = mean(*moves.part(x))
    if norm != "free":
        stays, joins = moves.part(torch.linalg.vector_norm(x.float(), dim=2).unsqueeze(2))
        wanted = mean(stays, joins) if norm == "mean" else moves.largest(stays, joins)
        actual = torch.linalg.vector_norm(merged.float(), dim=1, keepdim=True).clamp_min(1e-6)
        scale = (wanted / actual).masked_fill(moves.alone().unsqueeze(1), 1.0)
        merged = (merged * scale).to(x.dtype)
    place = tokens.place
    if place is not None:
        parts = moves.part(place)
        place = moves.by_image(mean(*parts) if centroid else parts[0])
    origin = tokens.origin
    if origin is not None:
        origin = follow(origin, positions(choice, x.shape[1], prefix))
    return Tokens(moves.by_image(merged), moves.by_image(new_size), place, origin)


@dataclasses.dataclass(frozen=True)
class _Moves:
    """Where the tokens of a merge go. Rows are tokens, the images behind one another.

    Attributes:
        order: [B (N - r) + B r] of the B N rows: those that stay, in their new order, then those
            that join one.
        target: [B r] of the B (N - r) rows that stay: whom they join.
        onto: [B, b, r] float32, 1 where a source joins an odd token: the sum as a product, which
            gives the same bits twice on any device and can be exported.
        batch, left: B and N - r.
    """

    order: Tensor
    target: Tensor
    onto: Tensor
    batch: int
    left: int

    def part(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Part [B, N, …] into the rows that stay and those that join one."""
        rows = values.flatten(0, 1).index_select(0, self.order)
        stay = self.batch * self.left
        return rows[:stay], rows[stay:]

    def met_by(self, stays: Tensor) -> Tensor:
        """For each row that joins one, the row that it joins."""
        return stays.index_select(0, self.target)

    def sum_into(self, stays: Tensor, change: Tensor) -> Tensor:
        """Add float32 rows to those that they join, summed in float32."""
        rows = stays.view(self.batch, self.left, -1)
        first = self.left - self.onto.shape[1]
        change = change.view(self.batch, self.onto.shape[2], rows.shape[2])
        odd = torch.baddbmm(rows[:, first:].float(), self.onto, change).to(stays.dtype)
        return torch.cat([rows[:, :first], odd], dim=1).view(stays.shape)

    def largest(self, stays: Tensor, joins: Tensor) -> Tensor:
        """The largest of [B (N - r), 1] and the [B r, 1] that join it."""
        rows = stays.view(self.batch, self.left)
        first = self.left - self.onto.shape[1]
        most = (self.onto * joins.view(self.batch, 1, -1)).amax(dim=2)
        odd = torch.maximum(rows[:, first:], most)
        return torch.cat([rows[:, :first], odd], dim=1).view(stays.shape)

    def alone(self) -> Tensor:
        """Which rows that stay are joined by none: [B (N - r)] bool."""
        odd = self.onto.amax(dim=2) == 0
        front = odd.new_ones(self.batch, self.left - odd.shape[1])
        return torch.cat([front, odd], dim=1).flatten()

    def by_image(self, rows: Tensor) -> Tensor:
        """[B (N - r), …] as [B, N - r, …]."""
        return rows.view(self.batch, self.left, *rows.shape[1:])


def _moves(choice: Choice, count: int, prefix: int) -> _Moves:
    """Lay out the moves of a choice among N tokens."""
    batch, r = choice.destination.shape
    left, device = count - r, choice.order.device
    even_at, odd_at = first_positions(prefix)
    at = torch.arange(count, device=device).expand(batch, count)
    odd = at[:, odd_at::2]
    several = odd.shape[1]
    stay = torch.cat([at[:, :prefix], choice.kept * 2 + even_at, odd], dim=1)
    image = torch.arange(batch, device=device).unsqueeze(1)
    source = choice.source * 2 + even_at + image * count
    order = torch.cat([(stay + image * count).flatten(), source.flatten()])
    target = choice.destination + (left - several) + image * left
    onto = choice.destination.unsqueeze(1) == at[:, :several].unsqueeze(2)
    return _Moves(order, target.flatten(), onto.float(), batch, left)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, n, C] at [B, m]: [B, m, C]; whole rows are copied, unlike by ``gather``."""
    batch, count, width = x.shape
    wanted = index.shape[1]
    if batch > 1:
        index = index + torch.arange(0, batch * count, count, device=x.device).unsqueeze(1)
    rows = x.reshape(batch * count, width).index_select(0, index.flatten())
    return rows.view(batch, wanted, width)


def positions(choice: Choice, count: int, prefix: int) -> Tensor:
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
