"""Delayed spatial merging once more: one image at a time, in plain loops, from the formulas.

Nothing of ``dsm_tune`` is imported: a plan is read as data, r is clamped here, tokens carry the set
of original tokens they hold (its length is the size), and attention is written out. Of timm only
the leaves (linear layers, norms) of a block are called. Slow, and meant to be.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

Edge = tuple[float, int, int]  # score, position of the source, position of the destination


@dataclasses.dataclass
class Token:
    """One token: its channels, the original tokens in it, and where it stands."""

    x: np.ndarray
    members: frozenset[int]
    row: float = 0.0
    column: float = 0.0

    @property
    def size(self) -> int:
        return len(self.members)


@dataclasses.dataclass
class Outcome:
    """Logits of one image, and the tokens' members after each block."""

    logits: np.ndarray
    members: list[list[frozenset[int]]]


@torch.no_grad()
def run(model: Any, plan: Any, image: torch.Tensor) -> Outcome:
    """Run one image [3, H, W] under a plan."""
    prefix, (_, columns) = plan.geometry.prefix, plan.geometry.grid
    entering = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0].numpy()
    tokens = [Token(x, frozenset([i])) for i, x in enumerate(entering)]
    for i, token in enumerate(tokens[prefix:]):
        token.row, token.column = float(i // columns), float(i % columns)
    steps = {step.block: step for step in plan.steps}
    members, merged_yet = [], False
    for index, block in enumerate(model.blocks):
        bias = np.zeros(len(tokens), dtype=np.float32)
        if plan.proportional_attention and merged_yet:
            bias = np.log(np.array([token.size for token in tokens], dtype=np.float32))
        last = plan.last_block == "prefix" and index == len(model.blocks) - 1
        attention, parts = _attend(block, tokens, bias, prefix if last else len(tokens))
        tokens = tokens[:prefix] if last else tokens
        step = steps.get(index)
        if step is not None and step.kind == "merge":
            r = min(step.r, (len(tokens) - prefix) // 2)
            edges = _edges(tokens, plan, step, parts, attention, r)
            tokens = _merge(tokens, edges, attention, prefix, plan)
            merged_yet = merged_yet or r > 0
        elif step is not None:
            r = min(step.r, max(len(tokens) - prefix - 1, 0))
            worth = _worth(tokens, plan, parts, attention)
            fuses = step.kind == "fuse" and r > 0
            tokens = (_fuse if fuses else _prune)(tokens, worth, r, prefix, plan)
            merged_yet = merged_yet or fuses
        _feed_forward(block, tokens)
        members.append([token.members for token in tokens])
    return Outcome(_read(model, plan, tokens), members)


def _tensor(tokens: list[Token]) -> torch.Tensor:
    return torch.from_numpy(np.stack([token.x for token in tokens]))[None]


def _attend(
    block: Any, tokens: list[Token], bias: np.ndarray, queries: int
) -> tuple[np.ndarray, Any]:
    """x + Attn(norm1(x)) in place; returns the attention [H, queries, N] and (q, k, v) per head."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(_tensor(tokens)))[0]
    width = qkv.shape[1] // 3
    d = width // attn.num_heads
    attention, outputs, parts = [], [], []
    for head in range(attn.num_heads):
        channels = slice(head * d, (head + 1) * d)
        q = attn.q_norm(qkv[:, :width][:, channels])
        k = attn.k_norm(qkv[:, width : 2 * width][:, channels])
        v = qkv[:, 2 * width :][:, channels]
        logits = (q[:queries] @ k.T).numpy() / math.sqrt(d) + bias
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights = weights / weights.sum(axis=1, keepdims=True)
        attention.append(weights)
        outputs.append(torch.from_numpy(weights) @ v)
        parts.append((q.numpy(), k.numpy(), v.numpy()))
    mixed = torch.cat(outputs, dim=1)[None]
    update = block.ls1(attn.proj(attn.norm(mixed)))[0].numpy()
    for token, change in zip(tokens[:queries], update, strict=True):
        token.x = token.x + change
    return np.stack(attention), parts


def _feed_forward(block: Any, tokens: list[Token]) -> None:
    update = block.ls2(block.mlp(block.norm2(_tensor(tokens))))[0].numpy()
    for token, change in zip(tokens, update, strict=True):
        token.x = token.x + change


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def _feature(tokens: list[Token], kind: str, parts: Any, i: int, level: bool = True) -> np.ndarray:
    """The feature of token i by which it is compared; two halves of it count alike if level."""
    if kind == "x":
        return tokens[i].x
    names = kind.removesuffix("_all")
    found = []
    for name in names:
        heads = [head["qkv".index(name)][i] for head in parts]
        found.append(np.concatenate(heads) if kind.endswith("_all") else sum(heads) / len(heads))
    if len(names) == 1:
        return found[0]
    return np.concatenate([_unit(vector) if level else vector for vector in found])


def _received(kind: str, attention: np.ndarray, i: int) -> float:
    """Attention that token i receives from the class token, or from all tokens on average."""
    return float(
        np.mean([head[0, i] if kind == "class" else head[:, i].mean() for head in attention])
    )


def _same_window(a: Token, b: Token, window: int) -> bool:
    return _window(a, window) == _window(b, window)


def _window(token: Token, window: int) -> tuple[float, float]:
    """The window of a token; places are known to a thousandth."""
    return (token.row + 1e-3) // window, (token.column + 1e-3) // window


def _edges(
    tokens: list[Token], plan: Any, step: Any, parts: Any, attention: np.ndarray, r: int
) -> list[Edge]:
    """The r edges that merge."""
    options, prefix, n = plan.matching, plan.geometry.prefix, len(tokens)
    unit = np.stack([_unit(_feature(tokens, options.feature, parts, i)) for i in range(n)])
    penalised = options.size_penalty > 0 and any(token.size > 1 for token in tokens)
    inside: list[Edge] = []
    across: list[Edge] = []
    for a in (i for i in range(prefix, n) if i % 2 == 0):
        best: dict[bool, Edge] = {}
        cosines = (unit @ unit[a]).tolist()
        for b in (i for i in range(prefix, n) if i % 2 == 1):
            score = cosines[b]
            if penalised:
                s_a, s_b = tokens[a].size, tokens[b].size
                score -= options.size_penalty * math.log(s_a * s_b / (s_a + s_b))
            near = step.window is None or _same_window(tokens[a], tokens[b], step.window)
            if near not in best or score > best[near][0]:
                best[near] = (score, a, b)
        score, a, b = best.get(True) or best[False]
        if options.salience:
            score -= options.salience * n * _received(options.attention, attention, a)
        (inside if True in best else across).append((score, a, b))
    inside.sort(key=lambda edge: -edge[0])  # stable: ties go to the lower index
    across.sort(key=lambda edge: -edge[0])
    if step.window is not None and options.quota == "equal":
        inside = _round_robin(inside, tokens, step.window)
    return (inside + across)[:r]


def _round_robin(edges: list[Edge], tokens: list[Token], window: int) -> list[Edge]:
    """One edge from each window per round, the best first."""
    waiting, taken = list(edges), []
    while waiting:
        visited, rest = set(), []
        for edge in waiting:
            source = tokens[edge[1]]
            where = _window(source, window)
            if where in visited:
                rest.append(edge)
            else:
                visited.add(where)
                taken.append(edge)
        waiting = rest
    return taken


def _importance(tokens: list[Token], attention: np.ndarray, plan: Any, i: int) -> float:
    """Weight of token i in a mean: its size, times a power of the attention it receives."""
    options = plan.matching
    if not options.attention_weight:
        return tokens[i].size
    relative = max(len(tokens) * _received(options.attention, attention, i), 1e-3)
    return tokens[i].size * relative**options.attention_weight


def _merge(
    tokens: list[Token], edges: list[Edge], attention: np.ndarray, prefix: int, plan: Any
) -> list[Token]:
    sources = {a for _, a, _ in edges}
    result = list(tokens[:prefix])
    result += [t for i, t in enumerate(tokens) if i >= prefix and i % 2 == 0 and i not in sources]
    for b in (i for i in range(prefix, len(tokens)) if i % 2 == 1):
        indices = [b] + [a for _, a, into in edges if into == b]
        group = [tokens[i] for i in indices]
        weights = [_importance(tokens, attention, plan, i) for i in indices]
        total = sum(weights)
        pairs = list(zip(group, weights, strict=True))
        x = sum(token.x.astype(np.float64) * weight for token, weight in pairs) / total
        lengths = [float(np.linalg.norm(token.x)) for token in group]
        if plan.matching.norm == "largest":
            x = x * max(lengths) / np.linalg.norm(x)
        elif plan.matching.norm == "mean":
            x = x * np.average(lengths, weights=weights) / np.linalg.norm(x)
        merged = Token(x.astype(np.float32), frozenset().union(*(t.members for t in group)))
        merged.row, merged.column = tokens[b].row, tokens[b].column
        if plan.matching.position == "centroid":
            merged.row = sum(token.row * weight for token, weight in pairs) / total
            merged.column = sum(token.column * weight for token, weight in pairs) / total
        result.append(merged)
    return result


def _worth(tokens: list[Token], plan: Any, parts: Any, attention: np.ndarray) -> list[float]:
    """What a prune step keeps the largest of, for every token."""
    options = plan.matching
    if options.prune_score == "norm":
        every = range(len(tokens))
        features = [_feature(tokens, options.feature, parts, i, level=False) for i in every]
        return [float(np.linalg.norm(feature)) for feature in features]
    if options.prune_score == "ats":
        return _class_attention_times_value(tokens, plan, parts, attention)
    return [_received(options.prune_score, attention, i) for i in range(len(tokens))]


def _class_attention_times_value(
    tokens: list[Token], plan: Any, parts: Any, attention: np.ndarray
) -> list[float]:
    """ATS: in each head, a share of the sum over patch tokens; then over heads."""
    prefix, worth = plan.geometry.prefix, [0.0] * len(tokens)
    for head, (_, _, values) in zip(attention, parts, strict=True):
        each = [float(head[0, i] * np.linalg.norm(values[i])) for i in range(len(tokens))]
        for i in range(prefix, len(tokens)):
            worth[i] += each[i] / sum(each[prefix:])
    return worth


def _fuse(tokens: list[Token], worth: list[float], r: int, prefix: int, plan: Any) -> list[Token]:
    """The r + 1 tokens that are worth least become one."""
    ranked = sorted(range(prefix, len(tokens)), key=lambda i: -worth[i])
    kept, least = sorted(ranked[: len(ranked) - r - 1]), ranked[len(ranked) - r - 1 :]
    group, weights = [tokens[i] for i in least], [worth[i] for i in least]
    x = sum(t.x.astype(np.float64) * w for t, w in zip(group, weights, strict=True)) / sum(weights)
    lengths = [float(np.linalg.norm(token.x)) for token in group]
    if plan.matching.norm == "largest":
        x = x * max(lengths) / np.linalg.norm(x)
    elif plan.matching.norm == "mean":
        x = x * np.average(lengths, weights=weights) / np.linalg.norm(x)
    fused = Token(x.astype(np.float32), frozenset().union(*(t.members for t in group)))
    fused.row, fused.column = group[0].row, group[0].column
    if plan.matching.position == "centroid":
        fused.row = float(np.average([token.row for token in group], weights=weights))
        fused.column = float(np.average([token.column for token in group], weights=weights))
    return tokens[:prefix] + [tokens[i] for i in kept] + [fused]


def _prune(tokens: list[Token], worth: list[float], r: int, prefix: int, _: Any) -> list[Token]:
    ranked = sorted(range(prefix, len(tokens)), key=lambda i: -worth[i])
    kept = sorted(ranked[: len(ranked) - r])
    return tokens[:prefix] + [tokens[i] for i in kept]


def _pool_by_attention(pool: Any, x: torch.Tensor, tokens: list[Token], plan: Any) -> torch.Tensor:
    """One latent token attends to all patch tokens: [1, C]."""
    queries, (keys, values) = pool.q(pool.latent[0])[0], pool.kv(x).chunk(2, dim=1)
    d = len(queries) // pool.num_heads
    outputs = []
    for head in range(pool.num_heads):
        channels = slice(head * d, (head + 1) * d)
        logits = [float(queries[channels] @ key[channels]) / math.sqrt(d) for key in keys]
        if plan.proportional_attention:
            logits = [one + math.log(t.size) for one, t in zip(logits, tokens, strict=True)]
        weights = np.exp(np.array(logits) - max(logits))
        weights = torch.from_numpy((weights / weights.sum()).astype(np.float32))
        outputs.append(weights @ values[:, channels])
    mixed = pool.proj(torch.cat(outputs)[None])
    return mixed + pool.mlp(pool.norm(mixed))


def _read(model: Any, plan: Any, tokens: list[Token]) -> np.ndarray:
    """What the head makes of the tokens; an average counts every original token once."""
    x = model.norm(_tensor(tokens))
    if plan.geometry.head == "token":
        pooled = x[:, 0]
    elif plan.geometry.head == "distilled":
        return ((model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2)[0].numpy()
    elif plan.geometry.head == "map":
        first = plan.geometry.prefix
        pooled = _pool_by_attention(model.attn_pool, x[0, first:], tokens[first:], plan)
    else:
        first = 0 if model.pool_include_prefix else plan.geometry.prefix
        sizes = torch.tensor([float(token.size) for token in tokens[first:]])
        pooled = (x[:, first:] * sizes[None, :, None]).sum(dim=1) / sizes.sum()
    return model.head(model.fc_norm(pooled))[0].numpy()
