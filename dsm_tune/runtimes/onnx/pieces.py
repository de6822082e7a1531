"""The parts of a model as ONNX graphs for any number of images and tokens, each traced once.

torch's exporter takes seconds for a block. All blocks of a model that are built alike share the
graph of one of them, and all plans of a model share them all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes import common
from onnxscript import opset20 as op
from torch import Tensor, nn

from dsm_tune.merging import backbone, halves
from dsm_tune.merging.joining import Tokens
from dsm_tune.merging.merged import merged_view
from dsm_tune.plan import Geometry, MergePlan, Step
from dsm_tune.runtimes.onnx.nodes import OPSET, Builder, Value

__all__ = ["Pieces"]

BATCH, TOKENS = "batch", "tokens"


class Pieces:
    """The parts of a model, traced when they are first asked for.

    Args:
        model: float32, in eval mode, on the CPU, not merged.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.geometry: Geometry = backbone.read_geometry(model)
        self.image_size = backbone.image_size(model)
        self._traced: dict[str, onnx_ir.Graph] = {}

    def stem(self, g: Builder, pixels: Value) -> Value:
        """What enters the first block: [B, 3, H, W] to [B, N, C]."""
        example = torch.zeros(2, 3, *self.image_size)
        return self._put(g, "stem", _Stem(self.model), [pixels], [(example, (BATCH,))])[0]

    def attend(
        self, g: Builder, index: int, x: Value, log_size: Value
    ) -> tuple[Value, halves.Projections, Value]:
        """The attention half of a block, its projections, and its shares: [B, H, N, N]."""
        part = _Attention(self.model.blocks[index])
        x, q, k, v, shares = self._put(g, f"blocks.{index}", part, *self._given(x, log_size))
        return x, halves.Projections(q, k, v, part.block.attn.scale), shares

    def feed_forward(self, g: Builder, index: int, x: Value) -> Value:
        """The MLP half of a block."""
        part = _FeedForward(self.model.blocks[index])
        return self._put(g, f"blocks.{index}", part, *self._given(x, None))[0]

    def prefix_block(self, g: Builder, index: int, x: Value, log_size: Value) -> Value:
        """A last block for its prefix tokens alone: [B, p, C]."""
        part = _PrefixBlock(self.model.blocks[index], self.geometry.prefix)
        return self._put(g, f"blocks.{index}", part, *self._given(x, log_size))[0]

    def head(self, g: Builder, x: Value, size: Value) -> Value:
        """Logits; ``size`` where the head takes a mean and tokens have merged."""
        merges = (Step(0, "merge", 1),)
        plan = MergePlan("", self.geometry, merges if size is not None else ())
        return self._put(g, "head", _Head(self.model, plan), *self._given(x, size))[0]

    def _given(self, x: Value, sizes: Value) -> tuple[list[Value], list[Any]]:
        """What a part is given, and an example of it with its sides that may vary."""
        count = self.geometry.tokens
        values, examples = [x], [(torch.zeros(2, count, self.geometry.width), (BATCH, TOKENS))]
        if sizes is not None:
            values.append(sizes)
            examples.append((torch.ones(2, count, 1), (BATCH, TOKENS)))
        return values, examples

    def _put(
        self, g: Builder, scope: str, part: nn.Module, values: list[Value], examples: list[Any]
    ) -> list[Value]:
        key = f"{part!r} of {len(values)}"
        if key not in self._traced:
            self._traced[key] = _trace(part.eval(), examples)
        graph = self._traced[key]
        tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        shared = {
            name: onnx_ir.tensor(tensors[name].detach().numpy())
            for name in graph.initializers
            if name in tensors
        }
        return g.splice(graph, values, shared, scope)


class _Stem(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return backbone.stem(self.model, pixels)


class _Attention(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, log_size: Tensor | None = None) -> tuple[Tensor, ...]:
        parts = halves.project(self.block, x)
        bias = None if log_size is None else log_size.unsqueeze(1).transpose(2, 3)
        x = x + halves.attention_output(self.block, parts, bias)
        return x, parts.q, parts.k, parts.v


class _FeedForward(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return halves.feed_forward(self.block, x)


class _PrefixBlock(nn.Module):
    def __init__(self, block: Any, prefix: int) -> None:
        super().__init__()
        self.block, self.prefix = block, prefix

    def forward(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        x = halves.attend_prefix(self.block, x, log_size, self.prefix)
        return halves.feed_forward(self.block, x)


class _Head(nn.Module):
    def __init__(self, model: nn.Module, plan: MergePlan) -> None:
        super().__init__()
        self.view: Any = merged_view(model, plan)

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        left = self.view.blocks.leave(Tokens(x, None if size is None else size.squeeze(2)))
        return self.view.forward_head(self.view.norm(left))  # type: ignore[no-any-return]


def _trace(part: nn.Module, examples: Sequence[tuple[Tensor, tuple[str, ...]]]) -> onnx_ir.Graph:
    """Trace a part; for an attention half, its shares are one more output."""
    sides = {BATCH: torch.export.Dim(BATCH, min=1), TOKENS: torch.export.Dim(TOKENS, min=2)}
    shapes = tuple({at: sides[name] for at, name in enumerate(vary)} for _, vary in examples)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own ways
        program: Any = torch.onnx.export(
            part,
            tuple(example for example, _ in examples),
            dynamo=True,
            verbose=False,
            optimize=False,  # takes longer than all the rest, for a graph no faster
            opset_version=OPSET,
            dynamic_shapes=shapes,
            custom_translation_table=_translations(),
        )
    model = program.model
    common.ClearMetadataAndDocStringPass()(model)
    if isinstance(part, _Attention):
        softmax = next(node for node in model.graph if node.op_type == "Softmax")
        model.graph.outputs.append(softmax.outputs[0])
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    graph: onnx_ir.Graph = model.graph
    return graph


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What some operators become: fewer nodes than torch has for them, and no computed shapes."""
    aten: Any = torch.ops.aten
    return {
        aten.scaled_dot_product_attention.default: _attention,
        aten.gelu.default: lambda x, approximate="none": op.Gelu(x, approximate=approximate),
        aten.view.default: _view,
        aten.conv2d.default: _convolve,
        aten.rms_norm.default: _rms_norm,
    }


def _view(x: Value, shape: Sequence[Any]) -> Value:
    """A side that may vary is the input's own at the same place (0), or what is left (-1)."""
    rank = len(x.shape)
    sides = [
        side if isinstance(side, int) else 0 if at < rank else -1 for at, side in enumerate(shape)
    ]
    return op.Reshape(x, op.Constant(value_ints=sides))


def _convolve(
    x: Value,
    weight: Value,
    bias: Value = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Value:
    """torch's own makes a bias of zeros where there is none, in five nodes."""
    sides = {"strides": list(stride), "pads": [*padding, *padding], "dilations": list(dilation)}
    return op.Conv(*(one for one in (x, weight, bias) if one is not None), group=groups, **sides)


def _rms_norm(
    x: Value, normalized_shape: Sequence[int], weight: Value = None, eps: float | None = None
) -> Value:
    """``x / sqrt(mean(x²) + ε) · weight`` over the channels; torch's own casts to its own dtype."""
    mean = op.ReduceMean(op.Mul(x, x), op.Constant(value_ints=[-1]), keepdims=1)
    least = torch.finfo(torch.float32).eps if eps is None else eps
    level = op.Div(x, op.Sqrt(op.Add(mean, op.Constant(value_float=least))))
    return level if weight is None else op.Mul(level, weight)


def _attention(
    q: Value,
    k: Value,
    v: Value,
    attn_mask: Value = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """``softmax(q kᵀ · scale + mask) v``; [B, H, N, d], the mask [B, 1, 1, N].

    Where all tokens ask, the mask is one more channel of the keys, and 1 / scale of the queries: to
    add it to [B, H, N, N] logits takes as long as their softmax.
    """
    if is_causal or dropout_p or enable_gqa:  # no block that can be merged has any of them
        raise NotImplementedError("plain attention only")
    scale = scale or q.shape[-1] ** -0.5
    late = attn_mask
    if attn_mask is not None and not isinstance(q.shape[2], int):
        column = op.Transpose(attn_mask, perm=[0, 1, 3, 2])
        heads = op.Expand(column, op.Constant(value_ints=[1, q.shape[1], 1, 1]))
        k, late = op.Concat(k, heads, axis=-1), None
        same = op.Constant(value_float=1 / scale)
        q = op.Concat(q, op.Clip(heads, same, same), axis=-1)  # Pad would take twice as long
    logits = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    logits = op.Mul(logits, op.Constant(value_float=scale))
    if late is not None:
        logits = op.Add(logits, late)
    return op.MatMul(op.Softmax(logits, axis=-1), v)
