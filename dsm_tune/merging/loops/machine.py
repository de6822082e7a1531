"""How a loop becomes machine code, and how it reaches the memory of tensors.

Threads call a loop with one record of numbers, of 8 bytes each; see :mod:`~.team`. In loops, rows
are taken as slices, and an array of no elements stands for ``None``.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

__all__ = [
    "NUMBERS",
    "WIDE",
    "address_of",
    "cpu_features",
    "exact",
    "floats",
    "integers",
    "length",
    "loop",
    "machine_code",
    "of_image",
    "part",
    "product",
    "rows_of",
    "share_of",
    "wait_for_all",
]

WIDE = {"contract", "reassoc", "nsz"}  # what lets sums use wide registers
part = njit(nogil=True, fastmath=WIDE)  # of a loop; compiled with it
# Likewise, but sums stay as they are written; unsaid, it would have its caller's fast-math.
exact = njit(nogil=True, fastmath=False)
machine_code: Callable[[Callable[..., Any]], Any] = intrinsic  # likewise; says how to make it
NUMBERS: Any = types.CPointer  # of a kind

# numba sees by the file of a loop, and by the processor that it is told of, whether kept code is
# stale: the name tells the other files, those whose numbers a loop has, and the real processor.
HERE = Path(__file__).parent
FILES = (*sorted(HERE.glob("*.py")), HERE.parent / "matching.py", HERE.parent / "scores.py")


def cpu_features() -> Mapping[str, bool]:
    """What the processor has, by LLVM's names; none, where it is not known."""
    try:
        return dict(binding.get_host_cpu_features())
    except RuntimeError:
        return {}


STAMP = zlib.crc32(
    b"".join(file.read_bytes() for file in FILES) + repr(sorted(cpu_features().items())).encode()
)


def loop(given: Sequence[str], factors: Sequence[str]) -> Callable[[Callable[[Any], None]], Any]:
    """Compile what threads call; keep the code, if there is a place to.

    Args:
        given: what the loop finds in its record, in order, behind ``team_size`` and
            ``thread_number``, addresses of what tells them, and ``barrier``, of what waits for all
            threads: 0 each for one thread.
        factors: those of them that are float64; the others are int64.
    """
    names = ("team_size", "thread_number", "barrier", *given)
    record = types.Record.make_c_struct(
        [(name, types.float64 if name in factors else types.int64) for name in names]
    )
    signature = types.void(NUMBERS(record))

    def make(function: Callable[[Any], None]) -> Any:
        function.__qualname__ = f"{function.__name__}_{STAMP:08x}"
        compile_ = functools.partial(cfunc, signature, fastmath=WIDE)
        try:
            return compile_(cache=True)(function)
        except (OSError, RuntimeError):  # a full disk; numba's, where no folder can be written
            return compile_()(function)

    return make


@machine_code
def _call(typing: Any, address: Any) -> Any:
    """The int that the function at an address returns; it is given nothing."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(given[0], kind.as_pointer()), [])

    return types.int32(types.int64), code


@part
def share_of(given: Any, several: Any) -> Any:
    """The first one of several that are next to each other, and the one behind the last.

    Like torch's own operators, a thread takes what it wrote before, and finds it in its caches.
    """
    first, last = 0, several
    if given.team_size:
        share = -(several // -np.int64(_call(given.team_size)))
        first = np.int64(_call(given.thread_number)) * share
        last = min(first + share, several)
    return first, last


@part
def wait_for_all(given: Any) -> None:
    """Go on when every thread has come here."""
    if given.barrier:
        _call(given.barrier)


def _at(kind: Any) -> Any:
    """Of an address, a pointer to numbers of a kind."""

    @machine_code
    def pointer(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

        return NUMBERS(kind)(types.int64), code

    return pointer


floats, integers = _at(types.float32), _at(types.int64)


@part
def of_image(image: Any, address: Any, shape: Any) -> Any:
    """The float32 numbers of an image, of as many for each at an address; none at 0."""
    several = 4 * image
    for size in shape:
        several *= size
    return carray(floats(address + several), shape if address else (0, *shape[1:]))


@part
def rows_of(address: Any, several: Any, to_next: Any, width: Any) -> Any:
    """The memory of several rows, each so many numbers behind the one before, at an address."""
    return carray(floats(address), ((several - 1) * to_next + width,))


@part
def product(one: Any, other: Any) -> Any:
    """Of two rows [c]."""
    total = np.float32(0.0)
    for c in range(one.shape[0]):
        total += one[c] * other[c]
    return total


@part
def length(row: Any) -> Any:
    """Of a row [c]."""
    return np.sqrt(product(row, row))


@part
def address_of(array: Any) -> Any:
    """Of the first number."""
    return array.ctypes.data
