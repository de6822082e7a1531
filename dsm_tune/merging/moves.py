"""Where the tokens of a merge go, and what is summed on the way: by rows, or as a product.

Letters in shapes are those of :mod:`~dsm_tune.merging.matching`. Everything gives the same bits
twice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsm_tune.merging.matching import Choice, first_positions

__all__ = ["Moves", "moves_of"]

Numbers = Any  # one per row: [rows], of the kind that :meth:`Moves.numbers` gives


@dataclasses.dataclass(frozen=True)
class Moves:
    """Where the tokens of a merge go. Rows are tokens, the images behind one another.

    This kind sums by a one-hot product, which gives the same bits twice on any device and can be
    exported.

    Attributes:
        order: [B (N - r) + B r] of the B N rows: those that stay, in their new order, then those
            that join one.
        target: [B r] of the B (N - r) rows that stay: whom they join.
        batch, left: B and N - r.
        onto: [B, b, r] float32, 1 where a source joins an odd token.
    """

    order: Tensor
    target: Tensor
    batch: int
    left: int
    onto: Tensor

    def numbers(self, values: Tensor) -> Numbers:
        """Float32 numbers of tokens [B, n], or of rows, as what the other methods reckon with."""
        return values.flatten()

    def part(self, values: Any) -> tuple[Any, Any]:
        """Part rows, or numbers of rows, into those that stay and those that join one."""
        rows = values.index_select(0, self.order)
        stay = self.batch * self.left
        return rows[:stay], rows[stay:]

    def met_by(self, stays: Any) -> Any:
        """For each row that joins one, the row that it joins."""
        return stays.index_select(0, self.target)

    def sum_into(self, stays: Any, change: Any) -> Any:
        """Add float32 rows to those that they join, summed in float32; may use up ``stays``."""
        rows = stays.view(self.batch, self.left, -1)
        first = self.left - self.onto.shape[1]
        change = change.view(self.batch, self.onto.shape[2], rows.shape[2])
        odd = torch.baddbmm(rows[:, first:].float(), self.onto, change).to(stays.dtype)
        return torch.cat([rows[:, :first], odd], dim=1).view(stays.shape)

    def largest(self, stays: Numbers, joins: Numbers) -> Numbers:
        """For each row that stays, the largest of its number and of those that join it."""
        rows = stays.view(self.batch, self.left)
        first = self.left - self.onto.shape[1]
        most = (self.onto * joins.view(self.batch, 1, -1)).amax(dim=2)
        odd = torch.maximum(rows[:, first:], most)
        return torch.cat([rows[:, :first], odd], dim=1).view(stays.shape)

    def ratio(self, above: Numbers, below: Numbers) -> Numbers:
        """``above / below``, and 1 where nothing joins a row that stays."""
        odd = self.onto.amax(dim=2) == 0
        front = odd.new_ones(self.batch, self.left - odd.shape[1])
        alone = torch.cat([front, odd], dim=1).flatten()
        return (above / below.clamp_min(1e-6)).masked_fill(alone, 1.0)

    def column(self, numbers: Numbers) -> Tensor:
        """[rows, 1] tensor of numbers."""
        return numbers.unsqueeze(1)  # type: ignore[no-any-return]

    def by_image(self, rows: Any) -> Tensor:
        """[B (N - r), …] as [B, N - r, …]."""
        return rows.view(self.batch, self.left, *rows.shape[1:])  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class _Rows(Moves):
    """Moves in eager mode on a CPU: what comes is added row by row, always in the same order.

    Numbers of rows are arrays of NumPy here: with a few hundred of them a call of torch takes
    several times what it computes, and NumPy's take a fifth of that.

    Attributes:
        places: ``target`` as an array.
        ranks: ``order`` as an array.
    """

    places: Any
    ranks: Any

    def numbers(self, values: Tensor) -> Numbers:
        return values.detach().numpy().reshape(-1)

    def part(self, values: Any) -> tuple[Any, Any]:
        if isinstance(values, Tensor):
            return super().part(values)
        rows, stay = values[self.ranks], self.batch * self.left
        return rows[:stay], rows[stay:]

    def met_by(self, stays: Any) -> Any:
        return super().met_by(stays) if isinstance(stays, Tensor) else stays[self.places]

    def sum_into(self, stays: Any, change: Any) -> Any:
        if isinstance(stays, Tensor):
            return stays.float().index_add_(0, self.target, change).to(stays.dtype)
        comes = np.bincount(self.places, weights=change, minlength=len(stays))
        return (stays + comes).astype(np.float32)

    def largest(self, stays: Numbers, joins: Numbers) -> Numbers:
        most = stays.copy()
        np.maximum.at(most, self.places, joins)
        return most

    def ratio(self, above: Numbers, below: Numbers) -> Numbers:
        found = np.ones_like(above)
        met = self.places
        found[met] = above[met] / np.maximum(below[met], 1e-6)
        return found

    def column(self, numbers: Numbers) -> Tensor:
        return torch.from_numpy(numbers).unsqueeze(1)

    def by_image(self, rows: Any) -> Tensor:
        tensor = rows if isinstance(rows, Tensor) else torch.from_numpy(rows)
        return super().by_image(tensor)


def moves_of(choice: Choice, count: int, prefix: int) -> Moves:
    """Lay out the moves of a choice among N tokens, of which the first p are the prefix."""
    batch, r = choice.destination.shape
    left, device = count - r, choice.order.device
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if device.type == "cpu" and not is_traced and type(choice.order) is Tensor:
        return _rows(choice, count, prefix)
    even_at, odd_at = first_positions(prefix)
    at = torch.arange(count, device=device).expand(batch, count)
    odd = at[:, odd_at::2]
    several = odd.shape[1]
    stay = torch.cat([at[:, :prefix], choice.kept * 2 + even_at, odd], dim=1)
    image = torch.arange(batch, device=device).unsqueeze(1)
    source = choice.source * 2 + even_at + image * count
    order = torch.cat([(stay + image * count).flatten(), source.flatten()])
    target = choice.destination + (left - several) + image * left
    onto = choice.destination.unsqueeze(1) == at[:, :several].unsqueeze(2)
    return Moves(order, target.flatten(), batch, left, onto.float())


def _rows(choice: Choice, count: int, prefix: int) -> Moves:
    batch, r = choice.destination.shape
    left = count - r
    rows, firsts, evens = _seats(batch, count, prefix)
    leaving = (choice.source.numpy() + firsts).reshape(-1)
    stays = np.ones(batch * count, dtype=np.bool_)
    stays[leaving] = False
    ranks = np.concatenate([rows[stays], rows[leaving]])
    behind = np.arange(prefix + evens - r, batch * left, left)[:, None]
    places = (choice.destination.numpy() + behind).reshape(-1)
    order, target = torch.from_numpy(ranks), torch.from_numpy(places)
    return _Rows(order, target, batch, left, torch.empty(0), places, ranks)


@functools.lru_cache(maxsize=1024)
def _seats(batch: int, count: int, prefix: int) -> tuple[Any, Any, int]:
    """Rows [B N] in the order prefix, even, odd; where the even ones begin [B, 1]; how many."""
    even, odd = first_positions(prefix)
    parts = [np.arange(prefix), np.arange(even, count, 2), np.arange(odd, count, 2)]
    begin = np.arange(batch)[:, None] * count
    return (np.concatenate(parts) + begin).reshape(-1), begin + prefix, len(parts[1])
