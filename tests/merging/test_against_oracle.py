"""The library against the loops of ``oracle.py``, image by image."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from oracle import run
from small_vits import images_for, plan_for, small_vit
from torch import Tensor, nn

from dsm_tune.merging.merged import merged, trace
from dsm_tune.merging.published import dsm_plan, tome_plan
from dsm_tune.plan import PRUNE_SCORES, Matching, MergePlan

TOLERANCE = 2e-3
OF_TEN = 9  # a near tie may break differently in two float paths


def logits_of(model: nn.Module, plan: MergePlan, images: Tensor) -> Tensor:
    with torch.no_grad(), merged(model, plan) as fast:
        return fast(images)


def both(model: nn.Module, plan: MergePlan, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the library and of the oracle."""
    ours = logits_of(model, plan, images)
    theirs = torch.stack([torch.from_numpy(run(model, plan, image).logits) for image in images])
    return ours, theirs


def share_that_agrees(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).abs().amax(dim=1) < TOLERANCE).float().mean())


def assert_same(model: nn.Module, plan: MergePlan, images: Tensor) -> None:
    ours, theirs = both(model, plan, images)
    assert share_that_agrees(ours, theirs) >= OF_TEN / 10, (ours - theirs).abs().amax(dim=1)


def divergence(dense: Tensor, logits: Tensor) -> float:
    kept, lost = dense.log_softmax(dim=1), logits.log_softmax(dim=1)
    return float((kept.exp() * (kept - lost)).sum(dim=1).mean())


@pytest.mark.parametrize(
    "kind",
    ["class", "distilled", "registers", "avg", "avg_class", "avg_prefix", "map", "map_registers"],
)
def test_global_merging_equals_the_oracle_for_every_head_and_prefix(kind: str) -> None:
    model = small_vit(kind, (14, 14))
    assert_same(model, tome_plan(model, 23), images_for(model, 10))


@pytest.mark.parametrize("kind", ["layerscale", "qk_norm", "pre_norm", "swiglu"])
def test_global_merging_equals_the_oracle_for_every_sort_of_block(kind: str) -> None:
    model = small_vit(kind, (13, 17))
    assert_same(model, tome_plan(model, 31), images_for(model, 10))


@pytest.mark.parametrize("quota", ["equal", "free"])
@pytest.mark.parametrize("position", ["destination", "centroid"])
@pytest.mark.parametrize(("grid", "window"), [((14, 14), 7), ((13, 17), 5), ((4, 4), 3)])
def test_local_merging_equals_the_oracle(
    quota: str, position: str, grid: tuple[int, int], window: int
) -> None:
    model = small_vit("class", grid)
    r = grid[0] * grid[1] // 6
    plan = dsm_plan(model, r, delay=0, window=window, local_blocks=3)
    plan = dataclasses.replace(plan, matching=Matching(quota=quota, position=position))
    assert_same(model, plan, images_for(model, 10))


def test_nine_windows_equal_the_oracle() -> None:
    model = small_vit("class", (24, 24), depth=2)
    assert_same(model, dsm_plan(model, 100, delay=0, window=8), images_for(model, 4))


@pytest.mark.parametrize("feature", ["k", "q", "v", "x", "kv", "k_all", "kv_all"])
def test_every_feature_equals_the_oracle(feature: str) -> None:
    model = small_vit("class", (13, 17), depth=3)
    plan = dataclasses.replace(tome_plan(model, 40), matching=Matching(feature=feature))
    assert_same(model, plan, images_for(model, 10))


@pytest.mark.parametrize("attention", ["class", "received"])
@pytest.mark.parametrize("window", [None, 7])
def test_salience_equals_the_oracle(attention: str, window: int | None) -> None:
    model = small_vit("class", (14, 14), depth=3)
    steps = [(block, "merge", 30, window) for block in range(3)]
    plan = plan_for(model, *steps, matching=Matching(salience=0.3, attention=attention))
    plain = plan_for(model, *steps)
    images = images_for(model, 10)
    ours, theirs = both(model, plan, images)
    assert share_that_agrees(ours, theirs) >= OF_TEN / 10
    assert share_that_agrees(ours, logits_of(model, plain, images)) < 1


@pytest.mark.parametrize("window", [None, 7])
def test_size_penalty_equals_the_oracle(window: int | None) -> None:
    model = small_vit("class", (14, 14), depth=3)
    steps = [(block, "merge", 40, window) for block in range(3)]
    plan = plan_for(model, *steps, matching=Matching(size_penalty=0.2))
    plain = plan_for(model, *steps)
    images = images_for(model, 10)
    ours, theirs = both(model, plan, images)
    assert share_that_agrees(ours, theirs) >= OF_TEN / 10
    assert share_that_agrees(ours, logits_of(model, plain, images)) < 1


@pytest.mark.parametrize("attention", ["class", "received"])
@pytest.mark.parametrize("norm", ["free", "mean", "largest"])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_means_weighed_by_attention_and_kept_lengths_equal_the_oracle(
    attention: str, norm: str, power: float
) -> None:
    model = small_vit("class", (14, 14), depth=3)
    steps = [(block, "merge", 40, 7 if block == 0 else None) for block in range(3)]
    matching = Matching(attention=attention, attention_weight=power, norm=norm, position="centroid")
    assert_same(model, plan_for(model, *steps, matching=matching), images_for(model, 10))


@pytest.mark.parametrize("score", PRUNE_SCORES)
@pytest.mark.parametrize("feature", ["k", "x", "kv", "kv_all"])
def test_pruning_equals_the_oracle(score: str, feature: str) -> None:
    model = small_vit("class", (14, 14), depth=3)
    steps = [(block, "prune", 50, None) for block in range(3)]
    plan = plan_for(model, *steps, matching=Matching(feature=feature, prune_score=score))
    assert_same(model, plan, images_for(model, 10))


@pytest.mark.parametrize("score", PRUNE_SCORES)
@pytest.mark.parametrize("norm", ["free", "mean", "largest"])
@pytest.mark.parametrize("proportional", [True, False])
def test_fusing_equals_the_oracle(score: str, norm: str, proportional: bool) -> None:
    model = small_vit("registers", (14, 14), depth=3)
    steps = [(block, "fuse", 50, None) for block in range(3)]
    matching = Matching(prune_score=score, norm=norm)
    plan = plan_for(model, *steps, matching=matching, proportional_attention=proportional)
    images = images_for(model, 10)
    assert_same(model, plan, images)
    dropped = plan_for(model, *[(block, "prune", 50, None) for block in range(3)])
    dropped = dataclasses.replace(dropped, matching=matching)
    assert share_that_agrees(logits_of(model, plan, images), logits_of(model, dropped, images)) < 1


@pytest.mark.parametrize("kind", ["class", "avg", "map"])
@pytest.mark.parametrize("position", ["destination", "centroid"])
def test_merging_within_windows_after_fusing_equals_the_oracle(kind: str, position: str) -> None:
    model = small_vit(kind, (13, 17))
    steps = [(0, "merge", 40, 6), (1, "fuse", 60, None), (2, "merge", 30, 5), (3, "fuse", 9, None)]
    score = "ats" if kind == "class" else "received"
    plan = plan_for(model, *steps, matching=Matching(prune_score=score, position=position))
    assert_same(model, plan, images_for(model, 10))


@pytest.mark.parametrize("kind", ["registers", "avg"])
def test_merging_and_pruning_in_turn_equals_the_oracle(kind: str) -> None:
    model = small_vit(kind, (14, 14))
    steps = [
        (0, "merge", 30, 7),
        (1, "prune", 20, None),
        (2, "merge", 20, 8),
        (3, "prune", 10, None),
    ]
    assert_same(model, plan_for(model, *steps), images_for(model, 10))


@pytest.mark.parametrize("position", ["destination", "centroid"])
def test_windows_after_pruning_equal_the_oracle(position: str) -> None:
    model = small_vit("class", (13, 17))
    steps = [(0, "prune", 90, None), (1, "merge", 30, 5), (3, "merge", 20, 6)]
    plan = plan_for(model, *steps, matching=Matching(position=position))
    assert_same(model, plan, images_for(model, 10))


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("kind", ["class", "distilled", "registers"])
def test_a_prefix_only_last_block_equals_the_oracle(kind: str, proportional: bool) -> None:
    model = small_vit(kind, (14, 14))
    steps = [(block, "merge", 40, None) for block in range(3)]
    plan = plan_for(model, *steps, last_block="prefix", proportional_attention=proportional)
    assert_same(model, plan, images_for(model, 10))


@pytest.mark.parametrize("kind", ["class", "map_registers"])
def test_without_proportional_attention_it_equals_the_oracle(kind: str) -> None:
    model = small_vit(kind, (14, 14))
    plan = dataclasses.replace(tome_plan(model, 40), proportional_attention=False)
    assert_same(model, plan, images_for(model, 10))


def test_the_trace_is_the_partition_of_the_oracle() -> None:
    model = small_vit("registers", (14, 14))
    steps = [
        (0, "merge", 60, 7),
        (1, "fuse", 30, None),
        (2, "prune", 9, None),
        (3, "fuse", 5, None),
    ]
    plan = plan_for(model, *steps)
    images = images_for(model, 10)
    origins = trace(model, plan, images)
    same = 0
    for i, image in enumerate(images):
        found = []
        for origin, tokens in zip(origins, plan.tokens[1:], strict=True):
            groups: list[set[int]] = [set() for _ in range(tokens)]
            for original, token in enumerate(origin[i].tolist()):
                if token >= 0:
                    groups[token].add(original)
            found.append([frozenset(group) for group in groups])
        same += found == run(model, plan, image).members
    assert same >= OF_TEN


def _on_photographs(model: nn.Module, plan: MergePlan, images: Tensor) -> None:
    ours, theirs = both(model, plan, images)
    with torch.no_grad():
        dense = model(images)
    assert share_that_agrees(ours, theirs) >= OF_TEN / 10, (ours - theirs).abs().amax(dim=1)
    assert math.isclose(divergence(dense, ours), divergence(dense, theirs), rel_tol=0.05)
    agreement = [(logits.argmax(1) == dense.argmax(1)).float().mean() for logits in (ours, theirs)]
    assert abs(agreement[0] - agreement[1]) <= 0.1
    assert agreement[0] >= 0.8


def test_tome_on_deit_tiny_and_photographs_equals_the_oracle(
    deit_tiny: nn.Module, photos: Tensor
) -> None:
    _on_photographs(deit_tiny, tome_plan(deit_tiny, 13), photos[:12])


def test_dsm_on_deit_tiny_and_photographs_equals_the_oracle(
    deit_tiny: nn.Module, photos: Tensor
) -> None:
    plan = dsm_plan(deit_tiny, 20, delay=2, window=7, local_blocks=3)
    assert plan.tokens[2:5] == (197, 177, 157)
    _on_photographs(deit_tiny, plan, photos[:12])
