"""Run a compiled loop on the threads that torch's own operators run on.

Between two operators they wait for the next one in a spin: threads of any other pool would have to
fight them for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from typing import Any

import torch
from torch import Tensor

__all__ = ["address_of", "bits", "head_of", "in_rows", "run", "start"]


def _openmp() -> tuple[Any, tuple[int, ...]]:
    """The OpenMP runtime that torch is linked with, if it has one.

    Returns:
        What starts a team, or ``None``; the addresses of what tells a thread of it how many they
        are and which it is, and of what waits until all have come to the same place.
    """
    try:
        library = ctypes.CDLL(torch._C.__file__)
        parallel = library.GOMP_parallel
        found = library.omp_get_num_threads, library.omp_get_thread_num, library.GOMP_barrier
    except (AttributeError, OSError):
        return None, ALONE
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel, tuple(ctypes.cast(one, ctypes.c_void_p).value or 0 for one in found)


ALONE = (0, 0, 0)
START, TOGETHER = _openmp()
CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(loop: Any, *numbers: int, shares: int) -> None:
    """Let each thread call a loop for its part of the work.

    Args:
        loop: of :mod:`~dsm_tune.merging.loops`; called by each thread with the same address, of
            int64: addresses of what tells it how many threads there are and its own number, from
            0, and of what waits for all of them, 0 each if there is one thread; and the numbers.
        *numbers: sizes, and addresses of memory that lives until the loop returns.
        shares: that the work consists of; one alone is done by the thread that calls.
    """
    head = head_of(shares)
    given = array("q", (*head, *numbers))
    start(loop.address, given.buffer_info()[0], head)


def start(loop: int, record: int, head: tuple[int, ...]) -> None:
    """Call what is at an address with a record that begins with a head; return when it is done."""
    if any(head):
        START(loop, record, torch.get_num_threads(), 0)
    else:
        CALL(loop)(record)


def head_of(shares: int) -> tuple[int, ...]:
    """What the record of a loop begins with: :data:`TOGETHER` or, for one thread, :data:`ALONE`."""
    threads = torch.get_num_threads() if START is not None else 1
    return TOGETHER if shares > 1 and threads > 1 else ALONE


@functools.lru_cache(maxsize=256)
def bits(*factors: float) -> tuple[int, ...]:
    """Of float64 numbers, as int64: as a loop is given them."""
    return struct.unpack(f"{len(factors)}q", struct.pack(f"{len(factors)}d", *factors))


def in_rows(x: Tensor) -> Tensor:
    """[B, H, N, d] with the numbers of d side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def address_of(x: Tensor | None) -> int:
    """Of its first number; 0 for none."""
    return 0 if x is None else x.data_ptr()
