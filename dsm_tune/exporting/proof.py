"""Whether a forward gives what the merged model gives, and how that is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["BATCHES", "TOLERANCE", "Proof", "compared", "synthetic_images"]

BATCHES = (1, 2, 7, 32)
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
MOST_APART = 0.1  # of the images: near-ties of a matching may break differently


@dataclasses.dataclass(frozen=True)
class Proof:
    """What a comparison found.

    Attributes:
        images: compared, counted once for each batch size.
        apart: of them, those whose outputs differ by more than the tolerance.
        other_class: of them, those whose largest output is another.
        largest: largest difference among the images that are not apart, relative to the largest
            output.
    """

    images: int
    apart: int
    other_class: int
    largest: float

    @property
    def holds(self) -> bool:
        """Whether at most one image of ten is apart, as near-ties may make it."""
        return self.apart <= MOST_APART * self.images

    def __str__(self) -> str:
        near = f", near-ties differ on {self.apart} of {self.images}" if self.apart else ""
        return f"{self.images} outputs, largest difference {self.largest:.1e}{near}"


def compared(
    forward: Callable[[Tensor], Tensor],
    pixels: Tensor,
    expected: Tensor,
    tolerance: float,
    batches: tuple[int, ...] = BATCHES,
) -> Proof:
    """Compare a forward with known outputs, at several batch sizes.

    Args:
        forward: from [B, 3, H, W] to [B, K].
        pixels: [n, 3, H, W]; a batch larger than n repeats them.
        expected: [n, K].
        tolerance: relative to the largest output.
        batches: sizes.
    """
    largest = expected.double().abs().max().clamp_min(1.0)
    images = apart = other = 0
    worst = 0.0
    for size in batches:
        for first in range(0, max(len(pixels), size), size):
            index = torch.arange(first, first + size) % len(pixels)
            found, wanted = forward(pixels[index]).double(), expected[index].double()
            off = ((found - wanted).abs() / largest).amax(dim=1)
            off = torch.where(off.isfinite(), off, torch.inf)
            is_apart = off > tolerance
            images += size
            apart += int(is_apart.sum())
            other += int((found.argmax(dim=1) != wanted.argmax(dim=1)).sum())
            worst = max(worst, float(off[~is_apart].max()) if not is_apart.all() else 0.0)
    return Proof(images, apart, other, worst)


def synthetic_images(count: int, sides: tuple[int, int], seed: int = 0) -> Tensor:
    """Smooth random images, [count, 3, *sides], of about unit variance: nobody's photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    fine = torch.randn(count, 3, *sides, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, sides, mode="bicubic", align_corners=False)
    return smooth + 0.25 * fine
