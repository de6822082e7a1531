"""What a plan is worth: quality on a set of images, with what all plans share computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune.measuring.quality import PerImage, compare
from dsm_tune.merging.backbone import read_geometry, stem
from dsm_tune.merging.halves import run
from dsm_tune.merging.merged import finish, merged
from dsm_tune.plan import MergePlan

__all__ = ["CACHE_BYTES", "Evaluator"]

BATCH_SIZE = 16
CACHE_BYTES = 2 << 30  # of activations kept per evaluator; what does not fit is computed again


class Evaluator:
    """Evaluates plans on one set of images.

    The dense outputs are computed once. The tokens that enter the first block that a plan
    changes are the same for all plans, and are kept too: a plan is run from there, in the same
    batches, so that its outputs have the bits that a forward from the images would give.

    Args:
        model: accepted by :func:`~dsm_tune.merging.backbone.read_geometry`; its parameters decide
            device and dtype.
        pixels: [N, 3, H, W] float32, normalised.
        labels: [N] int64, -1 where unlabelled.
        batch_size: images per forward.
        cache_bytes: of kept tokens at most.
    """

    def __init__(
        self,
        model: nn.Module,
        pixels: Tensor,
        labels: Tensor,
        *,
        batch_size: int = BATCH_SIZE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.model = model.eval()
        self.geometry = read_geometry(model)
        self.labels = labels
        self.batch_size = batch_size
        self.cache_bytes = cache_bytes
        self._batches = torch.split(pixels, batch_size)
        self._where = next(model.parameters())
        self._dense: list[Tensor] = []
        self._kept: dict[tuple[int, int], Tensor] = {}  # (block, batch): tokens entering the block

    @torch.inference_mode()
    def dense_outputs(self, count: int | None = None) -> Tensor:
        """Outputs of the dense model for the first ``count`` images, or all: [count, K], CPU."""
        wanted = len(self.labels) if count is None else count
        while len(self._dense) * self.batch_size < wanted:
            self._dense.append(self.dense_batch(len(self._dense)))
        return torch.cat(self._dense)[:wanted]

    def know_dense(self, outputs: Tensor) -> None:
        """Take the dense outputs [N, K] from elsewhere."""
        self._dense = list(torch.split(outputs, self.batch_size))

    @torch.inference_mode()
    def dense_batch(self, batch: int) -> Tensor:
        """Outputs of the dense model for one batch: [batch_size or fewer, K], CPU."""
        outputs: Tensor = self.model(self._pixels(batch))
        return outputs.cpu()

    @torch.inference_mode()
    def evaluate(self, plan: MergePlan, count: int | None = None) -> PerImage:
        """Compare a plan with the dense model on the first ``count`` images, or on all.

        Raises:
            PlanError: if the plan is for another geometry.
        """
        wanted = len(self.labels) if count is None else min(count, len(self.labels))
        dense = self.dense_outputs(wanted)
        if plan.is_dense:
            kept = dense  # its outputs have the dense model's bits
        else:
            batches = range(-(-wanted // self.batch_size))
            kept = torch.cat([self._outputs(plan, i) for i in batches])[:wanted]
        return compare(dense, kept, self.labels[:wanted], classes=self.geometry.classes)

    def _outputs(self, plan: MergePlan, batch: int) -> Tensor:
        steps = plan.active_steps
        first = steps[0].block if steps else self.geometry.depth - 1
        if first > 0:
            tokens = self._entering(first, batch)
            if tokens is not None:
                return finish(self.model, plan, tokens, first).cpu()
        with merged(self.model, plan) as fast:
            outputs: Tensor = fast(self._pixels(batch))
        return outputs.cpu()

    def _pixels(self, batch: int) -> Tensor:
        return self._batches[batch].to(self._where.device, self._where.dtype)

    def _entering(self, block: int, batch: int) -> Tensor | None:
        """Tokens that enter a block before any merges; ``None`` if there is no room for them."""
        found = self._kept.get((block, batch))
        if found is not None:
            return found
        geometry = self.geometry
        rows = sum(len(b) for b in self._batches)
        itemsize = self._where.element_size()
        levels = {b for b, _ in self._kept} | {block}
        if len(levels) * rows * geometry.tokens * geometry.width * itemsize > self.cache_bytes:
            return None
        kept = [level for level in levels if level < block and (level, batch) in self._kept]
        start = max(kept, default=0)
        x = self._kept[start, batch] if kept else stem(self.model, self._pixels(batch))
        parts: Any = self.model
        for index in range(start, block):
            x = run(parts.blocks[index], x)
        self._kept[block, batch] = x
        return x
