"""Numbers side by side in the widest registers, as LLVM is told to keep them there.

It finds wide registers for a loop by itself, but not that sums of many rows at once may stay in
them, and to write and read them again is what takes most of the time of a small product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types

from dsm_tune.merging.loops.machine import machine_code
from dsm_tune.merging.loops.registers import (
    ACROSS,
    DOWN,
    LANES,
    NUMBER,
    PAYS,
    REGISTER,
    ROWS,
    SIDE_BY_SIDE,
    WHOLE,
    Writer,
    everywhere,
)

__all__ = [
    "ACROSS",
    "DOWN",
    "LANES",
    "PAYS",
    "REGISTER",
    "ROWS",
    "add_products",
    "exponentials",
    "gelu",
    "products",
]


def _taking(several: int) -> Any:
    return types.void(*[types.int64] * several)


@machine_code
def products(
    typing: Any, rows: Any, row_stride: Any, number_stride: Any, columns: Any, column_stride: Any,
    depth: Any, into: Any, into_stride: Any,
) -> Any:  # fmt: skip
    """Fill in products of rows, [ROWS, depth], with [depth, LANES]: [ROWS, LANES].

    Args:
        typing: numba's.
        rows: address of the first number of the first row.
        row_stride: bytes from one row to the next.
        number_stride: bytes from one number of a row to the next.
        columns: address of what they are multiplied with, LANES of them side by side.
        column_stride: bytes from those to the next.
        depth: at least 1.
        into: address of what is filled in, side by side as well.
        into_stride: bytes from one row of it to the next.
    """

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        do = Writer(builder)
        rows, row_stride, number_stride, columns, column_stride, depth, into, into_stride = given

        def add(turn: Any, sums: Sequence[Any]) -> list[Any]:
            pair = do.read(do.behind(columns, turn, column_stride))
            first, added = do.behind(rows, turn, number_stride), []
            for i in range(ROWS):
                number = do.read_everywhere(do.behind(first, WHOLE(i), row_stride))
                own = sums[2 * i : 2 * i + 2]
                added += [do.multiply_add(number, x, y) for x, y in zip(pair, own, strict=True)]
            return added

        sums = do.repeat(depth, [everywhere(0.0)] * (2 * ROWS), add)
        for i in range(ROWS):
            do.write(sums[2 * i : 2 * i + 2], do.behind(into, WHOLE(i), into_stride))
        return context.get_dummy_value()

    return _taking(8), code


@machine_code
def exponentials(typing: Any, logits: Any, bias: Any, depth: Any, into: Any) -> Any:
    """Turn columns of logits into what is proportional to their softmax, and tell their sums.

    No power is less than e^-87, so that an infinite logit below all others still counts.

    Args:
        typing: numba's.
        logits: address of [depth, LANES], side by side.
        bias: address of [depth], which is added to each column.
        depth: at least 1.
        into: address of the sums, [LANES].
    """

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        do, (logits, bias, depth, into) = Writer(builder), given
        bytes_ = WHOLE(4 * LANES)

        def add_bias(turn: Any, largest: Sequence[Any]) -> list[Any]:
            place = do.behind(logits, turn, bytes_)
            one = do.read_everywhere(do.behind(bias, turn, WHOLE(4)))
            pair = [builder.fadd(x, one) for x in do.read(place)]
            do.write(pair, place)
            return [do.larger(x, y) for x, y in zip(largest, pair, strict=True)]

        largest = do.repeat(depth, [everywhere(float("-inf"))] * 2, add_bias)

        def raise_and_sum(turn: Any, sums: Sequence[Any]) -> list[Any]:
            place = do.behind(logits, turn, bytes_)
            pair = zip(do.read(place), largest, strict=True)
            powers = [do.exponential(builder.fsub(x, y)) for x, y in pair]
            do.write(powers, place)
            return [builder.fadd(x, y) for x, y in zip(sums, powers, strict=True)]

        do.write(do.repeat(depth, [everywhere(0.0)] * 2, raise_and_sum), into)
        return context.get_dummy_value()

    return _taking(4), code


def _adding(rows: int) -> Any:
    """What adds to [rows, ACROSS] the products of as many rows with ACROSS others."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        do, across = Writer(builder), ir.VectorType(NUMBER, ACROSS)
        ones, one_stride, others, other_stride, depth, into, into_stride = given

        def add(turn: Any, sums: Sequence[Any]) -> list[Any]:
            at = builder.mul(turn, WHOLE(4 * REGISTER))

            def read(first: Any, stride: Any, several: int) -> list[Any]:
                first = builder.add(first, at)
                places = (do.behind(first, WHOLE(i), stride) for i in range(several))
                return [do.read_as(place, SIDE_BY_SIDE) for place in places]

            columns = read(others, other_stride, ACROSS)
            pairs = ((x, y) for x in read(ones, one_stride, rows) for y in columns)
            return [do.multiply_add(*pair, own) for pair, own in zip(pairs, sums, strict=True)]

        turns = builder.udiv(depth, WHOLE(REGISTER))
        sums = do.repeat(turns, [everywhere(0.0)] * (rows * ACROSS), add)
        every = do.sum_each(sums + [everywhere(0.0)] * ((DOWN - rows) * ACROSS))
        for i in range(rows):
            place = do.behind(into, WHOLE(i), into_stride)
            own = do.choose(every, every, range(i * ACROSS, (i + 1) * ACROSS))
            do.write_one(builder.fadd(do.read_as(place, across), own), place)
        return context.get_dummy_value()

    return code


@machine_code
def add_products(
    typing: Any, several: Any, ones: Any, one_stride: Any, others: Any, other_stride: Any,
    depth: Any, into: Any, into_stride: Any,
) -> Any:  # fmt: skip
    """Add products of rows [several, depth] with rows [ACROSS, depth] to [several, ACROSS].

    Args:
        typing: numba's.
        several: 1 to DOWN.
        ones: address of the first number of the first row.
        one_stride: bytes from one row to the next; its numbers stand side by side.
        others: likewise, of those they are multiplied with.
        other_stride: likewise.
        depth: a multiple of REGISTER, more than 0.
        into: address of what is added to.
        into_stride: bytes from one row of it to the next.
    """

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        several, *others = given
        done = builder.append_basic_block()
        cases = {rows: builder.append_basic_block() for rows in range(1, DOWN + 1)}
        chosen = builder.switch(several, done)
        for rows, block in cases.items():
            chosen.add_case(WHOLE(rows), block)
            builder.position_at_end(block)
            _adding(rows)(context, builder, signature, others)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return _taking(8), code


@machine_code
def gelu(typing: Any, numbers: Any, several: Any) -> Any:
    """Apply GELU, by erf, to so many numbers from an address on; a multiple of REGISTER."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        do, (numbers, several) = Writer(builder), given

        def apply(turn: Any, nothing: Sequence[Any]) -> list[Any]:
            place = do.behind(numbers, turn, WHOLE(4 * REGISTER))
            do.write_one(do.gelu(do.read_as(place, SIDE_BY_SIDE)), place)
            return []

        do.repeat(builder.udiv(several, WHOLE(REGISTER)), [], apply)
        return context.get_dummy_value()

    return _taking(2), code
