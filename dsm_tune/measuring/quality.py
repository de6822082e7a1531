"""How close a merged model stays to its dense model, and how often it is right."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["PerImage", "Quality", "bootstrap_interval", "compare"]


@dataclasses.dataclass(frozen=True)
class PerImage:
    """What each image says of a plan; all [N] on the CPU.

    Attributes:
        divergence: float64, KL(dense ‖ merged) in nats, or 1 - cosine where there are no classes.
        agrees: bool, same class as the dense model.
        hit1, hit5: bool, label first or among the first five; False where unlabelled.
        labelled: bool.
    """

    divergence: Tensor
    agrees: Tensor
    hit1: Tensor
    hit5: Tensor
    labelled: Tensor

    def summary(self, count: int | None = None) -> Quality:
        """Return the means over the first ``count`` images, or over all."""
        part = slice(0, count)
        labelled = self.labelled[part]
        known = int(labelled.sum())
        return Quality(
            images=len(labelled),
            divergence=float(self.divergence[part].mean()),
            agreement=float(self.agrees[part].double().mean()),
            top1=float(self.hit1[part].sum()) / known if known else None,
            top5=float(self.hit5[part].sum()) / known if known else None,
        )


@dataclasses.dataclass(frozen=True)
class Quality:
    """Means over images: divergence in nats (>= 0), the others as shares from 0 to 1."""

    images: int
    divergence: float
    agreement: float
    top1: float | None = None
    top5: float | None = None


def compare(dense: Tensor, outputs: Tensor, labels: Tensor, *, classes: int) -> PerImage:
    """Compare the outputs of a merged model with the dense model's.

    Args:
        dense: [N, K] outputs of the dense model.
        outputs: [N, K] outputs of the merged model.
        labels: [N] int64, -1 where unlabelled.
        classes: K if the outputs are logits, 0 if they are pooled features.
    """
    p, q = dense.double().cpu(), outputs.double().cpu()
    labels = labels.cpu()
    if classes:
        log_p, log_q = p.log_softmax(dim=1), q.log_softmax(dim=1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    else:
        divergence = 1 - torch.cosine_similarity(p, q, dim=1)
    best = q.topk(min(5, q.shape[1]), dim=1).indices == labels[:, None]
    labelled = labels >= 0
    return PerImage(
        divergence=divergence.clamp(min=0.0),
        agrees=p.argmax(dim=1) == q.argmax(dim=1)
        if classes
        else torch.ones(len(p), dtype=torch.bool),
        hit1=best[:, 0] & labelled,
        hit5=best.any(dim=1) & labelled,
        labelled=labelled,
    )


def bootstrap_interval(
    values: Tensor, *, seed: int = 0, resamples: int = 1000, statistic: float | None = None
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, or of a quantile, of [N] values.

    Args:
        values: [N] numbers, N >= 1.
        seed: of the resamples.
        resamples: how many.
        statistic: a quantile from 0 to 1, or ``None`` for the mean.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    sample = values.double()[drawn]
    means = sample.mean(dim=1) if statistic is None else sample.quantile(statistic, dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)
