"""The parts of a model as ONNX Runtime runs them, one session each, to be timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsm_tune.measuring.parts import Named, step_plans, tokens_for
from dsm_tune.merging import halves
from dsm_tune.plan import Matching
from dsm_tune.runtimes.onnx.files import session
from dsm_tune.runtimes.onnx.graph import take_step
from dsm_tune.runtimes.onnx.nodes import Builder, Layout, State, Value
from dsm_tune.runtimes.onnx.pieces import BATCH, TOKENS, Pieces

__all__ = ["OnnxParts"]

Draw = Callable[[Builder, Value, Value], Value]  # of tokens and sizes


class OnnxParts:
    """Makes the calls that time the parts of one model; it is traced once.

    Args:
        model: float32, in eval mode, on the CPU, not merged.
        pixels: [B, 3, H, W] float32.
    """

    def __init__(self, model: nn.Module, pixels: Tensor) -> None:
        self.model: Any = model
        self.pixels = pixels
        self.pieces = Pieces(model)
        self.threads = torch.get_num_threads()
        self._opened: dict[str, Callable[..., Tensor]] = {}  # those that take any token count

    def calls(self, count: int, matchings: Sequence[Matching]) -> Named:
        """Name each part at a token count and give a call that runs it.

        Args:
            count: tokens, prefix included.
            matchings: whose features and terms are timed.
        """
        pieces, geometry = self.pieces, self.pieces.geometry
        middle, tokens = geometry.depth // 2, tokens_for(geometry, self.pixels, count)
        parts: dict[str, Draw] = {
            "attention": lambda g, x, size: pieces.attend(g, middle, x, None)[0],
            "attention_sized": lambda g, x, size: pieces.attend(
                g, middle, x, g.Log(g.column(size))
            )[0],
            "mlp": lambda g, x, size: pieces.feed_forward(g, middle, x),
            "head": lambda g, x, size: pieces.head(g, x, None),
        }
        if geometry.reads_prefix_only:
            parts["prefix_block"] = lambda g, x, size: pieces.prefix_block(
                g, middle, x, g.Log(g.column(size))
            )
        for name, draw in parts.items():
            if name not in self._opened:
                self._opened[name] = self._open(draw)
            yield name, partial(self._opened[name], *tokens)
        if "stem" not in self._opened:
            self._opened["stem"] = self._open_stem()
        yield "stem", partial(self._opened["stem"], self.pixels)
        yield from self._steps(count, matchings)

    def _open(self, draw: Draw) -> Callable[..., Tensor]:
        g, width = Builder(), self.pieces.geometry.width
        x, size = g.input("x", BATCH, TOKENS, width), g.input("size", BATCH, TOKENS)
        return self._session(g, draw(g, x, size))

    def _open_stem(self) -> Callable[..., Tensor]:
        g = Builder()
        return self._session(g, self.pieces.stem(g, g.input("pixels", *self._sides(self.pixels))))

    def _session(self, g: Builder, *results: Value) -> Callable[..., Tensor]:
        outputs = {f"result_{i}": (result, None) for i, result in enumerate(results)}
        content = g.model(outputs, {}).SerializeToString()
        return session(content, self.threads, shared=True)

    def _sides(self, values: Tensor) -> tuple[Any, ...]:
        return BATCH, *values.shape[1:]

    @torch.inference_mode()
    def _steps(self, count: int, matchings: Sequence[Matching]) -> Named:
        geometry = self.pieces.geometry
        tokens, sizes = tokens_for(geometry, self.pixels, count)
        block = self.model.blocks[geometry.depth // 2]
        parts = halves.attend(block, tokens, None)[1]
        projections = [one.contiguous() for one in (parts.q, parts.k, parts.v)]
        shares = (projections[0] @ projections[1].mT * parts.scale).softmax(dim=-1)
        inputs = tokens, sizes, *projections, shares
        for name, plan in step_plans(geometry, count, matchings):
            g = Builder()
            names = "x", "size", "q", "k", "v", "shares"
            x, size, q, k, v, seen = (
                g.input(label, *self._sides(one)) for label, one in zip(names, inputs, strict=True)
            )
            step = plan.active_steps[0]
            place = g.repeated(x, Layout(plan, 0).places()) if step.window else None
            of_block = halves.Projections(q, k, v, parts.scale)
            state = take_step(g, plan, step, State(x, g.column(size), place), of_block, seen)
            yield name, partial(self._session(g, *state[:2]), *inputs)
