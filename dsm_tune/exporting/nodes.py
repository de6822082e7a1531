"""The few forms of ONNX nodes that the steps of a plan are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import numpy_helper
from onnxscript import opset20 as op

from dsm_tune.plan import MergePlan

__all__ = [
    "OPSET",
    "Layout",
    "Value",
    "ascending",
    "constant",
    "cut",
    "flipped",
    "integers",
    "op",
    "repeated",
    "rows",
]

OPSET = 20  # the first with Gelu as one operator, and one that TensorRT 10 reads

Value = Any  # a tensor of the graph


def constant(value: Any, kind: Any = np.int64) -> Value:
    """Numbers that are in the file."""
    return op.Constant(value=numpy_helper.from_array(np.asarray(value, dtype=kind)))


def integers(*values: int) -> Value:
    """[n] int64 that are in the file."""
    return constant(values)


def rows(x: Value, index: Value) -> Value:
    """Rows of [B, n, C] at [B, m, 1]: [B, m, C]."""
    return op.GatherND(x, index, batch_dims=1)


def cut(x: Value, first: int, end: int) -> Value:
    """Tokens of [B, n, ...]."""
    return op.Slice(x, integers(first), integers(end), integers(1))


def ascending(index: Value, count: int) -> Value:
    """The ``count`` smallest of [B, n] or [B, n, 1], in order."""
    return op.TopK(index, integers(count), axis=1, largest=0)[0]


def flipped(x: Value) -> Value:
    """[B, n, m] to [B, m, n]."""
    return op.Transpose(x, perm=[0, 2, 1])


def repeated(x: Value, numbers: Any, kind: Any = np.float32) -> Value:
    """[n, ...] numbers once for each image of ``x``: [B, n, ...]."""
    batch = op.Shape(x, start=0, end=1)
    shape = op.Concat(batch, integers(*np.shape(numbers)), axis=0)
    return op.Expand(constant(np.asarray(numbers)[None], kind), shape)


class Layout:
    """Where things are in the sequence of N tokens that enters a step; plain numbers."""

    def __init__(self, plan: MergePlan, block: int) -> None:
        self.geometry, self.prefix = plan.geometry, plan.geometry.prefix
        self.count, self.r = plan.tokens[block], plan.removed[block]
        self.even = np.arange(self.prefix + self.prefix % 2, self.count, 2)
        self.odd = np.arange(self.prefix + 1 - self.prefix % 2, self.count, 2)
        self.rest = len(self.even) - self.r
        self.window = next(s.window for s in plan.active_steps if s.block == block)

    def places(self) -> Any:
        """[N, 2] row and column in the original grid, while no token has left; prefix: 0, 0."""
        columns, at = self.geometry.grid[1], np.arange(self.geometry.patches)
        grid = np.stack([at // columns, at % columns], axis=1)
        return np.concatenate([np.zeros((self.prefix, 2)), grid])
