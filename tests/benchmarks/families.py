"""Which families of timm models merge, found out by running them; prints the README's table.

Each model is made by name with random weights and real sizes but for the depth of large ones. It is
run dense, under a plan that removes nothing (the same bits are asked for) and under ToMe's and
DSM's plans, whose tokens are followed through all blocks.

``--curves FILE`` draws the similarity curve of one model of each family instead, at full depth:
of weights that are given (``--weights NAME=FILE``) or downloaded (``--pretrained``), with D and its
stability; of random ones otherwise, whose D means nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from subject import SHARED
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dsm_tune.curve import facts_of
from dsm_tune.errors import ModelError
from dsm_tune.inputs import CURVE_IMAGES
from dsm_tune.measuring.images import SUFFIXES, load_image
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.joining import Tokens
from dsm_tune.merging.loading import create_model
from dsm_tune.merging.merged import merged, trace
from dsm_tune.merging.published import dsm_plan, tome_plan
from dsm_tune.plan import MergePlan
from dsm_tune.reviewing.curves import curves_apart
from dsm_tune.reviewing.pictures import encoded

FEW = 4  # images, of random weights
BEGIN, END = "<!-- families -->", "<!-- end of families -->"


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one family, by timm name, and what makes each small or odd enough."""

    name: str
    models: dict[str, dict[str, Any]]


SHALLOW: dict[str, Any] = {"depth": 4}
FAMILIES = [
    Family(
        "ViT, AugReg",
        {
            "vit_tiny_patch16_224": {},
            "vit_small_patch32_224": {},
            "vit_base_patch16_224.augreg_in21k_ft_in1k": SHALLOW,
            "vit_large_patch16_224": SHALLOW,
            "vit_huge_patch14_224": SHALLOW,
        },
    ),
    Family("384 pixels", {"vit_tiny_patch16_384": SHALLOW, "deit_base_patch16_384": SHALLOW}),
    Family(
        "other grids, 13×17",
        {"deit_tiny_patch16_224": {"img_size": (208, 272)}},
    ),
    Family("SAM-trained", {"vit_base_patch16_224.sam_in1k": SHALLOW}),
    Family("DeiT", {"deit_small_patch16_224": {}}),
    Family(
        "distilled DeiT",
        {
            "deit_tiny_distilled_patch16_224": {},
            "deit_base_distilled_patch16_384": SHALLOW,
        },
    ),
    Family(
        "DeiT-III (LayerScale)",
        {"deit3_small_patch16_224": {}, "deit3_huge_patch14_224": SHALLOW},
    ),
    Family(
        "MAE, average pooling",
        {"vit_base_patch16_224.mae": {**SHALLOW, "global_pool": "avg", "num_classes": 1000}},
    ),
    Family(
        "CLIP image towers",
        {
            "vit_base_patch32_clip_224": SHALLOW,
            "vit_base_patch16_clip_quickgelu_224": SHALLOW,
        },
    ),
    Family(
        "SigLIP image towers (attention pooling)",
        {
            "vit_base_patch16_siglip_224": SHALLOW,
            "vit_so150m_patch16_reg4_map_256": SHALLOW,
        },
    ),
    Family(
        "SigLIP, average pooling",
        {"vit_base_patch16_siglip_gap_224": SHALLOW},
    ),
    Family(
        "DINOv2, registers, gated MLP",
        {
            "vit_small_patch14_dinov2": {"img_size": 224},
            "vit_small_patch14_reg4_dinov2": {"img_size": 224},
            "vit_giant_patch14_reg4_dinov2": {"img_size": 224, "depth": 2},
        },
    ),
    Family("DINO", {"vit_small_patch16_224.dino": {}}),
    Family("registers, averaged", {"vit_medium_patch16_reg4_gap_256": SHALLOW}),
    Family("normed queries and keys", {"vit_xsmall_patch16_clip_224": {"qk_norm": True}}),
    Family("AIMv2 (RMSNorm, SwiGLU)", {"aimv2_large_patch14_224": {"depth": 2}}),
    Family("FlexiViT", {"flexivit_small": SHALLOW}),
]
REFUSED = [
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "resnet18",
    "eva02_tiny_patch14_224",
    "vit_medium_patch16_rope_reg1_gap_256",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "naflexvit_base_patch16_gap",
    "crossvit_9_240",
    "cait_xxs24_224",
    "mixer_s32_224",
    "vit_small_patch16_18x2_224",
    "vit_tiny_r_s16_p8_224",
    "vit_dwee_patch16_reg1_gap_256",
]


def create(name: str, options: dict[str, Any]) -> nn.Module:
    """The model with random weights, in eval mode."""
    import timm

    torch.manual_seed(0)
    made: nn.Module = timm.create_model(name, **options).eval()
    return made


@torch.no_grad()
def check(model: nn.Module) -> MergePlan:
    """Run a model dense and merged; what must hold is asserted. Returns the last plan."""
    parts: Any = model
    geometry = read_geometry(model)
    sides = [side * geometry.patch for side in geometry.grid]
    images = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(1))
    dense = model(images)
    for empty in (tome_plan(model, 0), dsm_plan(model, 20, delay=geometry.depth)):
        with merged(model, empty) as fast:
            assert torch.equal(fast(images), dense)
    r = geometry.patches // (2 * geometry.depth)
    for plan in (tome_plan(model, r), dsm_plan(model, r, delay=1)):
        with merged(model, plan) as fast:
            logits = fast(images)
            _check_tokens(parts.blocks, plan, _entering(parts, images))
        assert logits.shape == dense.shape
        assert logits.isfinite().all()
        _check_partition(trace(model, plan, images), plan)
    assert torch.equal(model(images), dense)
    return plan


def _entering(parts: Any, images: Tensor) -> Tensor:
    return parts.norm_pre(parts._pos_embed(parts.patch_embed(images)))


def _check_tokens(blocks: Any, plan: MergePlan, x: Tensor) -> None:
    """As many tokens as the plan says; sizes that sum to all; prefix tokens alone."""
    tokens, geometry = Tokens(x), plan.geometry
    for block in range(geometry.depth):
        tokens = blocks.run_block(tokens, block)
        assert tokens.x.shape[1] == plan.tokens[block + 1]
        if tokens.size is not None:
            assert (tokens.size.sum(dim=1) == geometry.tokens).all()
            assert (tokens.size[:, : geometry.prefix] == 1).all()
    assert tokens.size is not None


def _check_partition(origins: list[Tensor], plan: MergePlan) -> None:
    """Every original token is in one token, and the prefix is where it was."""
    first = torch.arange(plan.geometry.prefix)
    for origin, count in zip(origins, plan.tokens[1:], strict=True):
        assert (origin[:, : len(first)] == first).all()
        assert all(len(row.unique()) == count for row in origin)


def reason(name: str) -> str:
    """Why a model is refused."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    try:
        read_geometry(model)
    except ModelError as error:
        return str(error).split("cannot be merged: ")[1].split(";")[0]
    raise AssertionError(f"{name} is not refused")


def curve_of(family: Family, options: argparse.Namespace) -> dict[str, Any]:
    """The similarity curve of one model of a family: of one with weights, where there is one."""
    files = dict(text.partition("=")[::2] for text in options.weights)
    name = next((name for name in family.models if name in files), next(iter(family.models)))
    print(f"{family.name}: {name} …", file=sys.stderr)
    kwargs = {key: value for key, value in family.models[name].items() if key != "depth"}
    torch.manual_seed(0)
    file, pretrained = files.get(name), options.pretrained and name not in files
    model = create_model(name, checkpoint=file, pretrained=pretrained, model_kwargs=kwargs)
    is_random = file is None and not pretrained
    found = sorted(file for file in Path(options.images).rglob("*") if file.suffix in SUFFIXES)
    some = found[: FEW if is_random else CURVE_IMAGES]  # labels are not needed, nor read
    images = torch.cat([load_image(file, model) for file in some])
    return {
        "model": f"{family.name}: {name}",
        "weights": "random" if is_random else "given",
        **facts_of(model, images, seed=0),
    }


def draw_curves(options: argparse.Namespace) -> None:
    """Draw one curve per family, and say where each begins to converge."""
    if not any(file.suffix in SUFFIXES for file in Path(options.images).rglob("*")):
        sys.exit(f"skipped: there are no images in {options.images}; name --images")
    curves = [curve_of(family, options) for family in FAMILIES]
    for one in curves:
        share = one["stability"].get(str(one["delay"]), 0.0)
        found = f"D = {one['delay']} in {share:.0%} of resamples"
        if not one["transition"]:
            found = f"D = {one['delay']}, depth / 6: no transition"
        words = "random weights: D means nothing" if one["weights"] == "random" else found
        print(f"{one['model']}: {len(one['similarity_curve'])} blocks, {words}")
    figure = curves_apart(curves, f"Similarity curves of {len(curves)} families")
    form = Path(options.curves).suffix.lower().removeprefix(".")
    Path(options.curves).write_bytes(encoded(figure, form))


def main() -> None:
    """Run all models and print the table that stands in the README, or draw curves."""
    chosen = parser()
    options = chosen.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.curves is None:
        print_table()
    elif Path(options.curves).suffix.lower() not in (".png", ".svg"):
        chosen.error(f"--curves must end in .png or .svg, but got {options.curves}")
    else:
        draw_curves(options)


def parser() -> argparse.ArgumentParser:
    """What may be asked for."""
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--curves", metavar="FILE", help="draw similarity curves: .png or .svg")
    found.add_argument("--images", default=str(SHARED / "photos"), help="of curves")
    found.add_argument("--weights", metavar="NAME=FILE", action="append", default=[])
    found.add_argument("--pretrained", action="store_true", help="download timm's weights")
    return found


def print_table() -> None:
    """Run all models and print the table that stands in the README."""
    heads = {"token": "class token", "avg": "mean", "map": "attention", "distilled": "two tokens"}
    print(BEGIN)
    print("| family | run here | head | prefix tokens |\n|---|---|---|---|")
    for family in FAMILIES:
        found = []
        for name, options in family.models.items():
            print(f"{name} …", file=sys.stderr)
            found.append(check(create(name, options)).geometry)
        pooled = dict.fromkeys(heads[geometry.head] for geometry in found)
        prefixes = dict.fromkeys(str(geometry.prefix) for geometry in found)
        names = ", ".join(f"`{name}`" for name in family.models)
        print(f"| {family.name} | {names} | {', '.join(pooled)} | {', '.join(prefixes)} |")
    print("\n| refused, for example | because |\n|---|---|")
    for name in REFUSED:
        print(f"| `{name}` | {reason(name)} |")
    print(END)


if __name__ == "__main__":
    main()
