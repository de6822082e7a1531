"""The closed form against print, and against torchprofile on the merged model."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import timm
import torch
from small_vits import KINDS, images_for, plan_for, small_vit
from torch import Tensor, nn
from torchprofile import profile_macs

from dsm_tune import schedules
from dsm_tune.errors import ModelError
from dsm_tune.measuring.macs import FREE, PRODUCTS, count_macs
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.merged import merged
from dsm_tune.merging.published import dsm_plan, tome_plan
from dsm_tune.plan import FEATURES, PRUNE_SCORES, Geometry, Matching, MergePlan

TINY = Geometry((14, 14), 1, 12, 192, 3, 768, 16, 1000, "token")
SMALL = dataclasses.replace(TINY, width=384, heads=6, hidden=1536)
BASE = dataclasses.replace(TINY, width=768, heads=12, hidden=3072)
LARGE = dataclasses.replace(TINY, width=1024, heads=16, hidden=4096, depth=24)


PRINTED = [
    (MergePlan("DeiT-S", SMALL), 4.60),
    (MergePlan("ViT-B", BASE), 17.56),
    (MergePlan("ViT-L", LARGE), 61.55),
    (schedules.tome(SMALL, 13), 2.70),
    (schedules.tome(BASE, 13), 10.37),
    (schedules.dsm(BASE, 8, delay=2), 14.45),
]


def matching_products(plan: MergePlan) -> int:
    """⌈N/2⌉⌊N/2⌋F over the merging blocks: the papers do not count them."""
    width = plan.matching.feature_width(plan.geometry)
    counts = [plan.tokens[step.block] for step in plan.active_steps]
    return sum(math.ceil(n / 2) * (n // 2) * width for n in counts)


@pytest.mark.parametrize(("plan", "printed"), PRINTED)
def test_the_closed_form_without_matching_rounds_to_the_printed_gmacs(
    plan: MergePlan, printed: float
) -> None:
    assert round((plan.macs - matching_products(plan)) / 1e9, 2) == printed


@pytest.mark.parametrize(("plan", "printed"), PRINTED)
def test_matching_adds_less_than_0_3_percent_to_the_printed_gmacs(
    plan: MergePlan, printed: float
) -> None:
    assert printed - 0.005 <= plan.gmacs <= printed * 1.003


def test_a_prefix_only_last_block_saves_6_9_percent_of_a_dense_model_of_12_blocks() -> None:
    dense = MergePlan("", BASE)
    saving = dataclasses.replace(dense, last_block="prefix")
    assert 1 - saving.macs / dense.macs == pytest.approx(0.069, abs=0.001)


def overcounted(plan: MergePlan) -> int:
    """Matching products of prefix tokens, which the closed form counts and nobody computes."""
    total, width = 0, plan.matching.feature_width(plan.geometry)
    for step in plan.active_steps:
        if step.kind == "merge":
            n, first = plan.tokens[step.block], plan.geometry.prefix
            even, odd = (len([i for i in range(first, n) if i % 2 == half]) for half in (0, 1))
            total += (math.ceil(n / 2) * (n // 2) - even * odd) * width
    return total


def counted(model: nn.Module, plan: MergePlan) -> int:
    with merged(model, plan) as fast:
        return count_macs(fast, images_for(model, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_of_small_models_is_the_count_to_the_last_product(kind: str) -> None:
    model = small_vit(kind, (13, 17))
    steps = [(0, "merge", 30, 5), (1, "merge", 30, None), (2, "prune", 30, None)]
    for plan in [plan_for(model), plan_for(model, *steps)]:
        assert counted(model, plan) == plan.macs - overcounted(plan)
        if plan.geometry.reads_prefix_only:
            saving = dataclasses.replace(plan, last_block="prefix")
            assert counted(model, saving) == saving.macs - overcounted(saving)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("attention", ["class", "received"])
def test_the_closed_form_counts_what_features_and_attention_cost(
    feature: str, attention: str
) -> None:
    model = small_vit("registers", (14, 14))
    matching = Matching(
        feature, salience=0.5, attention=attention, prune_score=attention, size_penalty=0.1
    )
    steps = [(0, "merge", 30, 5), (1, "prune", 30, None), (2, "merge", 30, None)]
    plan = plan_for(model, *steps, matching=matching)
    assert counted(model, plan) == plan.macs - overcounted(plan)


@pytest.mark.parametrize("score", PRUNE_SCORES)
@pytest.mark.parametrize("kind", ["registers", "distilled"])
def test_the_closed_form_counts_what_fusing_costs(score: str, kind: str) -> None:
    model = small_vit(kind, (14, 14))
    steps = [(0, "fuse", 30, None), (1, "merge", 30, 5), (2, "fuse", 30, None)]
    plan = plan_for(model, *steps, matching=Matching(prune_score=score, norm="mean"))
    assert counted(model, plan) == plan.macs - overcounted(plan)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("deit_tiny_patch16_224", True),
        ("deit_tiny_patch16_224", False),
        pytest.param("deit_tiny_distilled_patch16_224", True, marks=pytest.mark.slow),
        pytest.param("deit3_small_patch16_224", False, marks=pytest.mark.slow),
    ],
)
def test_real_models_under_real_plans_agree_within_0_2_percent(name: str, fused: bool) -> None:
    timm.layers.set_fused_attn(fused)
    try:
        model = timm.create_model(name).eval()
    finally:
        timm.layers.set_fused_attn(True)
    image = torch.randn(1, 3, 224, 224)
    for plan in [tome_plan(model, 0), tome_plan(model, 13), dsm_plan(model, 20)]:
        with merged(model, plan) as fast:
            assert count_macs(fast, image) == pytest.approx(plan.macs, rel=2e-3)


def test_plain_torchprofile_agrees_within_0_2_percent_but_for_the_product_that_merges() -> None:
    """It also counts norms and the one-hot product (baddbmm), which the design leaves out."""
    model = timm.create_model("deit_tiny_patch16_224").eval()
    plan = tome_plan(model, 13)
    with warnings.catch_warnings(), merged(model, plan) as fast:
        warnings.simplefilter("ignore")
        nodes: dict[Any, int] = profile_macs(fast, torch.randn(1, 3, 224, 224), reduction=None)  # type: ignore[assignment]
    applied = sum(macs for node, macs in nodes.items() if node.operator == "aten::baddbmm")
    assert 0 < applied < 0.005 * plan.macs
    assert sum(nodes.values()) - applied == pytest.approx(plan.macs, rel=2e-3)


def test_a_convolutional_model_is_counted() -> None:
    assert count_macs(timm.create_model("resnet18").eval(), torch.randn(1, 3, 224, 224)) / 1e9 == (
        pytest.approx(1.81, abs=0.01)
    )


def test_fused_and_unfused_attention_count_the_same() -> None:
    counts = []
    for fused in (True, False):
        timm.layers.set_fused_attn(fused)
        try:
            model = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
        finally:
            timm.layers.set_fused_attn(True)
        counts.append(count_macs(model, torch.randn(1, 3, 64, 64)))
        assert counts[-1] == MergePlan("", read_geometry(model)).macs
    assert counts[0] == counts[1]


class _Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.qr(x).R


def test_an_operator_of_unknown_cost_is_an_error_that_names_it() -> None:
    with pytest.raises(ModelError, match=r"^the multiply-adds.*aten::linalg_qr[^\n]*$"):
        count_macs(_Odd(), torch.randn(1, 3, 4, 4))


class _Ellipsis(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...ij,...kj->...ik", x, x)


def test_a_product_that_torchprofile_gives_up_on_is_an_error() -> None:
    with pytest.raises(ModelError, match="aten::einsum"):
        count_macs(_Ellipsis(), torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 8, 8), (0, 3, 8, 8)])
def test_more_or_less_than_one_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"^image must have the shape \[1, 3, H, W\], but got \["):
        count_macs(small_vit("class"), torch.zeros(shape))


def test_nothing_is_both_a_product_and_free_and_every_exemption_has_a_reason() -> None:
    assert not PRODUCTS & set(FREE)
    assert all(reason for reason in FREE.values())
