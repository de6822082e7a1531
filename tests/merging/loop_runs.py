"""What tests of compiled loops have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsm_tune.merging.loops import team

__all__ = ["counted", "drawn", "on_threads"]


def drawn(seed: int, *shape: int, levels: int = 0) -> Tensor:
    """Numbers of a normal distribution, or as many different ones as ``levels``, for ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often a loop is run."""
    asked, usual = [0], team.run

    def counting(loop: Any, *numbers: int, shares: int) -> None:
        asked[0] += 1
        usual(loop, *numbers, shares=shares)

    team.run = counting
    try:
        yield asked
    finally:
        team.run = usual


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Run on so many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
