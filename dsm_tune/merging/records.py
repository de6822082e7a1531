"""What the loops of several blocks are given, one after the other, in one piece of memory."""

from __future__ import annotations

from typing import Any, NamedTuple

from dsm_tune.merging.compiled_halves import AttentionHalf, MlpHalf, attention_half, mlp_half
from dsm_tune.merging.compiled_step import numbers_of
from dsm_tune.merging.on_cpu import is_watched
from dsm_tune.plan import MergePlan, Step

__all__ = ["Left", "Loops", "Part", "Record", "Room", "part_of", "parts_of", "records_of"]

LINE = 64  # bytes of memory that a cache takes at once


class Loops(NamedTuple):
    """What does the halves of a block and its step."""

    attention_half: Any
    prefix_half: Any
    step: Any
    mlp_half: Any


class Part(NamedTuple):
    """A block that loops can do; if it is the last, maybe for its prefix alone."""

    attention: AttentionHalf
    step: Step | None
    mlp: MlpHalf
    is_prefix: bool


class Left(NamedTuple):
    """The N tokens of each image, and addresses of what is known of them; 0 for what is not."""

    several: int
    x: int
    size: int = 0
    log_size: int = 0
    place: int = 0


Record = tuple[Any, tuple[int, ...]]  # a loop, and the numbers that it is given


class Room:
    """Where everything is in the memory of several blocks for [B, N, C]: bytes from its beginning.

    What a block leaves is where the block before left it; in between, nothing is where it is read.
    """

    def __init__(self, batch: int, count: int, width: int) -> None:
        self.bytes, tokens = 0, batch * count
        self.x, self.out, self.result = (self._take(tokens * width) for _ in range(3))
        self.qkv = self._take(3 * tokens * width)
        self.received, self.badness = self._take(tokens), self._take(tokens)
        self.partner = self._take(2 * tokens)  # int64
        # Of the tokens before a step and behind it, in turn.
        self.size, self.log_size, self.place = (
            (self._take(several), self._take(several)) for several in (tokens, tokens, 2 * tokens)
        )

    def _take(self, several: int) -> int:
        """Room for so many float32."""
        start = self.bytes
        self.bytes += -(4 * several // -LINE) * LINE
        return start


def part_of(blocks: Any, index: int, count: int, loop: Any) -> Part | None:
    """A block, if loops can do it.

    Args:
        blocks: ``MergedBlocks``.
        index: of the block.
        count: N, tokens that enter it.
        loop: the module of the halves' loops.
    """
    plan, block, step = blocks.plan, blocks[index], blocks.steps.get(index)
    is_prefix = plan.last_block == "prefix" and index == len(blocks) - 1
    if step is not None:
        options = plan.matching
        of_class = not options.needs_attention or options.attention == "class"
        if step.kind != "merge" or options.feature == "random" or not of_class:
            return None
    if any(map(is_watched, block.modules())):
        return None
    attention = attention_half(block, count, plan.geometry.width, loop)
    mlp = mlp_half(block, plan.geometry.width, loop)
    return None if attention is None or mlp is None else Part(attention, step, mlp, is_prefix)


def parts_of(blocks: Any, first: int, count: int, loop: Any) -> list[Part]:
    """The blocks from ``first`` on that loops can do, up to one that they cannot."""
    parts: list[Part] = []
    for index in range(first, len(blocks)):
        part = part_of(blocks, index, count, loop)
        if part is None:
            break
        parts.append(part)
        count -= part.step.r if part.step is not None else 0
    return parts


def records_of(
    parts: list[Part], plan: MergePlan, batch: int, entered: Left, memory: int, loops: Loops
) -> tuple[list[Record], Left]:
    """All loops with their numbers, and what the last block leaves.

    Args:
        parts: the blocks.
        plan: theirs.
        batch: B.
        entered: what enters the first block; its places are those to begin with.
        memory: address of as much as :class:`Room` takes.
        loops: to run.
    """
    records: list[Record] = []
    left, turn = entered, 0
    width, last_local = plan.geometry.width, plan.last_local
    room = Room(batch, entered.several, width)
    x, out, result = memory + room.x, memory + room.out, memory + room.result
    for attention, step, mlp, is_prefix in parts:
        bias = left.log_size if plan.proportional_attention else 0
        qkv, several, prefix = memory + room.qkv, left.several, plan.geometry.prefix
        if is_prefix:
            q = qkv + 8 * batch * several * width
            places = left.x, bias, q, qkv, result, out
            numbers = attention.prefix_numbers(batch, several, prefix, *places)
            records.append((loops.prefix_half, numbers))
            left = Left(prefix, out)
        else:
            numbers = attention.numbers(batch, several, left.x, bias, qkv, result, out)
            records.append((loops.attention_half, numbers))
            left = left._replace(x=out)
        if step is not None:
            place = left.place if step.block <= last_local else 0
            after = Left(
                left.several - step.r, result, memory + room.size[turn],
                memory + room.log_size[turn], memory + room.place[turn] if place else 0,
            )  # fmt: skip
            between = memory + room.received, memory + room.partner, memory + room.badness
            before = left._replace(log_size=bias, place=place)
            numbers = _step_numbers(plan, step, attention, batch, qkv, before, between, after)
            records.append((loops.step, numbers))
            is_over = step.block >= last_local
            left, turn = after._replace(place=0 if is_over else after.place), 1 - turn
        records.append((loops.mlp_half, mlp.numbers(batch * left.several, left.x, x)))
        left = left._replace(x=x)
    return records, left


def _step_numbers(
    plan: MergePlan, step: Step, attention: AttentionHalf, batch: int, qkv: int,
    before: Left, between: tuple[int, ...], after: Left,
) -> tuple[int, ...]:  # fmt: skip
    """What a step is given behind an attention half."""
    options, width, prefix = plan.matching, plan.geometry.width, plan.geometry.prefix
    heads, (received, partner, badness) = attention.heads, between
    d, to_token = width // heads, 3 * width
    of = {name: qkv + 4 * i * width for i, name in enumerate("qkv")}
    key = heads, d, before.several * to_token, d, to_token
    if options.feature == "x":
        features, feature = (before.x, 0), (1, width, before.several * width, width, width)
    else:
        several = [of[name] for name in options.feature.removesuffix("_all")]
        features = several[0], several[1] if several[1:] else 0
        is_all = options.feature.endswith("_all")
        feature = (1, width, before.several * to_token, width, to_token) if is_all else key
    query, received = (of["q"], received) if options.needs_attention else (0, 0)
    memory = (
        *(*features, query, of["k"], before.log_size, received),
        *(before.x, before.size, before.place, partner, badness),
        *(after.x, after.size, after.log_size, after.place, 0, 0),
    )
    shape = batch, before.several, width
    return numbers_of(step, options, prefix, shape, attention.scale, feature, key, memory)
