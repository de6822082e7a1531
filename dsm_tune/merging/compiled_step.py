"""A merge step, the quickest way there is: one compiled loop on a CPU, eager.

It is :mod:`.loops.step`, which is imported when the first tokens merge, and takes the place of some
fifty operators. Elsewhere the tensor functions do it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsm_tune.merging import joining, loops, matching, on_cpu, scores
from dsm_tune.merging.halves import Projections
from dsm_tune.merging.joining import Tokens
from dsm_tune.merging.loops import team
from dsm_tune.plan import Matching, Step

__all__ = ["Merge", "by_operators", "merged_tokens", "numbers_of", "sides", "suits"]


def suits(x: Tensor) -> bool:
    """Whether a merge of tokens [B, N, C] may be done by the compiled loop."""
    return on_cpu.suits(x) and loops.module_of("step") is not None


class Merge(NamedTuple):
    """A step that merges, and what its block gives it after the attention half.

    Attributes:
        tokens: N tokens, with places if the step has a window.
        features: [B, H, N, d], whose mean over heads tokens are compared by; or two of them, whose
            means count alike.
        parts: projections of the block, for the attention that tokens receive.
        log_size: [B, N] or ``None``, as the block's attention had it.
        step: at least one token leaves.
        options: of the plan.
        prefix: p.
    """

    tokens: Tokens
    features: tuple[Tensor, ...]
    parts: Projections
    log_size: Tensor | None
    step: Step
    options: Matching
    prefix: int


def merged_tokens(merge: Merge) -> Tokens:
    """Match and merge: N - r tokens; the loop also takes logarithms of sizes."""
    return _by_loop(merge) if suits(merge.tokens.x) else by_operators(merge)


def by_operators(merge: Merge) -> Tokens:
    """The same by the tensor functions."""
    tokens, features, parts, log_size, step, options, prefix = merge
    pairs = matching.similarity(scores.mean_of(features), prefix)
    if options.size_penalty and tokens.size is not None:
        pairs = pairs - scores.size_penalty(tokens.size, prefix, options.size_penalty)
    tiles = bonus = weight = None
    if step.window and tokens.place is not None:
        even, odd = matching.halves(tokens.place, prefix)
        tiles = matching.tile(even, step.window), matching.tile(odd, step.window)
    if options.needs_attention:
        received = scores.attention_to(options.attention, parts, log_size)
        if options.salience:
            even = matching.halves(received, prefix)[0]
            bonus = even * (-options.salience * received.shape[1])
        if options.attention_weight:
            weight = scores.attention_weight(received, options.attention_weight)
    choice = matching.choose_edges(
        pairs, step.r, bonus=bonus, tiles=tiles, equal_quota=options.quota == "equal"
    )
    centroid = options.position == "centroid"
    return joining.merge(
        tokens, choice, prefix, weight=weight, norm=options.norm, centroid=centroid
    )


def numbers_of(
    step: Step, options: Matching, prefix: int, shape: tuple[int, ...], scale: float,
    feature: tuple[int, ...], key: tuple[int, ...], memory: tuple[int, ...],
) -> tuple[int, ...]:  # fmt: skip
    """What the loop is given.

    Args:
        step: merges tokens.
        options: of the plan.
        prefix: p.
        shape: B, N and C.
        scale: of the products of queries and keys.
        feature: H and d; how far it is to the next image, head and token.
        key: likewise.
        memory: addresses, in the order of ``loops.step.GIVEN``.
    """
    loop, count = loops.module_of("step"), shape[1]
    even, odd = matching.first_positions(prefix)
    return (
        *(*shape, *feature, *key, *sides(count, prefix), step.r, prefix, even, odd),
        *(step.window or 0, options.quota == "equal", loop.NORMS[options.norm]),
        options.position == "centroid",
        *team.bits(options.size_penalty, options.salience, options.attention_weight, scale),
        *memory,
    )


def sides(count: int, prefix: int) -> tuple[int, int]:
    """How many tokens are even and odd, of N with the prefix."""
    even, odd = matching.first_positions(prefix)
    return (count - even + 1) // 2, (count - odd + 1) // 2


def _by_loop(merge: Merge) -> Tokens:
    tokens, features, parts, log_size, step, options, prefix = merge
    (batch, count, channels), loop, r = tokens.x.shape, loops.module_of("step"), step.r
    evens, left = sides(count, prefix)[0], count - r
    feature, *others = map(team.in_rows, features)
    if any(other.stride() != feature.stride() for other in others):
        feature, *others = (one.contiguous() for one in (feature, *others))
    second = others[0] if others else None
    query, key, received = None, parts.k, None
    if options.needs_attention and options.attention == "class":
        query, key = team.in_rows(parts.q), team.in_rows(key)
        if query.stride() != key.stride():
            query, key = query.contiguous(), key.contiguous()
        received = tokens.x.new_empty(batch, count)
    elif options.needs_attention:
        received = scores.attention_to(options.attention, parts, log_size)
    x = tokens.x.new_empty(batch, left, channels)
    size, new_log_size = tokens.x.new_empty(2, batch, left).unbind()
    partner = tokens.x.new_empty(batch, evens, dtype=torch.int64)
    badness = tokens.x.new_empty(batch, evens)
    place = order = destination = None
    if tokens.place is not None:
        place = tokens.x.new_empty(batch, left, 2)
    if tokens.origin is not None:
        order = tokens.x.new_empty(batch, evens, dtype=torch.int64)
        destination = tokens.x.new_empty(batch, r, dtype=torch.int64)
    given = [log_size, received, tokens.x, tokens.size, tokens.place]
    given = [None if one is None else one.contiguous() for one in given]
    filled = partner, badness, x, size, new_log_size, place, order, destination
    memory = tuple(map(team.address_of, (feature, second, query, key, *given, *filled)))
    numbers = numbers_of(
        step, options, prefix, (batch, count, channels), parts.scale,
        _side_by_side(feature), _side_by_side(key), memory,
    )  # fmt: skip
    team.run(loop.step, *numbers, shares=batch * evens)
    origin = tokens.origin
    if order is not None and destination is not None and origin is not None:
        choice = matching.Choice(order, destination)
        origin = joining.follow(origin, joining.positions(choice, count, prefix))
    return Tokens(x, size, place, origin, new_log_size)


def _side_by_side(x: Tensor) -> tuple[int, ...]:
    """Of [B, H, N, d]: H and d; how far it is to the next image, head and token."""
    _, heads, _, width = x.shape
    return heads, width, *x.stride()[:3]
