"""Which models are read, which are refused, and why."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from small_vits import GRIDS, KINDS, images_for, small_vit
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dsm_tune.errors import ModelError
from dsm_tune.merging.backbone import attend, attend_prefix, feed_forward, read_geometry
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
    prefix = {"distilled": 2, "registers": 5, "avg": 0}.get(kind, 1)
    head = "avg" if kind.startswith("avg") else "distilled" if kind == "distilled" else "token"
    assert read_geometry(small_vit(kind, grid)) == Geometry(grid, prefix, 4, 16, 2, 32, 2, 5, head)


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
    "swin_tiny_patch4_window7_224": "it is a SwinTransformer",
    "convnext_atto": "it is a ConvNeXt",
    "resnet18": "it is a ResNet",
    "eva02_tiny_patch14_224": "it is a Eva",
    "vit_relpos_small_patch16_224": "it is a VisionTransformerRelPos",
    "vit_tiny_r_s16_p8_224": "its patches are 64×8×8",
    "vit_base_patch16_siglip_224": "its head pools by attention",
    "cait_xxs24_224": "it is a Cait",
    "beit_base_patch16_224": "it is a Beit",
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
        (lambda: _Gated(**SMALL), "it is a _Gated"),
        (lambda: _with(global_pool="max"), "its head pools by 'max'"),
        (lambda: _with(global_pool=""), "its head pools by ''"),
        (lambda: _with(in_chans=1), "its patches are 1×2×2, not 3×P×P"),
        (lambda: _with(patch_size=(2, 4)), "its patches are 3×2×4, not 3×P×P"),
        (lambda: _with(block_fn=_parallel()), "block 0 is a ParallelScalingBlock"),
        (lambda: _with(mlp_layer=_swiglu()), "block 0 has a SwiGLU MLP"),
        (lambda: nn.Linear(3, 3), "it is a Linear"),
    ],
)
def test_a_part_of_another_kind_is_refused_with_its_name(model: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_geometry(model())


def _parallel() -> type[nn.Module]:
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock


def _swiglu() -> type[nn.Module]:
    from timm.layers import SwiGLU

    return SwiGLU


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
