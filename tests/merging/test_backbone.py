"""Which models are read, which are refused, and why."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_vits import GRIDS, KINDS, images_for, small_vit
from timm.layers import AttentionPoolLatent, set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from families import BEGIN, END, FAMILIES, check, create, reason
from families import REFUSED as REFUSED_IN_README

from dsm_tune.errors import ModelError
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.halves import attend, attend_prefix, feed_forward
from dsm_tune.merging.merged import merged
from dsm_tune.merging.published import dsm_plan, tome_plan
from dsm_tune.merging.similarity import similarity_curve
from dsm_tune.plan import Geometry, MergePlan

SMALL: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_geometry_of_a_small_model_is_read(kind: str, grid: tuple[int, int]) -> None:
    prefix = {"distilled": 2, "registers": 5, "avg": 0, "map": 0, "map_registers": 3}.get(kind, 1)
    head = {"distilled": "distilled", "avg": "avg", "map": "map"}.get(kind.split("_")[0], "token")
    hidden = 48 if kind == "swiglu" else 32  # three products of 16 × 32 cost as two of 16 × 48
    found = read_geometry(small_vit(kind, grid))
    assert found == Geometry(grid, prefix, 4, 16, 2, hidden, 2, 5, head)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deit_tiny_patch16_224", Geometry((14, 14), 1, 12, 192, 3, 768, 16, 1000, "token")),
        (
            "deit_tiny_distilled_patch16_224",
            Geometry((14, 14), 2, 12, 192, 3, 768, 16, 1000, "distilled"),
        ),
        ("vit_small_patch16_384", Geometry((24, 24), 1, 12, 384, 6, 1536, 16, 1000, "token")),
        ("vit_base_patch16_224.mae", Geometry((14, 14), 1, 12, 768, 12, 3072, 16, 0, "token")),
        (
            "vit_base_patch16_224.sam_in1k",
            Geometry((14, 14), 1, 12, 768, 12, 3072, 16, 1000, "token"),
        ),
        ("deit3_small_patch16_224", Geometry((14, 14), 1, 12, 384, 6, 1536, 16, 1000, "token")),
        ("vit_base_patch16_clip_224", Geometry((14, 14), 1, 12, 768, 12, 3072, 16, 1000, "token")),
        ("vit_small_patch14_reg4_dinov2", Geometry((37, 37), 5, 12, 384, 6, 1536, 14, 0, "token")),
    ],
)
def test_the_models_of_the_paper_are_read(name: str, expected: Geometry) -> None:
    with torch.device("meta"):
        assert read_geometry(timm.create_model(name)) == expected


class _Gated(VisionTransformer):
    pass


def _with(**options: Any) -> VisionTransformer:
    return VisionTransformer(**{**SMALL, **options})


REFUSED = {
    "swin_tiny_patch4_window7_224": "its class is SwinTransformer, whose attention is cut into",
    "convnext_atto": "its class is ConvNeXt, whose convolutions need the whole grid",
    "resnet18": "its class is ResNet, whose convolutions need the whole grid",
    "eva02_tiny_patch14_224": "its class is Eva, where every block turns queries and keys by their",
    "vit_medium_patch16_rope_reg1_gap_256": "its class is Eva, where every block turns",
    "vit_relpos_small_patch16_224": "its class is VisionTransformerRelPos, where every",
    "beit_base_patch16_224": "its class is Beit, where every block adds a bias",
    "samvit_base_patch16": "its class is VisionTransformerSAM, where every block adds a bias",
    "naflexvit_base_patch16_gap": "its class is NaFlexVit, whose patches vary in number",
    "crossvit_9_240": "its class is CrossVit, which fuses two sequences",
    "cait_xxs24_224": "its class is Cait, which mixes heads",
    "mixer_s32_224": "its class is MlpMixer, whose weights mix a fixed number of tokens",
    "xcit_nano_12_p16_224": "its class is Xcit, whose attention is across channels",
    "vit_tiny_r_s16_p8_224": "its patch embedding is a HybridEmbed, a network before the blocks",
    "vit_small_patch16_18x2_224": "block 0 is a ParallelThingsBlock, which has no attention half",
    "vit_base_patch16_rpn_224": "block 0 is a ResPostBlock, whose norms stand behind its halves",
    "vit_dwee_patch16_reg1_gap_256": "block 0 attends by DiffAttention",
    "test_vit3": "its head pools prefix and patch tokens by one attention",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_in_one_line_that_names_model_and_reason(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = MergePlan("", Geometry((4, 4), 1, 2, 16, 2, 32, 2, 5, "token"))
    for call in [
        lambda: read_geometry(model),
        lambda: tome_plan(model, 3),
        lambda: dsm_plan(model, 3),
        lambda: similarity_curve(model, torch.zeros(1, 3, 8, 8)),
        lambda: merged(model, plan).__enter__(),
    ]:
        with pytest.raises(
            ModelError, match=f"^tokens of {name} cannot be merged: {REFUSED[name]}"
        ) as e:
            call()
        assert "\n" not in str(e.value)
        assert "accepted are timm models of the class VisionTransformer" in str(e.value)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: _Gated(**SMALL), "its class is _Gated, whose forward may differ"),
        (lambda: _with(global_pool="max"), "its head pools by 'max'"),
        (lambda: _with(global_pool=""), "its head pools by ''"),
        (lambda: _with(in_chans=1), "its patches are 1×2×2, not 3×P×P"),
        (lambda: _with(patch_size=(2, 4)), "its patches are 3×2×4, not 3×P×P"),
        (lambda: _with(block_fn=_parallel()), "block 0 is a ParallelScalingBlock"),
        (lambda: _with(mlp_layer=_convolving()), "block 0 has a ConvMlp MLP"),
        (lambda: nn.Linear(3, 3), "its class is Linear, whose forward may differ"),
        (lambda: _with(global_pool="prr"), "its head pools by AttentionPoolPrr"),
        (lambda: _with_wider_pool(), "its attention-pooling head has other sizes"),
        (lambda: _gated(), "block 0 has a gate on its attention"),
    ],
)
def test_a_part_of_another_kind_is_refused_with_its_name(model: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_geometry(model())


def _parallel() -> type[nn.Module]:
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock


def _convolving() -> type[nn.Module]:
    from timm.layers import ConvMlp

    return ConvMlp


def _gated() -> VisionTransformer:
    from timm.layers.attention import Attention

    model = _with()
    model.blocks[0].attn = Attention(16, 2, gated=True)
    return model


def _with_wider_pool() -> VisionTransformer:
    model = _with(global_pool="map", class_token=False)
    model.attn_pool = AttentionPoolLatent(16, num_heads=2, mlp_ratio=3.0)
    return model


def test_a_block_of_another_kind_behind_the_first_is_refused() -> None:
    model = _with()
    model.blocks[1] = _parallel()(16, 2)
    with pytest.raises(ModelError, match="block 1 is a ParallelScalingBlock"):
        read_geometry(model)


def test_gradient_checkpointing_is_refused() -> None:
    model = _with()
    model.set_grad_checkpointing()
    with pytest.raises(ModelError, match="gradient checkpointing is on"):
        read_geometry(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [pair for family in FAMILIES for pair in family.models.items()]
)
def test_every_family_of_timm_merges(name: str, options: dict[str, Any]) -> None:
    check(create(name, options))


def test_at_least_20_models_of_timm_are_run_and_those_of_the_readme_are_these() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.split(BEGIN)[1].split(END)[0]
    run = [name for family in FAMILIES for name in family.models]
    assert re.findall(r"`([^`]*)`", table) == run + REFUSED_IN_README
    assert [line.split(" | ")[0] for line in table.splitlines() if "`" in line] == [
        *(f"| {family.name}" for family in FAMILIES),
        *(f"| `{name}`" for name in REFUSED_IN_README),
    ]
    assert len(set(run)) >= 20
    assert len(REFUSED_IN_README) >= 8
    for name in REFUSED_IN_README:
        assert f"| `{name}` | {reason(name)} |" in table


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_two_halves_of_a_block_are_the_block(kind: str, fused: bool) -> None:
    model = small_vit(kind, (13, 17))
    x = torch.randn(2, 222, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.fused_attn = fused
            whole = block(x)
            block.attn.fused_attn = True
            torch.testing.assert_close(feed_forward(block, attend(block, x, None)[0]), whole)
            torch.testing.assert_close(
                feed_forward(block, attend_prefix(block, x, None, 5)),
                whole[:, :5],
                atol=1e-5,
                rtol=1e-4,
            )


def test_proportional_attention_is_the_mask_that_timm_takes() -> None:
    block = small_vit("qk_norm").blocks[0]
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    log_size = torch.randint(1, 5, (2, 9)).float().log()
    with torch.no_grad():
        ours, _ = attend(block, x, log_size)
        theirs = x + block.attn(block.norm1(x), attn_mask=log_size[:, None, None, :])
    torch.testing.assert_close(ours, theirs)


def test_unfused_attention_merges_as_fused_does() -> None:
    fused = small_vit("class", (14, 14))
    set_fused_attn(False)
    try:
        unfused = VisionTransformer(
            img_size=28,
            patch_size=2,
            embed_dim=16,
            depth=4,
            num_heads=2,
            mlp_ratio=2.0,
            num_classes=5,
        ).eval()
    finally:
        set_fused_attn(True)
    unfused.load_state_dict(fused.state_dict())
    images = images_for(fused)
    with (
        torch.no_grad(),
        merged(fused, dsm_plan(fused, 40)) as f,
        merged(unfused, dsm_plan(fused, 40)) as u,
    ):
        torch.testing.assert_close(f(images), u(images), atol=1e-4, rtol=1e-4)
