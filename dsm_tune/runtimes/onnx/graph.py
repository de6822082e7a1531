"""Puts a model under a plan together as one ONNX graph: pieces of the model, steps in between."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from dsm_tune.merging.blocks import random_feature
from dsm_tune.merging.halves import Projections
from dsm_tune.plan import Matching, MergePlan, Step
from dsm_tune.runtimes.onnx import steps
from dsm_tune.runtimes.onnx.joining import length
from dsm_tune.runtimes.onnx.nodes import Builder, Layout, State, Value
from dsm_tune.runtimes.onnx.pieces import BATCH, Pieces

__all__ = ["INPUT", "OUTPUT", "graph_of", "take_step"]

INPUT, OUTPUT = "pixels", "logits"


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
    x = pieces.stem(g, g.input(INPUT, BATCH, 3, *pieces.image_size))
    size = place = None
    taken = {step.block: step for step in plan.active_steps}
    for index in range(geometry.depth):
        weighed = plan.proportional_attention and size is not None
        log_size = g.Log(size) if weighed else None
        if plan.last_block == "prefix" and index == geometry.depth - 1:
            x, size = pieces.prefix_block(g, index, x, log_size), None
            continue
        x, parts, shares = pieces.attend(g, index, x, log_size)
        if index in taken:
            if index <= plan.last_local and place is None:
                place = g.repeated(x, Layout(plan, index).places())
            state = State(x, size, place)
            x, size, place = take_step(g, plan, taken[index], state, parts, shares)
            place = place if index < plan.last_local else None
        x = pieces.feed_forward(g, index, x)
    logits = pieces.head(g, x, size if plan.pools_by_size else None)
    sides = BATCH, geometry.classes or geometry.width
    return g.model({OUTPUT: (logits, sides)}, metadata or {})


def take_step(
    g: Builder, plan: MergePlan, step: Step, state: State, parts: Projections, shares: Value
) -> State:
    """What a step leaves of the tokens of a block, after its attention.

    Args:
        g: where the nodes are put.
        plan: of which it is a step.
        step: merges, prunes or fuses.
        state: what enters the step.
        parts: projections of the block: [B, H, N, d] each.
        shares: attention of the block: [B, H, N, N].
    """
    options, layout, merges = plan.matching, Layout(plan, step.block), step.kind == "merge"
    whose, received = options.attention_for(step.kind), None
    if options.prune_score == "ats" and not merges:
        received = steps.attention_to_values(g, shares, parts.v, layout)
    elif whose is not None:
        received = steps.received_by(g, shares, whose)
    if not merges and received is not None:
        return _drop(g, step, state, received, options, layout)
    if options.feature == "random":
        feature = g.repeated(state.x, random_feature(plan, step)[0].numpy())
    else:
        feature = steps.feature_of(g, options.feature, state.x, parts, layout, level=merges)
    if merges:
        return steps.merge(g, state, feature, received, options, layout)
    return _drop(g, step, state, g.flat(length(g, feature)), options, layout)


def _drop(
    g: Builder, step: Step, state: State, worth: Value, options: Matching, layout: Layout
) -> State:
    if step.kind == "prune":
        return steps.prune(g, state, worth, layout)
    return steps.fuse(g, state, worth, options, layout)
