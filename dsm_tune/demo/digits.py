"""scikit-learn's handwritten digits as images for a ViT: upsample, normalise, split, augment."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dsm_tune.demo import MEAN, STD
from dsm_tune.errors import ConfigError

__all__ = ["SIDE", "SPLITS", "augment", "load_split", "split_indices"]

SIDE = 28
SPLITS = ("train", "search", "holdout")
TRAIN_IMAGES = 1000
BRIGHTEST = 16.0  # the data set counts ink from 0 to 16


def load_split(name: str) -> tuple[Tensor, Tensor]:
    """Return images ``[N, 3, 28, 28]`` (float32, normalised) and labels ``[N]`` (int64, 0 to 9).

    Raises:
        ConfigError: if ``name`` is not one of ``SPLITS``.
    """
    from sklearn.datasets import load_digits  # not where a bundle of the demo is served

    pixels, targets = load_digits(return_X_y=True)
    labels = torch.from_numpy(targets).long()
    chosen = split_indices(labels, name)
    ink = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)[chosen] / BRIGHTEST
    large = F.interpolate(ink, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (large.expand(-1, 3, -1, -1) - mean) / std, labels[chosen]


def split_indices(labels: Tensor, name: str) -> Tensor:
    """Return the ascending indices ``[n]`` (int64) of one split of the ``labels`` ``[N]``.

    Images are dealt out evenly along the order of their classes, so that every split holds its
    share of each class to within one image. No random generator takes part: the splits cannot
    change with a library version.

    Raises:
        ConfigError: if ``name`` is not one of ``SPLITS``.
    """
    if name not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, but got {name!r}")
    by_class = labels.argsort(stable=True)
    dealt = torch.arange(len(labels) + 1) * TRAIN_IMAGES // len(labels)
    is_train = dealt.diff() == 1
    rest = by_class[~is_train]
    parts = {"train": by_class[is_train], "search": rest[::2], "holdout": rest[1::2]}
    return parts[name].sort().values


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``images`` ``[B, 3, H, W]``, each shifted, turned, sheared and scaled at random.

    Shifts go up to 10 % of the side, angles to 15 degrees, shears to 0.1, scales from 0.85 to
    1.15 per axis; what comes in at the border is what stood there.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    angle, shear = uniform(-math.pi / 12, math.pi / 12), uniform(-0.1, 0.1)
    cosine, sine = angle.cos(), angle.sin()
    turn = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    lean = torch.eye(2).repeat(len(images), 1, 1)
    lean[:, 0, 1] = shear
    linear = turn @ lean * uniform(0.85, 1.15, 1, 2)
    maps = torch.cat([linear, uniform(-0.2, 0.2, 2, 1)], dim=2)  # the side spans -1 to 1
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
