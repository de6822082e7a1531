"""What the papers print: settings and figures of tables and figures, as data.

A figure stands here only where it is known as printed; all others are left out, and the output
says so. GMACs are kept as text, so that the digits that were printed are known.
"""

from __future__ import annotations

import dataclasses

__all__ = ["ITEMS", "NAMES", "PAPER", "Item", "Printed", "Recipe", "Row"]

PAPER = "Heo et al., Training-Free Acceleration of ViTs with Delayed Spatial Merging (2303.02331)"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the plan of a row follows from a model.

    Attributes:
        kind: ``dense``, ``merge``, ``prune``, or ``other`` for a model without tokens.
        r: tokens per block from the delay on; ``None`` by ``share`` or ``portion``.
        portion: of patches / depth, that r is where neither r nor a share is given.
        share: of the dense model's GMACs; r is then the number that comes nearest.
        delayed: whether blocks before D are dense.
        local: T, blocks that merge inside windows.
        feature: what is compared or, of a prune, whose length counts.
    """

    kind: str = "merge"
    r: int | None = None
    portion: float = 1.0
    share: float | None = None
    delayed: bool = True
    local: int = 3
    feature: str = "k"


@dataclasses.dataclass(frozen=True)
class Printed:
    """What stands in print.

    Attributes:
        gmacs: giga multiply-adds, with the digits that are printed.
        top1: ImageNet-1k, in percent.
        where: it stands.
    """

    gmacs: str | None = None
    top1: float | None = None
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table, or one point of a figure.

    Attributes:
        label: in words.
        recipe: of its plan.
        model: timm name of the paper's; empty in a figure, which is drawn of the models given.
        printed: beside it.
    """

    label: str
    recipe: Recipe
    model: str = ""
    printed: Printed = Printed()


@dataclasses.dataclass(frozen=True)
class Item:
    """A table or a figure of the paper.

    Attributes:
        name: on the command line.
        title: what it shows.
        rows: with the paper's settings and models.
        swept: recipes with no r of their own: one row more for each r that is asked for.
        is_timed: whether speed belongs to it.
        picture: how it is drawn; empty for a table.
        notes: what a reader must know.
    """

    name: str
    title: str
    rows: tuple[Row, ...] = ()
    swept: tuple[Recipe, ...] = ()
    is_timed: bool = False
    picture: str = ""
    notes: tuple[str, ...] = ()


DENSE = Recipe("dense")
TOME, DELAYED = Recipe(delayed=False, local=0), Recipe(local=0)
SPATIAL, DSM = Recipe(delayed=False), Recipe()

DEIT_S, VIT_B = "deit_small_patch16_224", "vit_base_patch16_224"
DENSE_S = 4.60  # GMACs of DeiT-S, that shares are taken of
TABLE_1 = "DSM, table 1"
SPATIAL_1 = Printed("2.8", 79.3, TABLE_1)
TEXT = "DSM and ToMe, GMACs of the model"
OWN = "each method's own paper, at matched GMACs"
ABSENT = "What the paper prints in this {} is not at hand: nothing stands beside what is computed."
FIT = "≈ before r: it is not printed; the one whose GMACs come nearest to print is taken."


def at(recipe: Recipe, **changes: object) -> Recipe:
    """A recipe with some settings changed."""
    return dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]


def _table_1() -> tuple[Row, ...]:
    return (
        Row("dense", DENSE, DEIT_S, Printed("4.6", 79.8, TABLE_1)),
        Row("ToMe", at(TOME, r=13), DEIT_S, Printed("2.70", None, "ToMe")),
        Row("ToMe", at(TOME, share=2.8 / DENSE_S), DEIT_S, Printed("2.8", 78.9, OWN)),
        Row("delayed only", at(DELAYED, share=2.8 / DENSE_S), DEIT_S),
        Row(
            "spatial only", at(SPATIAL, share=2.8 / DENSE_S), DEIT_S, Printed("2.8", 79.3, TABLE_1)
        ),
        Row("DSM", at(DSM, share=2.9 / DENSE_S), DEIT_S, Printed("2.9", 79.6, OWN)),
        Row("DSM", at(DSM, share=2.5 / DENSE_S), DEIT_S, Printed("2.5", 78.6, TABLE_1)),
    )


def _features(kind: str) -> tuple[Row, ...]:
    names = {"random": "random", "x": "X", "k": "K", "q": "Q", "v": "V"}
    return tuple(
        Row(f"{kind}, {name}", at(DELAYED, kind=kind, feature=feature), DEIT_S)
        for feature, name in names.items()
    )


def _sizes() -> tuple[Row, ...]:
    """Dense and DSM from Tiny to Huge; r is that of ViT-B, scaled to patches and depth."""
    printed = {DEIT_S: "4.60", VIT_B: "17.56", "vit_large_patch16_224": "61.55"}
    tome = {DEIT_S: "2.70", VIT_B: "10.37"}
    names = ["deit_tiny_patch16_224", *printed, "vit_huge_patch14_224"]
    names += ["vit_base_patch16_384", "vit_large_patch16_384"]
    rows = []
    for name in names:
        rows.append(Row("dense", DENSE, name, Printed(printed.get(name), None, TEXT)))
        if name in tome:
            rows.append(Row("ToMe", at(TOME, r=13), name, Printed(tome[name], None, "ToMe")))
        dsm = Printed("14.46", None, "DSM, table 2") if name == VIT_B else Printed()
        rows.append(Row("DSM", at(DSM, portion=0.5), name, dsm))
    return tuple(rows)


OTHERS = {
    "EfficientNet-B2": "efficientnet_b2",
    "EfficientNet-B3": "efficientnet_b3",
    "ResNet-152": "resnet152",
    "RegNetY-4G": "regnety_040",
}
ITEMS = (
    Item(
        "table1",
        "Table 1. Delay, windows and both on DeiT-S",
        _table_1(),
        notes=(
            FIT,
            "DynamicViT, SPViT, A-ViT, E-ViT and ATS, with which the paper compares, are trained; "
            "their printed figures are not at hand.",
        ),
    ),
    Item(
        "table2",
        "Table 2. DSM over r on ViT-B",
        (
            Row("dense", DENSE, VIT_B, Printed("17.56", None, "DSM, table 2")),
            Row("DSM", at(DSM, r=8), VIT_B, Printed("14.46", None, "DSM, table 2")),
        ),
        swept=(DSM,),
        is_timed=True,
        notes=(
            "Printed: at batch size 1, r = 4 is slower than dense. "
            "Other figures in print (other r, top-1, speed) are not at hand.",
        ),
    ),
    Item(
        "table4",
        "Table 4. Pruning by the length of five features, from D on",
        (
            Row("dense", DENSE, DEIT_S),
            *_features("prune"),
            Row("merge, K", DELAYED, DEIT_S),
        ),
        notes=(ABSENT.format("table"),),
    ),
    Item(
        "table5",
        "Table 5. Merging by the likeness of five features, from D on",
        (Row("dense", DENSE, DEIT_S), *_features("merge")),
        notes=(ABSENT.format("table"),),
    ),
    Item(
        "table6",
        "Table 6. Convolutional models beside DeiT-S",
        (
            Row("dense", DENSE, DEIT_S, Printed("4.6", 79.8, TABLE_1)),
            Row("DSM", at(DSM, share=2.5 / DENSE_S), DEIT_S, Printed("2.5", 78.6, TABLE_1)),
            *(Row(label, Recipe("other"), name) for label, name in OTHERS.items()),
        ),
        is_timed=True,
        notes=(
            FIT,
            "What is printed of convolutional models is not at hand; RegNetY is taken at 4 G.",
        ),
    ),
    Item(
        "table7",
        "Table 7. Tiny to Huge, 224 and 384 pixels",
        _sizes(),
        notes=(
            "D is depth / 6, r is patches / (2 · depth): 8 on ViT-B, as printed. "
            "Which models and r the table has besides, and its top-1, are not at hand.",
        ),
    ),
    Item("figure1", "Figure 1. Attention sinks on an image, some blocks", picture="sinks"),
    Item("figure2", "Figure 2. Similarity curves", picture="together"),
    Item(
        "figure4",
        "Figure 4. ToMe and DSM over r",
        (Row("dense", DENSE),),
        swept=(TOME, DSM),
        is_timed=True,
        picture="cost",
        notes=("Printed: up to 1.8× fewer GMACs at 1.6× the throughput, an efficiency of 0.89.",),
    ),
    Item(
        "figure5",
        "Figure 5. Two trainings of one model over r",
        (Row("dense", DENSE),),
        swept=(DSM,),
        picture="r",
        notes=(
            "The paper compares a SAM-trained ViT-B with a plain one: "
            "--model vit_base_patch16_224.sam_in1k=FILE --model vit_base_patch16_224=FILE",
        ),
    ),
    Item(
        "figure6",
        "Figure 6. DSM over T, its blocks with windows",
        (Row("dense", DENSE), *(Row("DSM", at(DSM, local=t)) for t in (0, 1, 2, 3, 4, 5, 7))),
        picture="t",
        notes=("Printed: T = 3 is the sweet spot.",),
    ),
    Item("figure7", "Figure 7. Merged tokens on an image", picture="merged"),
    Item("figure8", "Figure 8. Similarity curves, model by model", picture="apart"),
    Item("figure9", "Figure 9. Attention sinks on an image, more blocks", picture="more_sinks"),
    Item("figure10", "Figure 10. Windows on an image", picture="windows"),
)
NAMES = tuple(item.name for item in ITEMS)
