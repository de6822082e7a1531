"""Which tokens leave: pure functions on tensors.

Letters in shapes: B images, N tokens (prefix included), p prefix tokens, C channels, H heads,
d channels per head, F channels of the compared feature, a and b patch tokens at even and odd
positions, r tokens that leave. Everything has a static shape and gives the same bits twice.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = [
    "Choice",
    "choose_edges",
    "first_positions",
    "halves",
    "similarity",
    "tile",
    "unit",
]


# A mean of equal places may round to just below them; it must not fall into the tile before.
PLACE_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Choice:
    """The edges that merge. Indices count the even (a) or odd (b) patch tokens, from 0.

    Attributes:
        order: [B, a] even tokens, the r that merge first, by rank.
        destination: [B, r] odd tokens that they merge into.
    """

    order: Tensor
    destination: Tensor

    @property
    def source(self) -> Tensor:
        """Even tokens that merge: [B, r]."""
        return self.order[:, : self.destination.shape[1]]

    @property
    def kept(self) -> Tensor:
        """Even tokens that stay, ascending: [B, a - r]."""
        return self.order[:, self.destination.shape[1] :].sort(dim=1)[0]


def halves(x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Return views of the patch tokens at even and at odd positions of the whole sequence."""
    even, odd = first_positions(prefix)
    return x[:, even::2], x[:, odd::2]


def first_positions(prefix: int) -> tuple[int, int]:
    """Positions in the whole sequence of the first patch token at an even and at an odd one."""
    return prefix + prefix % 2, prefix + 1 - prefix % 2


def similarity(feature: Tensor, prefix: int) -> Tensor:
    """Cosine of every even patch token with every odd one.

    Args:
        feature: [B, N, F]; zero rows give cosine 0.
        prefix: p.

    Returns:
        [B, a, b] float32.
    """
    even, odd = halves(unit(feature), prefix)
    return torch.bmm(even, odd.transpose(1, 2)).float()


def unit(feature: Tensor) -> Tensor:
    """Scale the rows of [B, N, F] to length 1; zero rows stay."""
    exact = feature.float()
    length: Tensor = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    return (exact / length.clamp_min(1e-6)).to(feature.dtype)


def tile(place: Tensor, window: int) -> Tensor:
    """Number the ``window`` × ``window`` tiles of the original grid.

    Args:
        place: [B, n, 2] row and column.
        window: side of a tile in tokens.

    Returns:
        [B, n] float32, equal for tokens of one tile.
    """
    corner = ((place + PLACE_TOLERANCE) / window).floor()
    return corner[..., 0] * 4096.0 + corner[..., 1]


def choose_edges(
    scores: Tensor,
    r: int,
    *,
    bonus: Tensor | None = None,
    tiles: tuple[Tensor, Tensor] | None = None,
    equal_quota: bool = True,
) -> Choice:
    """Choose the r best edges, each even token offering the edge to its best odd partner.

    ToMe's bipartite soft matching (section 3.1), and DSM's local form of it: with ``tiles``, an
    edge that crosses a border ranks after all edges inside tiles. Ties go to the lower index.

    Args:
        scores: [B, a, b] float32.
        r: edges to choose, at most a.
        bonus: [B, a] float32, added to the score of each even token's edge.
        tiles: tile of each even [B, a] and each odd [B, b] token.
        equal_quota: with tiles, whether edges are taken in rounds, one from each tile per round.
    """
    best, partner = scores.max(dim=-1)
    crosses = None
    if tiles is not None:
        apart = tiles[0].unsqueeze(2) != tiles[1].unsqueeze(1)
        inside, inside_partner = scores.masked_fill(apart, -torch.inf).max(dim=-1)
        crosses = inside == -torch.inf
        best = torch.where(crosses, best, inside)
        partner = torch.where(crosses, partner, inside_partner)
    if bonus is not None:
        best = best + bonus
    order = best.sort(dim=1, descending=True, stable=True)[1]
    if tiles is not None and crosses is not None:
        rounds = _rounds(order, tiles[0], crosses, equal_quota)
        order = order.gather(1, rounds.argsort(dim=1, stable=True))
    return Choice(order, partner.gather(1, order[:, :r]))


def _rounds(order: Tensor, tiles: Tensor, crosses: Tensor, equal_quota: bool) -> Tensor:
    """Round in which each edge, in the given order, is taken: [B, a]; crossing edges come last."""
    count = order.shape[1]
    crossing = crosses.gather(1, order)
    if not equal_quota:
        return crossing.long()
    ranked = tiles.gather(1, order)
    same = (ranked.unsqueeze(2) == ranked.unsqueeze(1)) & ~crossing.unsqueeze(1)
    earlier = torch.ones(count, count, dtype=torch.bool, device=order.device).tril(-1)
    return (same & earlier).sum(dim=2).masked_fill(crossing, count)
