"""Run a compiled loop on the threads that torch's own operators run on.

Between two operators they wait for the next one in a spin: threads of any other pool would have to
fight them for the cores.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

import torch

__all__ = ["run"]


def _parallel() -> Any:
    """What starts a team in the OpenMP runtime that torch is linked with; ``None`` without one."""
    try:
        start = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


PARALLEL, ALONE = _parallel(), ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(loop: Any, *numbers: int, shares: int) -> None:
    """Let threads call a loop until nothing is left to do.

    Args:
        loop: of :mod:`~dsm_tune.merging.loops`; called by each thread with the same address, that
            of a counter, 0 at first, with the numbers behind it, as int64.
        *numbers: sizes, and addresses of memory that lives until the loop returns.
        shares: that the work consists of; one alone is done by the thread that calls.
    """
    given = array("q", (0, *numbers))
    address = given.buffer_info()[0]
    if shares > 1 and PARALLEL is not None and torch.get_num_threads() > 1:
        PARALLEL(loop.address, address, 0, 0)
    else:
        ALONE(loop.address)(address)
