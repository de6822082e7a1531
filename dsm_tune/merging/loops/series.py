"""Loops one after another, by the same threads: between two of them nothing else is called."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]

from dsm_tune.merging.loops.machine import integers, loop, machine_code, wait_for_all

__all__ = ["GIVEN", "series"]

# What the loop is given, in order, all in int64: how many loops; the address of two numbers for
# each, its own address and how far behind the first record its record is; the first record's.
GIVEN = ("several", "calls", "records")


@machine_code
def _run(typing: Any, address: Any, record: Any) -> Any:
    """Call the loop at an address with the record at another."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(given[0], kind.as_pointer()), [given[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@loop(GIVEN, ())
def series(given: Any) -> None:
    """Run several loops; each begins when all threads have done the one before.

    Args:
        given: all of :data:`GIVEN`.
    """
    one = carray(given, 1)[0]
    calls = carray(integers(one.calls), (one.several, 2))
    for i in range(one.several):
        _run(calls[i, 0], one.records + calls[i, 1])
        wait_for_all(one)
