"""What a block does on a CPU as compiled loops, and the threads that run them.

numba compiles a loop when it is first asked for, some seconds each, and keeps the machine code.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

__all__ = ["module_of"]


@functools.cache
def module_of(name: str) -> Any:
    """A module of this package, such as ``step``; ``None`` where numba cannot be imported."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:  # without a name, numba's: of a NumPy that it does not know
        if error.name and not error.name.startswith(("numba", "llvmlite")):
            raise
        return None
