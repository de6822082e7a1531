"""What tokens are compared by and what they are worth: features, attention, penalties."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsm_tune.merging.halves import Projections
from dsm_tune.merging.matching import halves, unit
from dsm_tune.merging.on_cpu import mean_over_heads, query_key_products
from dsm_tune.plan import Matching

__all__ = [
    "LEAST_SHARE",
    "attention_to",
    "attention_to_values",
    "attention_weight",
    "feature_of",
    "features_of",
    "mean_of",
    "size_penalty",
    "worth_of",
]

LEAST_SHARE = 1e-3  # of the mean attention; so no power makes all weights vanish


def feature_of(kind: str, x: Tensor, parts: Projections, *, level: bool = True) -> Tensor:
    """The feature by which tokens are compared.

    Args:
        kind: ``k``, ``q``, ``v``: the mean over heads; ``kv``: both means, each of unit length;
            ``k_all``, ``kv_all``: all heads, likewise; ``x``: the tokens.
        x: [B, N, C] tokens after the attention half.
        parts: projections of the same block.
        level: whether the halves of ``kv`` and ``kv_all`` are brought to unit length, so that
            both count alike in a cosine; a length says nothing then.

    Returns:
        [B, N, F].
    """
    return mean_of(features_of(kind, x, parts), level=level)


def mean_of(features: tuple[Tensor, ...], *, level: bool = True) -> Tensor:
    """The means over heads of one or two features [B, H, N, d], side by side: [B, N, F].

    ``level`` is as of :func:`feature_of`.
    """
    several = [mean_over_heads(one) for one in features]
    if len(several) == 1:
        return several[0]
    return torch.cat([unit(one) for one in several] if level else several, dim=2)


def features_of(kind: str, x: Tensor, parts: Projections) -> tuple[Tensor, ...]:
    """What a feature is made of: the mean over heads of one or two of [B, H, N, d], in memory.

    Arguments are those of :func:`feature_of`.
    """
    if kind == "x":
        return (x.unsqueeze(1),)
    several = [getattr(parts, name) for name in kind.removesuffix("_all")]
    if kind.endswith("_all"):
        return tuple(one.transpose(1, 2).flatten(2).unsqueeze(1) for one in several)
    return tuple(several)


def attention_to(kind: str, parts: Projections, log_size: Tensor | None) -> Tensor:
    """Attention that each token receives, mean over heads.

    Args:
        kind: from the ``class`` token, or ``received``: the mean over all tokens.
        parts: projections of the block.
        log_size: [B, N] or ``None``, as the block's own attention had it.

    Returns:
        [B, N] float32; each row sums to 1.
    """
    return _shares(kind, parts, log_size).mean(dim=(1, 2))


def _shares(kind: str, parts: Projections, log_size: Tensor | None) -> Tensor:
    """Attention of each head from the class token, or from all: [B, H, 1 or N, N] float32."""
    q = parts.q[:, :, :1] if kind == "class" else parts.q
    logits = query_key_products(q, parts.k).float() * parts.scale
    if log_size is not None:
        logits = logits + log_size[:, None, None, :]
    return logits.softmax(dim=-1)


def attention_to_values(parts: Projections, log_size: Tensor | None, prefix: int) -> Tensor:
    """``A_1j ‖V_j‖ / Σ_i A_1i ‖V_i‖`` over the patch tokens, mean over heads.

    The significance score of Adaptive Token Sampling (Fayyaz et al., ECCV 2022), there with a
    sum over heads; A_1 is the attention of the class token.

    Args:
        parts: projections of the block.
        log_size: [B, N] or ``None``, as the block's own attention had it.
        prefix: p.

    Returns:
        [B, N - p] float32; each row sums to 1, or is 0 where all values are.
    """
    length: Tensor = torch.linalg.vector_norm(parts.v[:, :, prefix:].float(), dim=-1)
    worth = _shares("class", parts, log_size)[:, :, 0, prefix:] * length
    total: Tensor = worth.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    return (worth / total).mean(dim=1)


def worth_of(
    options: Matching,
    parts: Projections,
    log_size: Tensor | None,
    prefix: int,
    feature: Callable[[], Tensor],
) -> Tensor:
    """What prune and fuse steps keep the largest of.

    Args:
        options: of the plan.
        parts: projections of the block.
        log_size: [B, N] or ``None``, as the block's own attention had it.
        prefix: p.
        feature: gives [B, N, F]; called where its length is the score.

    Returns:
        [B, N - p] float32, 0 or more.
    """
    if options.prune_score == "norm":
        length: Tensor = feature()[:, prefix:].float().norm(dim=-1)
        return length
    if options.prune_score == "ats":
        return attention_to_values(parts, log_size, prefix)
    return attention_to(options.prune_score, parts, log_size)[:, prefix:]


def size_penalty(size: Tensor, prefix: int, beta: float) -> Tensor:
    """``β log(s_a s_b / (s_a + s_b))`` for each pair of an even and an odd token: [B, a, b]."""
    even, odd = halves(size.reciprocal(), prefix)
    return (even.unsqueeze(2) + odd.unsqueeze(1)).log_().mul_(-beta)


def attention_weight(received: Tensor, power: float) -> Tensor:
    """What attention makes of the weight of each token in a mean: [B, N] to the same, above 0.

    Relative to the mean of all tokens, so that it is 1 where attention is even.
    """
    weight: Tensor = (received * received.shape[1]).clamp(min=LEAST_SHARE) ** power
    return weight
