"""Puts a model under a plan together as one ONNX graph: pieces of the model, steps in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from dsm_tune.merging.backbone import Projections
from dsm_tune.merging.merged import random_feature
from dsm_tune.plan import MergePlan, Step
from dsm_tune.runtimes.onnx import steps
from dsm_tune.runtimes.onnx.nodes import Builder, Layout, Value
from dsm_tune.runtimes.onnx.pieces import BATCH, Pieces

__all__ = ["INPUT", "OUTPUT", "graph_of", "take_step"]

INPUT, OUTPUT = "pixels", "logits"
State = tuple[Value, Value, Value]  # tokens [B, N, C], sizes [B, N] and places [B, N, 2] or None


def graph_of(
    pieces: Pieces, plan: MergePlan, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """A model under a plan: ``pixels`` [B, 3, H, W] to ``logits`` [B, classes], float32, any B.

    Args:
        pieces: of the model.
        plan: made for its geometry.
        metadata: names and texts to put into the file.
    """
    g, geometry = Builder(), plan.geometry
    rows, columns = (side * geometry.patch for side in geometry.grid)
    x = pieces.stem(g, g.input(INPUT, BATCH, 3, rows, columns))
    size = place = None
    taken = {step.block: step for step in plan.active_steps}
    last_local = max((step.block for step in taken.values() if step.window), default=-1)
    for index in range(geometry.depth):
        weighed = plan.proportional_attention and size is not None
        log_size = g.Log(size) if weighed else None
        if plan.last_block == "prefix" and index == geometry.depth - 1:
            x, size = pieces.prefix_block(g, index, x, log_size), None
            continue
        x, parts, shares = pieces.attend(g, index, x, log_size)
        if index in taken:
            if index <= last_local and place is None:
                place = g.repeated(x, Layout(plan, index).places())
            step, state = taken[index], (x, size, place)
            x, size, place = take_step(g, plan, step, state, parts, shares)
            place = place if index < last_local else None
        x = pieces.feed_forward(g, index, x)
    pooled = geometry.head == "avg" and any(step.kind == "merge" for step in taken.values())
    logits = pieces.head(g, x, size if pooled else None)
    sides = BATCH, geometry.classes or geometry.width
    return g.model({OUTPUT: (logits, sides)}, metadata or {})


def take_step(
    g: Builder, plan: MergePlan, step: Step, state: State, parts: Projections, shares: Value
) -> State:
    """What a step leaves of the tokens of a block, after its attention.

    Args:
        g: where the nodes are put.
        plan: of which it is a step.
        step: merges or prunes.
        state: tokens, sizes, places.
        parts: projections of the block: [B, H, N, d] each.
        shares: attention of the block: [B, H, N, N].
    """
    options, layout, (x, size, place) = plan.matching, Layout(plan, step.block), state
    merges = step.kind == "merge"
    whose = options.attention if merges else options.prune_score
    received = None
    if whose != "norm" and (not merges or options.needs_attention):
        received = steps.received_by(g, shares, whose)
    if not merges and received is not None:
        return steps.prune(g, x, received, size, place, layout)
    if options.feature == "random":
        feature = g.constant(random_feature(plan, step).numpy(), np.float32)
        feature = feature if merges else g.repeated(x, feature.const_value.numpy()[0])
    else:
        feature = steps.feature_of(g, options.feature, x, parts, level=merges)
    if merges:
        return steps.merge(g, x, feature, size, place, received, options, layout)
    worth: Any = g.ReduceL2(feature, g.integers(2), keepdims=0)
    return steps.prune(g, x, worth, size, place, layout)
