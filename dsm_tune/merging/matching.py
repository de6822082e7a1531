"""Which tokens leave and what becomes of them: pure functions on tensors.

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
    "Tokens",
    "choose_edges",
    "halves",
    "merge",
    "prune",
    "similarity",
    "tile",
    "unit",
]


# A mean of equal places may round to just below them; it must not fall into the tile before.
PLACE_TOLERANCE = 1e-3


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


@dataclasses.dataclass(frozen=True)
class Choice:
    """The edges that merge. Indices count the even (a) or odd (b) patch tokens, from 0.

    Attributes:
        kept: [B, a - r] even tokens that stay, ascending.
        source: [B, r] even tokens that merge.
        destination: [B, r] odd tokens that they merge into.
    """

    kept: Tensor
    source: Tensor
    destination: Tensor


def halves(x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Return views of the patch tokens at even and at odd positions of the whole sequence."""
    even, odd = _first(prefix)
    return x[:, even::2], x[:, odd::2]


def _first(prefix: int) -> tuple[int, int]:
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
    return (even @ odd.transpose(1, 2)).float()


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
    order = best.sort(dim=1, descending=True, stable=True).indices
    if tiles is not None and crosses is not None:
        rounds = _rounds(order, tiles[0], crosses, equal_quota)
        order = order.gather(1, rounds.argsort(dim=1, stable=True))
    source = order[:, :r]
    return Choice(order[:, r:].sort(dim=1).values, source, partner.gather(1, source))


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
    even_at, odd_at = _first(prefix)
    kept = torch.add(even_at, choice.kept, alpha=2)
    source = torch.add(even_at, choice.source, alpha=2)
    slot = torch.arange(size[:, odd_at::2].shape[1], device=x.device).view(1, -1, 1)
    arrives = choice.destination.unsqueeze(1) == slot
    mass = size if weight is None else size * weight
    arriving = arrives * mass.gather(1, source).unsqueeze(1)
    odd_mass = mass[:, odd_at::2]
    total = odd_mass + arriving.sum(dim=2)
    # An odd token that nothing merges into has the share 1 exactly, and so keeps its bits.
    stays, joins = (odd_mass / total).unsqueeze(2), arriving / total.unsqueeze(2)

    def join(values: Tensor, odd: Tensor) -> Tensor:
        return torch.cat([values[:, :prefix], _rows(values, kept), odd], dim=1)

    def mean(values: Tensor, norm: str = "free") -> Tensor:
        sources, odd = _rows(values, source).float(), values[:, odd_at::2].float()
        merged = torch.baddbmm(odd * stays, joins, sources)
        if norm != "free":
            lengths = sources.norm(dim=2).unsqueeze(1), odd.norm(dim=2, keepdim=True)
            merged = _scaled(merged, *lengths, joins, stays, norm)
        return join(values, merged.to(values.dtype))

    place = tokens.place
    if place is not None:
        place = mean(place) if centroid else join(place, place[:, odd_at::2])
    if weight is not None:
        came = (arrives * size.gather(1, source).unsqueeze(1)).sum(dim=2)
        total = size[:, odd_at::2] + came
    merged_size = torch.cat([size[:, :prefix], size.gather(1, kept), total], dim=1)
    origin = None
    if tokens.origin is not None:
        origin = _follow(tokens.origin, _positions(choice, size.shape[1], prefix))
    return Tokens(mean(x, norm), merged_size, place, origin)


def _scaled(
    merged: Tensor, source: Tensor, odd: Tensor, joins: Tensor, stays: Tensor, norm: str
) -> Tensor:
    """Scale merged tokens [B, b, C] to lengths of sources [B, 1, r] and odd tokens [B, b, 1]."""
    if norm == "mean":
        wanted = odd * stays + (joins * source).sum(dim=2, keepdim=True)
    else:
        longest = (source * (joins > 0)).amax(dim=2, keepdim=True)
        wanted = torch.maximum(odd, longest)
    alone = stays == 1
    return torch.where(
        alone, merged, merged * (wanted / merged.norm(dim=2, keepdim=True).clamp(min=1e-6))
    )


def _rows(x: Tensor, index: Tensor) -> Tensor:
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


def _follow(origin: Tensor, position: Tensor) -> Tensor:
    return position.gather(1, origin.clamp(min=0)).masked_fill(origin < 0, -1)


def prune(tokens: Tokens, scores: Tensor, r: int, prefix: int) -> Tokens:
    """Drop the r patch tokens with the lowest scores; the rest stays in order.

    Args:
        tokens: N tokens.
        scores: [B, N - p]; of equal scores, the token with the lower index stays.
        r: tokens to drop, less than N - p.
        prefix: p.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    kept = order[:, : scores.shape[1] - r].sort(dim=1).values + prefix
    first = torch.arange(prefix, device=kept.device).expand(kept.shape[0], prefix)
    index = torch.cat([first, kept], dim=1)
    origin = tokens.origin
    if origin is not None:
        position = torch.full_like(tokens.x[..., 0], -1, dtype=torch.int64)
        ranks = torch.arange(index.shape[1], device=index.device).expand_as(index)
        origin = _follow(origin, position.scatter(1, index, ranks))
    size = None if tokens.size is None else tokens.size.gather(1, index)
    place = None if tokens.place is None else _rows(tokens.place, index)
    return Tokens(_rows(tokens.x, index), size, place, origin)
