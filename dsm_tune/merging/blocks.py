"""The blocks of a model, run under a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune.errors import ModelError, PlanError
from dsm_tune.merging import backbone, compiled_blocks, compiled_step, dropping, halves, scores
from dsm_tune.merging.joining import Tokens
from dsm_tune.plan import MergePlan, Step

__all__ = ["MergedBlocks", "random_feature"]


class MergedBlocks(nn.Sequential):
    """The blocks of a model, run under a plan; a drop-in for ``model.blocks``.

    The children are the model's own blocks under their own names, so ``state_dict`` is the same.
    """

    def __init__(self, blocks: nn.Sequential, plan: MergePlan) -> None:
        super().__init__(*nn.Sequential.__iter__(blocks))
        self.plan = plan
        self.steps = {step.block: step for step in plan.active_steps}
        self.last_local = plan.last_local
        self.is_dense = plan.is_dense
        self.series: dict[Any, Any] = {}  # of loops, planned by `compiled_blocks`
        self.final_norm: Any = None
        self.attention_pool: Any = None
        self.pooled_from = 0
        if plan.matching.feature == "random":
            for step in self.steps.values():
                self.register_buffer(
                    _random_name(step), random_feature(plan, step), persistent=False
                )

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks: [B, N, C] to what the model goes on with."""
        return self.leave(self.run(Tokens(x)))

    def leave(self, tokens: Tokens) -> Tensor:
        """What the model goes on with: [B, N', C]; [B, p + 1, C] where the head pools by size.

        A mean over the original tokens needs the sizes, which timm's head does not know. It is
        taken here, behind the final norm, and stands for all patch tokens (for all tokens, where
        the mean includes the prefix): the head's own mean of one token leaves it as it is. So does
        an attention-pooling head, which is called here and then hands on what it is given.
        """
        if self.final_norm is None or tokens.size is None:
            return tokens.x
        first = self.pooled_from
        x = type(self.final_norm).forward(self.final_norm, tokens.x)
        size = tokens.size[:, first:]
        if self.attention_pool is not None:
            pooled = backbone.pool_by_size(self.attention_pool, x[:, first:], size).unsqueeze(1)
        else:
            weight = (size / size.sum(dim=1, keepdim=True)).unsqueeze(2)
            pooled = (x[:, first:] * weight.to(x.dtype)).sum(dim=1, keepdim=True)
        return torch.cat([x[:, :first], pooled], dim=1)

    def run(self, tokens: Tokens, first: int = 0) -> Tokens:
        """Run the blocks from ``first`` on, on tokens of which none has left yet."""
        if tokens.x.shape[1] != self.plan.geometry.tokens:
            raise PlanError(
                f"the plan is for {self.plan.geometry.tokens} tokens, "
                f"but the model made {tokens.x.shape[1]} of this input"
            )
        quick = None if self.is_dense else compiled_blocks.run(self, tokens, first)
        if quick is not None:
            tokens, first = quick
        for index in range(first, len(self)):
            tokens = self.run_block(tokens, index)
        return tokens

    def run_block(self, tokens: Tokens, index: int) -> Tokens:
        """Run one block."""
        block, step, plan = self[index], self.steps.get(index), self.plan
        log_size = None
        if plan.proportional_attention and tokens.size is not None:
            log_size = tokens.size.log() if tokens.log_size is None else tokens.log_size
        if plan.last_block == "prefix" and index == len(self) - 1:
            x = halves.attend_prefix(block, tokens.x, log_size, plan.geometry.prefix)
            return Tokens(halves.feed_forward(block, x))
        if step is None and log_size is None:
            return tokens.having(block(tokens.x) if self.is_dense else halves.run(block, tokens.x))
        tokens = self._attend(block, step, tokens, log_size)
        return tokens.having(halves.feed_forward(block, tokens.x))

    def _attend(
        self, block: Any, step: Step | None, tokens: Tokens, log_size: Tensor | None
    ) -> Tokens:
        """The attention half of a block, and its step.

        What they needed is free when it returns: the MLP half finds that memory in the caches.
        """
        x, parts = halves.attend(block, tokens.x, log_size)
        tokens = tokens.having(x)
        if step is None:
            return tokens
        return self.take_step(tokens, step, parts, log_size)

    def take_step(
        self,
        tokens: Tokens,
        step: Step,
        parts: halves.Projections,
        log_size: Tensor | None,
    ) -> Tokens:
        """What a step leaves of the tokens of its block, after the attention half.

        Args:
            tokens: of the block.
            step: one of the plan's.
            parts: projections of the block.
            log_size: [B, N] or ``None``, as the block's attention had it.
        """
        options, prefix = self.plan.matching, self.plan.geometry.prefix
        if step.block <= self.last_local and tokens.place is None:
            tokens = tokens._replace(place=self.places(tokens.x))
        if step.kind == "merge":
            return self._merge(tokens, step, parts, log_size)
        worth = scores.worth_of(
            options, parts, log_size, prefix, lambda: self._feature(tokens, step, parts)
        )
        if step.kind == "prune":
            return dropping.prune(tokens, worth, step.r, prefix)
        centroid = options.position == "centroid"
        return dropping.fuse(tokens, worth, step.r, prefix, norm=options.norm, centroid=centroid)

    def _feature(self, tokens: Tokens, step: Step, parts: halves.Projections) -> Tensor:
        kind = self.plan.matching.feature
        if kind != "random":
            return scores.feature_of(kind, tokens.x, parts, level=step.kind == "merge")
        numbers: Tensor = getattr(self, _random_name(step))
        return numbers.to(tokens.x.dtype).expand(tokens.x.shape[0], -1, -1)

    def _merge(
        self,
        tokens: Tokens,
        step: Step,
        parts: halves.Projections,
        log_size: Tensor | None,
    ) -> Tokens:
        options, prefix = self.plan.matching, self.plan.geometry.prefix
        if options.feature == "random":
            features: tuple[Tensor, ...] = (self._feature(tokens, step, parts).unsqueeze(1),)
        else:
            features = scores.features_of(options.feature, tokens.x, parts)
        result = compiled_step.merged_tokens(
            compiled_step.Merge(tokens, features, parts, log_size, step, options, prefix)
        )
        if result.place is None or step.block < self.last_local:
            return result
        return result._replace(place=None)

    def places(self, x: Tensor) -> Tensor:
        """Row and column of every token before the first one leaves: [B, N, 2]; prefix: 0, 0."""
        rows, columns = self.plan.geometry.grid
        at = torch.arange(rows * columns, device=x.device)
        places = torch.stack([at // columns, at % columns], dim=1).float()
        prefix = places.new_zeros(self.plan.geometry.prefix, 2)
        return torch.cat([prefix, places]).expand(x.shape[0], -1, -1)

    def __getstate__(self) -> dict[str, Any]:
        """All but what is planned for the memory of these very blocks."""
        return {**self.__dict__, "series": {}}

    def __getitem__(self, index: Any) -> Any:
        return next(iter(self)) if isinstance(index, slice) else super().__getitem__(index)

    def __iter__(self) -> Iterator[nn.Module]:
        raise ModelError(
            "the blocks of a merged model cannot be run one by one (attn_mask, is_causal and "
            "forward_intermediates do that); only a plain forward is accepted"
        )


def _random_name(step: Step) -> str:
    return f"random_feature_{step.block}"


def random_feature(plan: MergePlan, step: Step) -> Tensor:
    """What tokens are compared by at random, the same for all images: [1, N, F] float32."""
    generator = torch.Generator().manual_seed(plan.matching.seed * 1024 + step.block)
    count, width = plan.tokens[step.block], plan.matching.feature_width(plan.geometry)
    return torch.randn(1, count, width, generator=generator)
