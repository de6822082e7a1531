"""The widest registers of this processor, and what is written of them for LLVM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from dsm_tune.merging.loops.machine import cpu_features

__all__ = [
    "ACROSS",
    "DOWN",
    "LANES",
    "NUMBER",
    "PAYS",
    "REGISTER",
    "ROWS",
    "SIDE_BY_SIDE",
    "WHOLE",
    "Writer",
    "everywhere",
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


class Writer:
    """Writes what is to be done with LANES numbers: a pair of registers; addresses are int64."""

    def __init__(self, to: Any) -> None:
        self.to = to

    def read(self, address: Any) -> list[Any]:
        """The pair from an address on."""
        return [self.read_as(place, SIDE_BY_SIDE) for place in self._both(address)]

    def write(self, pair: Sequence[Any], address: Any) -> None:
        """Likewise."""
        for one, place in zip(pair, self._both(address), strict=True):
            self.write_one(one, place)

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
        """Rounded once, where the processor can."""
        return self.to.fadd(self.to.fmul(one, other, flags=FUSED), more, flags=FUSED)

    def larger(self, one: Any, other: Any) -> Any:
        """Of each lane; the first, if it is no number."""
        return self.to.select(self.to.fcmp_ordered("<", one, other), other, one)

    def exponential(self, x: Any) -> Any:
        """e^x, of no x less than ``LEAST_POWER``."""
        to, x = self.to, self.larger(x, everywhere(LEAST_POWER))
        marked = self.multiply_add(x, everywhere(1 / LOG_2), everywhere(TO_EXPONENT))
        rest = self.multiply_add(to.fsub(marked, everywhere(TO_EXPONENT)), everywhere(-LOG_2), x)
        power = everywhere(TAYLOR[0])
        for factor in TAYLOR[1:]:
            power = self.multiply_add(power, rest, everywhere(factor))
        exponent = to.shl(to.bitcast(marked, BITS), ir.Constant(BITS, [EXPONENT_AT] * REGISTER))
        return to.fmul(power, to.bitcast(exponent, SIDE_BY_SIDE))

    def gelu(self, x: Any) -> Any:
        """x · Φ(x), of which Φ(x) is (1 + erf(x / √2)) / 2."""
        to, sign = self.to, ir.Constant(BITS, [SIGN] * REGISTER)
        bits = to.bitcast(x, BITS)
        size = to.bitcast(to.and_(bits, ir.Constant(BITS, [SIGN - 1] * REGISTER)), SIDE_BY_SIDE)
        z = to.fmul(size, everywhere(0.5**0.5))
        t = to.fdiv(everywhere(1.0), self.multiply_add(z, everywhere(ERF_AT), everywhere(1.0)))
        power = everywhere(ERF[0])
        for factor in ERF[1:]:
            power = self.multiply_add(power, t, everywhere(factor))
        rest = to.fmul(to.fmul(power, t), self.exponential(to.fneg(to.fmul(z, z))))
        erf = to.bitcast(to.fsub(everywhere(1.0), rest), BITS)
        erf = to.bitcast(to.or_(erf, to.and_(bits, sign)), SIDE_BY_SIDE)
        half = to.fmul(x, everywhere(0.5))
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
        """What stands at an address, of a kind such as a register."""
        return self.to.load(self.to.inttoptr(address, kind.as_pointer()), align=4)

    def write_one(self, one: Any, address: Any) -> None:
        """Likewise, of its own kind."""
        self.to.store(one, self.to.inttoptr(address, one.type.as_pointer()), align=4)

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


def everywhere(number: float) -> Any:
    """A number, in each lane of a register."""
    return ir.Constant(SIDE_BY_SIDE, [number] * REGISTER)
