"""Builds an ONNX graph node by node, and the few forms of nodes that steps are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir
from onnx_ir.passes import common

from dsm_tune.plan import MergePlan

__all__ = ["OPSET", "Builder", "Layout", "State", "Value"]

OPSET = 20  # the first with Gelu as one operator, and one that TensorRT 10 reads
SEVERAL = {"TopK": 2}  # outputs of operators that have more than one
FLOAT = onnx_ir.DataType.FLOAT

Value = Any  # a tensor of the graph
Sides = tuple[int | str, ...]  # of a tensor; a text names one of any length


class State(NamedTuple):
    """Tokens between two blocks, [B, N, C], their sizes [B, N, 1], places [B, N, 2]; or None."""

    x: Value
    size: Value
    place: Value


class Builder:
    """A graph in the making. ``builder.Add(a, b)`` adds a node and gives what it computes."""

    def __init__(self) -> None:
        self.nodes: list[onnx_ir.Node] = []
        self.inputs: list[Value] = []
        self.known: dict[Any, Value] = {}  # numbers that are in the file

    def __getattr__(self, kind: str) -> Callable[..., Value]:
        if not kind[0].isupper():
            raise AttributeError(kind)
        return functools.partial(self._add, kind)

    def _add(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        found = self._several(SEVERAL.get(kind, 1), kind, *inputs, **attributes)
        return found if kind in SEVERAL else found[0]

    def _several(self, outputs: int, kind: str, *inputs: Value, **attributes: Any) -> list[Value]:
        node = onnx_ir.node(kind, inputs, attributes, num_outputs=outputs)
        self.nodes.append(node)
        return list(node.outputs)

    def input(self, name: str, *sides: int | str) -> Value:
        """A float32 input with these sides."""
        kind = onnx_ir.TensorType(FLOAT)
        value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(sides), type=kind)
        self.inputs.append(value)
        return value

    def constant(self, value: Any, kind: Any = np.int64) -> Value:
        """Numbers that are in the file, once."""
        numbers = np.asarray(value, dtype=kind)
        key = numbers.tobytes(), numbers.shape, numbers.dtype.str
        return self._keep(key, f"constant_{len(self.known)}", onnx_ir.tensor(numbers))

    def weight(self, name: str, tensor: Any) -> Value:
        """A tensor that is in the file under a name of its own."""
        return self._keep(name, name, tensor)

    def _keep(self, key: Any, name: str, tensor: Any) -> Value:
        if key not in self.known:
            kind = onnx_ir.TensorType(tensor.dtype)
            self.known[key] = onnx_ir.Value(
                name=name, shape=tensor.shape, type=kind, const_value=tensor
            )
        return self.known[key]

    def splice(
        self, piece: onnx_ir.Graph, inputs: list[Value], weights: Mapping[str, Any], scope: str
    ) -> list[Value]:
        """Put a copy of a graph in and return its outputs.

        Args:
            piece: stays as it is.
            inputs: what its inputs are here.
            weights: tensors by the names that the piece has for them.
            scope: put before their names.
        """
        copy = piece.clone()
        outputs = list(copy.outputs)
        copy.outputs.clear()
        for name, inner in list(copy.initializers.items()):
            if name in weights:
                known = self.weight(f"{scope}.{name}", weights[name])
            else:
                known = self.constant(inner.const_value.numpy(), inner.const_value.numpy().dtype)
            onnx_ir.convenience.replace_all_uses_with(inner, known)
        for inner, given in zip(copy.inputs, inputs, strict=True):
            onnx_ir.convenience.replace_all_uses_with(inner, given)
        nodes = list(copy)
        copy.remove(nodes)
        for node in nodes:
            node.name = None
            for value in node.outputs:
                value.name = value.shape = None  # they differ from place to place
        self.nodes += nodes
        return outputs

    def model(
        self, outputs: Mapping[str, tuple[Value, Sides | None]], metadata: Mapping[str, str]
    ) -> onnx.ModelProto:
        """The finished model, without anything that its outputs do not need.

        Args:
            outputs: float32 values and their sides, if they are to be in the file, by name.
            metadata: names and texts to put into the file.
        """
        for name, (value, sides) in outputs.items():
            value.name, value.type = name, onnx_ir.TensorType(FLOAT)
            value.shape = None if sides is None else onnx_ir.Shape(sides)
        graph = onnx_ir.Graph(
            self.inputs,
            [value for value, _ in outputs.values()],
            nodes=self.nodes,
            initializers=list(self.known.values()),
            opset_imports={"": OPSET},
            name="merged",
        )
        model = onnx_ir.Model(graph, ir_version=10, producer_name="dsm_tune")
        for tidy in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()):
            tidy(model)
        model.metadata_props.update(metadata)
        proto = onnx_ir.to_proto(model)
        # A second note of an initializer's shape: tools that replace initializers leave it behind.
        stored = {one.name for one in proto.graph.initializer}
        noted = [one for one in proto.graph.value_info if one.name not in stored]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(noted)
        return proto

    def integers(self, *values: int) -> Value:
        """[n] int64 that are in the file."""
        return self.constant(values)

    def images(self) -> Value:
        """Number of each image, from 0: [B, 1] int64."""
        one, first = self.integers(1), self.constant(0)
        batch = self.Squeeze(self.Shape(self.inputs[0], start=0, end=1), self.integers(0))
        return self.Unsqueeze(self.Range(first, batch, self.constant(1)), one)

    def zeros(self) -> Value:
        """A zero for each image: [B, 1] float32."""
        return self.Mul(self.Cast(self.images(), to=FLOAT), self.constant(0.0, np.float32))

    def rows(self, x: Value, index: Value) -> Value:
        """Rows of [B, n, C] at [B, m] of all B n: [B, m, C]; whole ones, which copies fastest."""
        return self.Gather(self.Flatten(x, axis=2), index)

    def column(self, x: Value) -> Value:
        """[B, n] as [B, n, 1]."""
        return self.Unsqueeze(x, self.integers(2))

    def row(self, x: Value) -> Value:
        """[B, n] or [B, n, 1] as [B, 1, n]."""
        return self.Reshape(x, self.integers(0, 1, -1))

    def flat(self, x: Value) -> Value:
        """[B, n, 1] as [B, n]."""
        return self.Reshape(x, self.integers(0, -1))

    def cut(self, x: Value, first: int, end: int) -> Value:
        """Tokens of [B, n, ...]."""
        return self.Slice(x, self.integers(first), self.integers(end), self.integers(1))

    def split(self, x: Value, *widths: int) -> list[Value]:
        """Channels of [B, n, C] in parts of these widths."""
        if len(widths) == 1:
            return [x]
        return self._several(len(widths), "Split", x, self.integers(*widths), axis=2)

    def flipped(self, x: Value) -> Value:
        """[B, n, m] to [B, m, n]."""
        return self.Transpose(x, perm=[0, 2, 1])

    def repeated(self, x: Value, numbers: Any, kind: Any = np.float32) -> Value:
        """[n, ...] numbers once for each image of ``x``: [B, n, ...]."""
        batch = self.Shape(x, start=0, end=1)
        shape = self.Concat(batch, self.integers(*np.shape(numbers)), axis=0)
        return self.Expand(self.constant(np.asarray(numbers)[None], kind), shape)


class Layout:
    """Where things are in the sequence of N tokens that enters a step; plain numbers."""

    def __init__(self, plan: MergePlan, block: int) -> None:
        self.geometry, self.prefix = plan.geometry, plan.geometry.prefix
        self.count, self.r = plan.tokens[block], plan.removed[block]
        self.even = np.arange(self.prefix + self.prefix % 2, self.count, 2)
        self.odd = np.arange(self.prefix + 1 - self.prefix % 2, self.count, 2)
        self.rest = len(self.even) - self.r
        self.window = next(s.window for s in plan.active_steps if s.block == block)

    def ranks(self) -> Any:
        """[N] where each token goes if none leaves: prefix, even, odd."""
        order = np.concatenate([np.arange(self.prefix), self.even, self.odd])
        return np.argsort(order)

    def places(self) -> Any:
        """[N, 2] row and column in the original grid, while no token has left; prefix: 0, 0."""
        columns, at = self.geometry.grid[1], np.arange(self.geometry.patches)
        grid = np.stack([at // columns, at % columns], axis=1)
        return np.concatenate([np.zeros((self.prefix, 2)), grid])
