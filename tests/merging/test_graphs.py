"""One static graph per plan: torch.export, torch.compile and the tracer (invariant 14)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_vits import images_for, plan_for, small_vit
from timm.models.vision_transformer import VisionTransformer

from dsm_tune.merging.merged import merged
from dsm_tune.plan import Matching, MergePlan

ALSO = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("distilled", "avg_class", "avg_prefix")
]
HEADS = ["class", "avg", *ALSO]


def _plan(model: VisionTransformer) -> MergePlan:
    steps = [(0, "merge", 5, 3), (1, "merge", 2, None), (2, "prune", 2, None)]
    return plan_for(model, *steps, matching=Matching(position="centroid"))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", HEADS)
def test_a_merged_model_exports_for_one_batch_size(kind: str, strict: bool) -> None:
    model = small_vit(kind)
    images = images_for(model)
    with torch.no_grad(), merged(model, _plan(model)) as fast:
        expected = fast(images)
        program = torch.export.export(fast, (images,), strict=strict)
    torch.testing.assert_close(program.module()(images), expected)


@pytest.mark.parametrize("kind", HEADS)
def test_a_merged_model_exports_for_any_batch_size(kind: str) -> None:
    model = small_vit(kind)
    images = images_for(model, 5)
    with torch.no_grad(), merged(model, _plan(model)) as fast:
        expected = fast(images)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(fast, (images[:2],), dynamic_shapes=({0: batch},))
    run = program.module()
    for count in (1, 2, 5):
        torch.testing.assert_close(run(images[:count]), expected[:count])


@pytest.mark.parametrize(
    "options",
    [
        Matching(feature="random", seed=3),
        Matching(feature="kv_all", salience=0.5, size_penalty=0.1, quota="free"),
        Matching(prune_score="received", salience=0.5, attention="received"),
        Matching(prune_score="ats", norm="largest", position="centroid"),
    ],
)
def test_every_sort_of_matching_exports(options: Matching) -> None:
    model = small_vit("class")
    images = images_for(model)
    plan = dataclasses.replace(_plan(model), matching=options, last_block="prefix")
    if options.prune_score == "ats":
        fuse = dataclasses.replace(plan.steps[-1], kind="fuse")
        plan = dataclasses.replace(plan, steps=(*plan.steps[:-1], fuse))
    with torch.no_grad(), merged(model, plan) as fast:
        expected = fast(images)
        program = torch.export.export(fast, (images,))
    torch.testing.assert_close(program.module()(images), expected)


def test_an_exported_model_outlives_the_with_block() -> None:
    model = small_vit("avg")
    images = images_for(model)
    with torch.no_grad():
        dense = model(images)
        with merged(model, _plan(model)) as fast:
            expected = fast(images)
            program = torch.export.export(fast, (images,))
        assert torch.equal(model(images), dense)
        torch.testing.assert_close(program.module()(images), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_merged_model_compiles_into_one_graph(kind: str) -> None:
    model = small_vit(kind)
    images = images_for(model)
    torch._dynamo.reset()
    with torch.no_grad():
        dense = model(images)
        with merged(model, _plan(model)) as fast:
            expected = fast(images)
            compiled = torch.compile(fast, fullgraph=True)
            torch.testing.assert_close(compiled(images), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(images), dense)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_second_plan_on_a_compiled_model_is_a_second_graph() -> None:
    model = small_vit("class")
    images = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for r in (2, 4):
        with torch.no_grad(), merged(model, plan_for(model, (0, "merge", r, None))) as fast:
            torch.testing.assert_close(compiled(images), fast(images), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
