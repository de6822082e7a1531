"""Numbers side by side in the widest registers, as LLVM is told to keep them there.

It finds wide registers for a loop by itself, but not that sums of many rows at once may stay in
them, and to write and read them again is what takes most of the time of a small product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types

from dsm_tune.merging.loops.machine import cpu_features, machine_code

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


def _registers() -> tuple[int, int]:
    """How many float32 numbers a register of this processor has, and rows of sums to keep in them.

    A row of sums takes two registers.
    """
    has = cpu_features()
    if has.get("avx512f"):
        return 16, 8  # 32 registers
    return (8, 6) if has.get("avx2") and has.get("fma") else (4, 6)  # at least 16


REGISTER, ROWS = _registers()
PAYS = REGISTER > 4  # with AVX-512, and with AVX2, what they do was measured to be quicker
LANES = 2 * REGISTER
DOWN, ACROSS = 4, REGISTER // 4  # rows of sums and sums in each, one register in all
WHOLE, NUMBER = ir.IntType(64), ir.FloatType()
SIDE_BY_SIDE = ir.VectorType(NUMBER, REGISTER)
BITS = ir.VectorType(ir.IntType(32), REGISTER)
FUSED = ("contract",)  # a product may be added without being rounded

# e^x is 2^n · e^(x - n·log 2). To add n to this number, of 24 bits, leaves n + 127 in its last
# ones, where a float32 has its exponent: so n is rounded to a whole number and made one at once.
TO_EXPONENT, EXPONENT_AT = 1.5 * 2.0**23 + 127, 23
LOG_2, LEAST_POWER = 0.6931471805599453, -87.0  # e^-87 is almost the least normal number
TAYLOR = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)  # on ±log 2 / 2, to 1.6e-7

# erf(x) of x >= 0, to 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
ERF_AT, ERF = 0.3275911, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
SIGN = 0x80000000


class _Writer:
    """Writes what is to be done with LANES numbers: a pair of registers; addresses are int64."""

    def __init__(self, to: Any) -> None:
        self.to = to

    def read(self, address: Any) -> list[Any]:
        return [self.read_as(place, SIDE_BY_SIDE) for place in self._both(address)]

    def write(self, pair: Sequence[Any], address: Any) -> None:
        for one, place in zip(pair, self._both(address), strict=True):
            self.to.store(one, self.to.inttoptr(place, one.type.as_pointer()), align=4)

    def read_everywhere(self, address: Any) -> Any:
        """One number, in each lane of a register."""
        nothing = ir.Constant(SIDE_BY_SIDE, ir.Undefined)
        first = ir.IntType(32)(0)
        one = self.to.insert_element(nothing, self.read_as(address, NUMBER), first)
        return self.to.shuffle_vector(one, nothing, ir.Constant(BITS, [0] * REGISTER))

    def behind(self, address: Any, times: Any, step: Any) -> Any:
        """The address that is so many steps on."""
        return self.to.add(address, self.to.mul(times, step))

    def repeat(
        self, times: Any, before: Sequence[Any], do: Callable[[Any, Sequence[Any]], list[Any]]
    ) -> list[Any]:
        """At least once: of the number of the turn and what it was, make what it becomes."""
        to, start = self.to, self.to.block
        again, done = to.append_basic_block(), to.append_basic_block()
        to.branch(again)
        to.position_at_end(again)
        turn, known = to.phi(WHOLE), [to.phi(one.type) for one in before]
        after = do(turn, known)
        following = to.add(turn, WHOLE(1))
        begun = [WHOLE(0), *before]
        for one, first, later in zip([turn, *known], begun, [following, *after], strict=True):
            one.add_incoming(first, start)
            one.add_incoming(later, again)
        to.cbranch(to.icmp_signed("<", following, times), again, done)
        to.position_at_end(done)
        return after

    def multiply_add(self, one: Any, other: Any, more: Any) -> Any:
        return self.to.fadd(self.to.fmul(one, other, flags=FUSED), more, flags=FUSED)

    def larger(self, one: Any, other: Any) -> Any:
        """Of each lane; the first, if it is no number."""
        return self.to.select(self.to.fcmp_ordered("<", one, other), other, one)

    def exponential(self, x: Any) -> Any:
        to, x = self.to, self.larger(x, _all(LEAST_POWER))
        marked = self.multiply_add(x, _all(1 / LOG_2), _all(TO_EXPONENT))
        rest = self.multiply_add(to.fsub(marked, _all(TO_EXPONENT)), _all(-LOG_2), x)
        power = _all(TAYLOR[0])
        for factor in TAYLOR[1:]:
            power = self.multiply_add(power, rest, _all(factor))
        exponent = to.shl(to.bitcast(marked, BITS), ir.Constant(BITS, [EXPONENT_AT] * REGISTER))
        return to.fmul(power, to.bitcast(exponent, SIDE_BY_SIDE))

    def gelu(self, x: Any) -> Any:
        """x · Φ(x), of which Φ(x) is (1 + erf(x / √2)) / 2."""
        to, sign = self.to, ir.Constant(BITS, [SIGN] * REGISTER)
        bits = to.bitcast(x, BITS)
        size = to.bitcast(to.and_(bits, ir.Constant(BITS, [SIGN - 1] * REGISTER)), SIDE_BY_SIDE)
        z = to.fmul(size, _all(0.5**0.5))
        t = to.fdiv(_all(1.0), self.multiply_add(z, _all(ERF_AT), _all(1.0)))
        power = _all(ERF[0])
        for factor in ERF[1:]:
            power = self.multiply_add(power, t, _all(factor))
        rest = to.fmul(to.fmul(power, t), self.exponential(to.fneg(to.fmul(z, z))))
        erf = to.bitcast(to.fsub(_all(1.0), rest), BITS)
        erf = to.bitcast(to.or_(erf, to.and_(bits, sign)), SIDE_BY_SIDE)
        half = to.fmul(x, _all(0.5))
        return self.multiply_add(half, erf, half)

    def sum_each(self, several: Sequence[Any]) -> Any:
        """The sums of REGISTER registers, side by side in one."""
        step = 1  # numbers that are told from each other: first within four, then four by four
        while len(several) > 1:
            first, second = _apart(step)
            pairs = zip(several[::2], several[1::2], strict=True)
            several = [
                self.to.fadd(self.choose(*pair, first), self.choose(*pair, second))
                for pair in pairs
            ]
            step *= 2
        return several[0]

    def choose(self, one: Any, other: Any, places: Sequence[int]) -> Any:
        """Of the numbers of two registers, those at the places."""
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places))
        return self.to.shuffle_vector(one, other, mask)

    def read_as(self, address: Any, kind: Any) -> Any:
        return self.to.load(self.to.inttoptr(address, kind.as_pointer()), align=4)

    def _both(self, address: Any) -> tuple[Any, Any]:
        return address, self.to.add(address, WHOLE(4 * REGISTER))


def _apart(step: int) -> tuple[list[int], list[int]]:
    """Of two registers, places of numbers, and of those that are to be added to them.

    Processors move numbers within groups of four, or whole groups, faster than others.
    """
    if step == 1:
        first = [
            place
            for at in range(0, REGISTER, 4)
            for i in range(2)
            for place in (at + i, at + i + REGISTER)
        ]
        return first, [place + 2 for place in first]
    if step == 2:
        first = [
            place + i
            for at in range(0, REGISTER, 4)
            for place in (at, at + REGISTER)
            for i in range(2)
        ]
        return first, [place + 2 for place in first]
    first = [at + i for at in range(0, 2 * REGISTER, 8) for i in range(4)]
    return first, [place + 4 for place in first]


def _all(number: float) -> Any:
    return ir.Constant(SIDE_BY_SIDE, [number] * REGISTER)


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
        do = _Writer(builder)
        rows, row_stride, number_stride, columns, column_stride, depth, into, into_stride = given

        def add(turn: Any, sums: Sequence[Any]) -> list[Any]:
            pair = do.read(do.behind(columns, turn, column_stride))
            first, added = do.behind(rows, turn, number_stride), []
            for i in range(ROWS):
                number = do.read_everywhere(do.behind(first, WHOLE(i), row_stride))
                own = sums[2 * i : 2 * i + 2]
                added += [do.multiply_add(number, x, y) for x, y in zip(pair, own, strict=True)]
            return added

        sums = do.repeat(depth, [_all(0.0)] * (2 * ROWS), add)
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
        do, (logits, bias, depth, into) = _Writer(builder), given
        bytes_ = WHOLE(4 * LANES)

        def add_bias(turn: Any, largest: Sequence[Any]) -> list[Any]:
            place = do.behind(logits, turn, bytes_)
            one = do.read_everywhere(do.behind(bias, turn, WHOLE(4)))
            pair = [builder.fadd(x, one) for x in do.read(place)]
            do.write(pair, place)
            return [do.larger(x, y) for x, y in zip(largest, pair, strict=True)]

        largest = do.repeat(depth, [_all(float("-inf"))] * 2, add_bias)

        def raise_and_sum(turn: Any, sums: Sequence[Any]) -> list[Any]:
            place = do.behind(logits, turn, bytes_)
            pair = zip(do.read(place), largest, strict=True)
            powers = [do.exponential(builder.fsub(x, y)) for x, y in pair]
            do.write(powers, place)
            return [builder.fadd(x, y) for x, y in zip(sums, powers, strict=True)]

        do.write(do.repeat(depth, [_all(0.0)] * 2, raise_and_sum), into)
        return context.get_dummy_value()

    return _taking(4), code


def _adding(rows: int) -> Any:
    """What adds to [rows, ACROSS] the products of as many rows with ACROSS others."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        do, across = _Writer(builder), ir.VectorType(NUMBER, ACROSS)
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
        sums = do.repeat(turns, [_all(0.0)] * (rows * ACROSS), add)
        every = do.sum_each(sums + [_all(0.0)] * ((DOWN - rows) * ACROSS))
        for i in range(rows):
            place = do.behind(into, WHOLE(i), into_stride)
            own = do.choose(every, every, range(i * ACROSS, (i + 1) * ACROSS))
            into_row = builder.inttoptr(place, across.as_pointer())
            builder.store(builder.fadd(do.read_as(place, across), own), into_row, align=4)
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
        do, (numbers, several) = _Writer(builder), given

        def apply(turn: Any, nothing: Sequence[Any]) -> list[Any]:
            place = do.behind(numbers, turn, WHOLE(4 * REGISTER))
            made = do.gelu(do.read_as(place, SIDE_BY_SIDE))
            builder.store(made, builder.inttoptr(place, made.type.as_pointer()), align=4)
            return []

        do.repeat(builder.udiv(several, WHOLE(REGISTER)), [], apply)
        return context.get_dummy_value()

    return _taking(2), code
