"""Blocks under a plan, the quickest way there is: all their loops in one series on a CPU, eager.

Between the loops of a single image Python takes a fifth of a forward: it looks at the modules of a
block, asks for memory, calls. So a series is planned once for each batch size that comes twice, and
is run for as long as its blocks stay what they were. It does what :mod:`.compiled_halves` and
:mod:`.compiled_step` do block by block, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsm_tune.merging import loops
from dsm_tune.merging.compiled_halves import loop_for
from dsm_tune.merging.joining import Tokens
from dsm_tune.merging.loops import team
from dsm_tune.merging.on_cpu import all_are_watched
from dsm_tune.merging.records import Left, Loops, Part, Room, part_of, parts_of, records_of
from dsm_tune.merging.unchanged import Unchanged

__all__ = ["run"]

MOST = 32  # series that are kept for the blocks of a model


def run(
    blocks: Any, tokens: Tokens, first: int, *, step_loop: Any = None
) -> tuple[Tokens, int] | None:
    """Run as many blocks in a row as loops can do.

    Args:
        blocks: ``MergedBlocks``.
        tokens: that enter block ``first``; none has left yet.
        first: index of a block.
        step_loop: what takes steps instead of ``loops.step.step``, given the same.

    Returns:
        What the blocks leave, and the index of the one to go on with; ``None`` if that is
        ``first``.
    """
    x, known = tokens.x, tokens[1:]
    if any(one is not None for one in known) or not x.numel() or all_are_watched():
        return None
    geometry = blocks.plan.geometry
    if x.ndim != 3 or tuple(x.shape[1:]) != (geometry.tokens, geometry.width):
        return None
    halves = loop_for(x)
    step_loop = step_loop or getattr(loops.module_of("step"), "step", None)
    if halves is None or step_loop is None:
        return None
    head = team.head_of(x.shape[0] * x.shape[1])
    kept, key = blocks.series, (first, x.shape[0], head, step_loop)
    series = kept.get(key)
    if series is not None and not series.is_still_all(blocks, halves):
        kept.clear()  # they would keep alive what has left
        series = None
    if series is None and key not in kept:
        if len(kept) >= MOST:
            kept.clear()
        kept[key] = None  # to plan takes longer than it saves once
        return None
    if series is None:
        parts = parts_of(blocks, first, x.shape[1], halves)
        if not parts:
            return None
        of_blocks = Loops(halves.attention_half, halves.prefix_half, step_loop, halves.mlp_half)
        series = kept[key] = _Series(blocks, parts, first, x, head, of_blocks)
    return series.run(x.contiguous()), series.end


class _Series:
    """The loops of some blocks for [B, N, C], and what they are given but for two addresses."""

    def __init__(
        self, blocks: Any, parts: list[Part], first: int, x: Tensor, head: tuple[int, ...],
        of_blocks: Loops,
    ) -> None:  # fmt: skip
        batch, count, width = x.shape
        self.batch, self.width, self.end = batch, width, first + len(parts)
        self.unchanged = Unchanged(blocks, [blocks[i] for i in range(first, self.end)])
        self.plan, self.steps = blocks.plan, blocks.steps
        self.room, self.place = Room(batch, count, width), blocks.places(x).contiguous()

        def given(memory: int, x: int) -> tuple[list[int], list[tuple[int, int]], Left]:
            """All records one behind the other; each loop and where its record is; the end."""
            left = Left(count, x, place=self.place.data_ptr())
            records, left = records_of(parts, blocks.plan, batch, left, memory, of_blocks)
            numbers: list[int] = []
            calls = []
            for loop, its_own in records:
                calls.append((loop.address, 8 * len(numbers)))
                numbers += (*head, *its_own)
            return numbers, calls, left

        numbers, calls, self.left = given(0, 0)
        self.numbers, self.calls = (torch.tensor(one, device="cpu") for one in (numbers, calls))
        # What changes as memory moves is an address in it; so for x.
        self.in_memory, self.in_x = (
            torch.tensor(given(*at)[0], device="cpu") - self.numbers for at in ((1, 0), (0, 1))
        )

    def is_still_all(self, blocks: Any, halves: Any) -> bool:
        """Whether its blocks are what they were, and loops cannot do the next one either."""
        is_same_plan = blocks.plan is self.plan and blocks.steps is self.steps
        if not is_same_plan or not self.unchanged():
            return False
        if self.end == len(blocks):
            return True
        return part_of(blocks, self.end, self.left.several, halves) is None

    def run(self, x: Tensor) -> Tokens:
        """What the blocks leave of [B, N, C], contiguous."""
        memory = x.new_empty(self.room.bytes // 4)
        numbers = self.numbers.add(self.in_memory, alpha=memory.data_ptr())
        numbers = numbers.add_(self.in_x, alpha=x.data_ptr())
        given = len(self.calls), self.calls.data_ptr(), numbers.data_ptr()
        team.run(loops.module_of("series").series, *given, shares=x.shape[0] * x.shape[1])
        return self._found(memory)

    def _found(self, memory: Tensor) -> Tokens:
        batch, width, (count, x, size, log_size, place) = self.batch, self.width, self.left
        many, several = (batch, count, width), (count * width, width, 1)
        # A copy, or those few would keep alive the memory of all.
        tokens = Tokens(memory.as_strided(many, several, x // 4).clone())
        if not size:
            return tokens
        sizes, log_sizes = (
            memory.as_strided(many[:2], (count, 1), start // 4) for start in (size, log_size)
        )
        tokens = tokens._replace(size=sizes, log_size=log_sizes)
        if place:
            places = memory.as_strided((batch, count, 2), (2 * count, 2, 1), place // 4)
            tokens = tokens._replace(place=places)
        return tokens
