"""The merge plan: what happens to the tokens of a model, as frozen data.

A plan carries the geometry of the model it was made for, so that its token counts and its
cost follow in closed form, without torch and without the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from dsm_tune.errors import PlanError, nearest, shown

__all__ = ["FORMAT", "Geometry", "Matching", "MergePlan", "Step", "step_macs"]

FORMAT = "dsm_tune.plan/1"
HEADS = ("token", "distilled", "avg", "map")
FEATURES = ("k", "q", "v", "x", "kv", "k_all", "kv_all", "random")
QUOTAS = ("equal", "free")
POSITIONS = ("destination", "centroid")
NORMS = ("free", "mean", "largest")
ATTENTIONS = ("class", "received")
PRUNE_SCORES = ("norm", "class", "received", "ats")
KINDS = ("merge", "prune", "fuse")
LAST_BLOCKS = ("all", "prefix")
LARGEST = 1 << 20  # no count in a plan is larger; keeps hostile files cheap to refuse


def _integer(value: object, where: str, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= LARGEST:
        raise PlanError(
            f"{where} must be an integer from {low} to {LARGEST}, but got {_shown(value)}"
        )
    return value


def _number(value: object, where: str, low: float, high: float) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]
        raise PlanError(f"{where} must be a number from {low} to {high}, but got {_shown(value)}")
    return float(value)  # type: ignore[arg-type]


def _choice(value: object, where: str, accepted: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in accepted:
        raise PlanError(f"{where} must be one of {', '.join(accepted)}, but got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    text = shown(value, 61)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a model on which token counts and cost depend.

    Attributes:
        grid: patches per column and per row (rows, columns).
        prefix: class, distillation and register tokens in front of the patch tokens.
        depth: number of blocks.
        width: channels of a token.
        heads: attention heads per block.
        hidden: hidden width of the MLP. For a gated MLP, the width of the plain MLP that has as
            many multiply-adds.
        patch: side of a patch in pixels.
        classes: outputs of the head; 0 where the model has none.
        head: what the head reads: ``token`` (the class token), ``distilled`` (class and
            distillation tokens, two linear heads), ``avg`` (mean of the patch tokens) or ``map``
            (attention pooling of the patch tokens).
    """

    grid: tuple[int, int]
    prefix: int
    depth: int
    width: int
    heads: int
    hidden: int
    patch: int
    classes: int
    head: str

    def __post_init__(self) -> None:
        grid = self.grid
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            raise PlanError(f"geometry.grid must be [rows, columns], but got {_shown(grid)}")
        object.__setattr__(self, "grid", tuple(_integer(side, "geometry.grid", 1) for side in grid))
        for name, low in [("prefix", 0), ("depth", 1), ("width", 1), ("heads", 1)]:
            _integer(getattr(self, name), f"geometry.{name}", low)
        for name, low in [("hidden", 0), ("patch", 1), ("classes", 0)]:
            _integer(getattr(self, name), f"geometry.{name}", low)
        if self.depth > 1024:
            raise PlanError(f"geometry.depth must be at most 1024, but got {self.depth}")
        _choice(self.head, "geometry.head", HEADS)
        if self.head in ("token", "distilled") and self.prefix < HEADS.index(self.head) + 1:
            raise PlanError(
                f"geometry.prefix must count the tokens that a {self.head!r} head reads, "
                f"but got {self.prefix}"
            )
        if self.width % self.heads:
            raise PlanError(
                f"geometry.width must be a multiple of geometry.heads, "
                f"but got {self.width} and {self.heads}"
            )

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Number of tokens that enter the first block, prefix included."""
        return self.patches + self.prefix

    @property
    def reads_prefix_only(self) -> bool:
        """Whether the head reads nothing but prefix tokens."""
        return self.head in ("token", "distilled")


@dataclasses.dataclass(frozen=True)
class Matching:
    """How tokens are compared and chosen, for all steps of a plan.

    Attributes:
        feature: what is compared: ``k``, ``q``, ``v`` (mean over heads), ``kv`` (both means),
            ``k_all``, ``kv_all`` (all heads), ``x`` (the tokens) or ``random``.
        quota: share of the windows in a local block: ``equal`` (round robin) or ``free``.
        position: where a merged token stands: at its ``destination`` or at the size-weighted
            ``centroid``.
        salience: weight λ of the attention that a source receives, subtracted from its score as
            ``λ · n · attention``; 0 or more.
        attention: whose attention counts as salience: the ``class`` token's, or that
            ``received`` from all tokens.
        size_penalty: weight β of ``log(s_a s_b / (s_a + s_b))``, subtracted from the score.
        attention_weight: power γ of the attention that a token receives, in its weight
            ``size · attention^γ`` in a mean; 0 for the size alone.
        norm: length of a merged or fused token: ``free``, that of the mean; or the mean is scaled
            to the weighted ``mean`` or to the ``largest`` of the lengths of what it is made of.
        prune_score: what prune and fuse steps keep: a large L2 ``norm`` of the feature, much
            attention of the ``class`` token or ``received`` from all tokens, or much of the class
            token's attention times the length of the value (``ats``).
        seed: of the ``random`` feature.
    """

    feature: str = "k"
    quota: str = "equal"
    position: str = "destination"
    salience: float = 0.0
    attention: str = "class"
    size_penalty: float = 0.0
    attention_weight: float = 0.0
    norm: str = "free"
    prune_score: str = "norm"
    seed: int = 0

    def __post_init__(self) -> None:
        _choice(self.feature, "matching.feature", FEATURES)
        _choice(self.quota, "matching.quota", QUOTAS)
        _choice(self.position, "matching.position", POSITIONS)
        _choice(self.attention, "matching.attention", ATTENTIONS)
        _choice(self.norm, "matching.norm", NORMS)
        _choice(self.prune_score, "matching.prune_score", PRUNE_SCORES)
        _integer(self.seed, "matching.seed", 0)
        for name in ("salience", "size_penalty", "attention_weight"):
            number = _number(getattr(self, name), f"matching.{name}", 0.0, 100.0)
            object.__setattr__(self, name, number)

    @property
    def needs_attention(self) -> bool:
        """Whether a merge step looks at the attention that tokens receive."""
        return self.salience > 0 or self.attention_weight > 0

    def attention_for(self, kind: str) -> str | None:
        """Whose attention a step of a kind looks at: ``class``, ``received``, or ``None``."""
        if kind != "merge":
            return {"norm": None, "ats": "class"}.get(self.prune_score, self.prune_score)
        return self.attention if self.needs_attention else None

    def feature_width(self, geometry: Geometry) -> int:
        """Channels of the compared feature."""
        per_head = geometry.width // geometry.heads
        wide = {"x": geometry.width, "k_all": geometry.width, "kv_all": 2 * geometry.width}
        return wide.get(self.feature, 2 * per_head if self.feature == "kv" else per_head)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one block does to the tokens, between its attention and its MLP.

    Attributes:
        block: index of the block, from 0.
        kind: ``merge``; ``prune``, which drops the r tokens with the lowest scores; or ``fuse``,
            which makes one token of the r + 1 lowest, their mean weighed by the scores.
        r: tokens to remove; as many as there are, if there are fewer.
        window: side of the local windows in tokens of the original grid; ``None`` for global.
    """

    block: int
    kind: str = "merge"
    r: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        _integer(self.block, "step.block", 0)
        _choice(self.kind, "step.kind", KINDS)
        _integer(self.r, "step.r", 0)
        if self.window is not None:
            _integer(self.window, "step.window", 1)


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """Which tokens leave in which block, for a model of one geometry.

    Attributes:
        model: name of the model that the plan was made for; a label, not part of the digest.
        geometry: the sizes of that model.
        steps: at most one step per block, in ascending order.
        matching: how tokens are compared.
        proportional_attention: whether the logarithm of a key token's size is added to the
            attention logits (ToMe, section 3.2), those of an attention-pooling head included.
        last_block: ``all``, or ``prefix``: only the prefix tokens go through the last block,
            which is lossless where the head reads nothing else.

    Raises:
        PlanError: if a rule is broken.
    """

    model: str
    geometry: Geometry
    steps: tuple[Step, ...] = ()
    matching: Matching = Matching()
    proportional_attention: bool = True
    last_block: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not isinstance(self.model, str):
            raise PlanError(f"model must be a string, but got {_shown(self.model)}")
        if not isinstance(self.proportional_attention, bool):
            raise PlanError(
                "proportional_attention must be true or false, "
                f"but got {_shown(self.proportional_attention)}"
            )
        _choice(self.last_block, "last_block", LAST_BLOCKS)
        blocks = [step.block for step in self.steps]
        if blocks != sorted(set(blocks)):
            raise PlanError(f"steps must name ascending, distinct blocks, but got {_shown(blocks)}")
        if blocks and blocks[-1] >= self.geometry.depth:
            raise PlanError(
                f"step.block must be less than the depth {self.geometry.depth}, "
                f"but got {blocks[-1]}"
            )
        self._check_attention()
        self._check_last_block()

    def _check_attention(self) -> None:
        kinds = {"merge", *(step.kind for step in self.steps)}
        if (
            "class" in {self.matching.attention_for(kind) for kind in kinds}
            and not self.geometry.prefix
        ):
            raise PlanError(
                "matching.attention and matching.prune_score must not be 'class' for a model "
                "without a class token, nor prune_score 'ats'; 'received' is accepted"
            )

    def _check_last_block(self) -> None:
        if self.last_block == "all":
            return
        if not self.geometry.reads_prefix_only:
            raise PlanError(
                "last_block must be 'all' where the head reads patch tokens, "
                f"but got 'prefix' for a model with a {self.geometry.head!r} head"
            )
        if any(step.r and step.block == self.geometry.depth - 1 for step in self.steps):
            raise PlanError("the last block must have no step with r > 0 if last_block is 'prefix'")

    @cached_property
    def removed(self) -> tuple[int, ...]:
        """What each block really removes: ``r`` clamped to what is there (``depth`` values)."""
        wanted = {step.block: step for step in self.steps}
        prefix, count, removed = self.geometry.prefix, self.geometry.tokens, []
        for block in range(self.geometry.depth):
            step = wanted.get(block)
            if step is None:
                removed.append(0)
                continue
            patches = count - prefix
            most = patches // 2 if step.kind == "merge" else max(patches - 1, 0)
            removed.append(min(step.r, most))
            count -= removed[-1]
        return tuple(removed)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that enter each block, then those that leave the last (``depth + 1`` values)."""
        counts = [self.geometry.tokens]
        for r in self.removed:
            counts.append(counts[-1] - r)
        if self.last_block == "prefix":
            counts[-1] = self.geometry.prefix
        return tuple(counts)

    @cached_property
    def macs(self) -> int:
        """Multiply-adds per image, matching products included; norms and gathers are not."""
        steps = {step.block: step for step in self.steps}
        return _stem_and_head_macs(self) + sum(
            _block_macs(self, block, steps.get(block)) for block in range(self.geometry.depth)
        )

    @property
    def gmacs(self) -> float:
        """Giga multiply-adds per image: what the papers print as GFLOPs."""
        return self.macs / 1e9

    @property
    def active_steps(self) -> tuple[Step, ...]:
        """The steps that remove a token, with the ``r`` they realise and real windows only."""
        active = []
        for step in self.steps:
            r = self.removed[step.block]
            local = step.window is not None and step.window < max(self.geometry.grid)
            if r:
                window = step.window if local and step.kind == "merge" else None
                active.append(dataclasses.replace(step, r=r, window=window))
        return tuple(active)

    @property
    def is_dense(self) -> bool:
        """Whether a forward under the plan is that of the model as it is, to the bit."""
        return self.last_block == "all" and not self.active_steps

    @property
    def last_local(self) -> int:
        """The last block that merges within windows; -1 if none does."""
        return max((step.block for step in self.active_steps if step.window), default=-1)

    @property
    def pools_by_size(self) -> bool:
        """Whether the head takes a mean over tokens that have sizes, or attends to them."""
        attends = self.geometry.head == "map" and self.proportional_attention
        has_sizes = any(step.kind != "prune" for step in self.active_steps)
        return has_sizes and (self.geometry.head == "avg" or attends)

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits; equal for plans that do the same to the same geometry."""
        steps = self.active_steps
        canonical = dataclasses.replace(
            self,
            model="",
            steps=steps,
            matching=_used(self.matching, steps),
            proportional_attention=self.proportional_attention
            or all(step.kind == "prune" for step in steps),
        )
        return hashlib.sha256(canonical.to_json().encode()).hexdigest()[:16]

    def dense(self) -> MergePlan:
        """Return the plan of the same model that removes nothing."""
        return MergePlan(self.model, self.geometry)

    def to_json(self) -> str:
        """Return the plan as one line of JSON that :meth:`from_json` reads back."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> MergePlan:
        """Read a plan.

        Args:
            text: a JSON object as written by :meth:`to_json`.

        Raises:
            PlanError: for anything that is not a valid plan of a known format.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError, TypeError) as error:
            raise PlanError(
                f"a plan must be a JSON object, but got invalid JSON: {error}"
            ) from None
        return cls.from_dict(document)

    @classmethod
    def from_dict(cls, document: object) -> MergePlan:
        """Read a plan from parsed JSON; raises like :meth:`from_json`."""
        if not isinstance(document, Mapping):
            raise PlanError(f"a plan must be a JSON object, but got {_shown(document)}")
        if document.get("format") != FORMAT:
            raise PlanError(f"format must be {FORMAT!r}, but got {_shown(document.get('format'))}")
        body = {key: value for key, value in document.items() if key != "format"}
        _check_keys(body, cls, "plan")
        if "geometry" not in body or "model" not in body:
            raise PlanError("a plan must have the keys model and geometry")
        body["geometry"] = _part(body["geometry"], Geometry, "geometry")
        if "matching" in body:
            body["matching"] = _part(body["matching"], Matching, "matching")
        steps = body.get("steps", [])
        if not isinstance(steps, list) or len(steps) > 1024:
            raise PlanError(f"steps must be a list of at most 1024 steps, but got {_shown(steps)}")
        body["steps"] = tuple(_part(step, Step, f"steps[{i}]") for i, step in enumerate(steps))
        return cls(**body)


def _used(matching: Matching, steps: tuple[Step, ...]) -> Matching:
    """Return the matching with every option at its default that has no effect on the steps."""
    merges = any(step.kind == "merge" for step in steps)
    prunes = any(step.kind != "merge" for step in steps)
    compares = merges or (prunes and matching.prune_score == "norm")
    local = any(step.window for step in steps)
    used = {
        "feature": compares,
        "quota": local,
        "position": local,
        "salience": merges,
        "attention": merges and matching.needs_attention,
        "size_penalty": merges,
        "attention_weight": merges,
        "norm": any(step.kind != "prune" for step in steps),
        "prune_score": prunes,
        "seed": compares and matching.feature == "random",
    }
    return Matching(**{name: getattr(matching, name) for name, matters in used.items() if matters})


def _part(value: object, kind: Callable[..., Any], where: str) -> Any:
    if not isinstance(value, Mapping):
        raise PlanError(f"{where} must be a JSON object, but got {_shown(value)}")
    _check_keys(value, kind, where)
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    missing = [name for name in required if name not in value]
    if missing:
        raise PlanError(f"{where} must have the key {missing[0]}")
    return kind(**value)


def _check_keys(value: Mapping[str, object], kind: Callable[..., Any], where: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            raise PlanError(
                f"{where} has the unknown key {_shown(key)}{nearest(str(key)[:60], known)}; "
                f"accepted are {', '.join(known)}"
            )


def _stem_and_head_macs(plan: MergePlan) -> int:
    g = plan.geometry
    stem = g.patches * g.width * 3 * g.patch**2
    if g.head == "map":
        seen = plan.tokens[-1] - g.prefix
        pool = 2 * g.width**2 + seen * 2 * g.width**2
        pool += 2 * seen * g.width + 2 * g.width * g.hidden
    else:
        pool = 0
    return stem + pool + g.width * g.classes * (2 if g.head == "distilled" else 1)


def _block_macs(plan: MergePlan, block: int, step: Step | None) -> int:
    """4NC² + 2N²C + 2N'CM, plus matching, or what is left of it in a prefix-only last block."""
    g, n = plan.geometry, plan.tokens[block]
    if plan.last_block == "prefix" and block == g.depth - 1:
        p = g.prefix
        return 2 * (n + p) * g.width**2 + 2 * p * n * g.width + 2 * p * g.width * g.hidden
    attention = 4 * n * g.width**2 + 2 * n * n * g.width
    mlp = 2 * plan.tokens[block + 1] * g.width * g.hidden
    if step is None or not plan.removed[block]:
        return attention + mlp
    return attention + mlp + step_macs(g, plan.matching, step.kind, n)


def step_macs(g: Geometry, matching: Matching, kind: str, n: int) -> int:
    """Multiply-adds of the products that choose what leaves, from ``n`` tokens."""
    whose = matching.attention_for(kind)
    macs = {None: 0, "class": n * g.width, "received": n * n * g.width}[whose]
    if kind != "merge":
        return macs
    return macs + math.ceil(n / 2) * (n // 2) * matching.feature_width(g)
