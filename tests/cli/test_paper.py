"""`paper` redoes the DSM paper's tables and figures, and says which cells it cannot fill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import REPOSITORY, Ended, contents
from safetensors.torch import save_file

from dsm_tune.cli.paper_tables import write_paper
from dsm_tune.paper.printed import ITEMS, NAMES
from dsm_tune.plan import MergePlan

Call = Callable[..., Ended]
SHARED = REPOSITORY.parent / "shared" / "data"


def rows_of(document: Any, name: str, of: str = "paper") -> list[dict[str, Any]]:
    (item,) = [one for one in document["items"] if one["name"] == name]
    return [row for section in item["sections"] if section["of"] == of for row in section["rows"]]


def labelled(photographs: Path) -> Path:
    rows = [f"{number}.jpg,{number}\n" for number in range(6)]
    (photographs / "labels.csv").write_text("file,label\n" + "".join(rows))
    return photographs


def trained(file: str, seed: int = 0) -> str:
    """Weights of timm's model for tests, as if they were somebody's."""
    torch.manual_seed(seed)
    save_file(timm.create_model("test_vit").state_dict(), file)
    return f"test_vit={file}"


def test_gmacs_meet_print_without_any_weights(call: Call) -> None:
    ended = call("paper", "table1", "table2", "table7", "--json", "-q")
    assert ended.code == 0, ended
    met = 0
    for name in ("table1", "table2", "table7"):
        for row in rows_of(ended.json, name):
            assert MergePlan.from_dict(row["plan"]).gmacs == row["gmacs"]
            assert (row["quality"], row["timing"], row["needs"]) == (None, None, "weights")
            in_print = row["printed"]["gmacs"]
            if in_print is None:
                assert row["deviation"] is None
                continue
            met += 1
            assert row["deviation"] == pytest.approx(row["gmacs"] / float(in_print) - 1)
            if not row["r_is_fitted"]:  # settings in print: within 0.5 %, or the printed digits
                half = 0.5 * 10.0 ** -len(in_print.partition(".")[2])
                assert abs(row["gmacs"] - float(in_print)) <= max(half, 0.005 * float(in_print))
            else:  # the whole r that comes nearest
                assert abs(row["deviation"]) < 0.02
    assert met == 6 + 2 + 6


def test_every_table_and_figure_fits_eighty_columns_and_says_what_it_lacks(call: Call) -> None:
    ended = call("paper")
    assert ended.code == 0, ended
    assert max(map(len, ended.out.splitlines())) <= 80
    for item in ITEMS:
        assert item.title in ended.out
    lines = ended.out.splitlines()
    for figure in [item for item in ITEMS if item.picture]:
        assert "needs weights and images" in lines[lines.index(figure.title) + 2]
    assert "needs weights" in next(line for line in lines if line.startswith("ResNet-152"))
    assert "is not at hand" in ended.out
    assert "50,000 validation" in ended.out


def printed_as_text(document: Any, capfd: pytest.CaptureFixture[str]) -> str:
    """What a terminal of eighty columns shows of a document."""
    capfd.readouterr()
    write_paper(document)
    text = capfd.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    return text


@pytest.mark.parametrize(
    "items",
    [
        ("table1", "figure2", "figure4", "figure6"),
        pytest.param(NAMES, marks=pytest.mark.slow),
    ],
)
def test_items_are_redone_on_a_model_of_ones_own(
    call: Call, capfd: pytest.CaptureFixture[str], items: tuple[str, ...]
) -> None:
    few = ("--model", "dsm_tune_demo", "--count", "8", "--r", "9,18", "-q")
    ended = call("paper", *items, *few, "--json", "-o", "a/b")
    assert ended.code == 0, ended
    document = ended.json
    (facts,) = document["models"]
    assert (facts["images"], facts["delay_from"]) == (8, "similarity curve")
    for item in document["items"]:
        own = [row for row in rows_of(document, item["name"], "given") if row["kind"] != "other"]
        if not own:
            assert item["curves"] or item["picture"], item["name"]
            continue
        assert own[0]["kind"] == "dense"
        assert own[0]["quality"]["divergence"] == own[0]["quality"]["top1_change"] == 0
        assert len(own) > 1
        for row in own[1:]:
            quality = row["quality"]
            assert quality["divergence_low"] <= quality["divergence"] <= quality["divergence_high"]
            assert quality["top1_change_low"] <= quality["top1_change"]
            assert row["deviation"] is None  # print is of another model
    own = rows_of(document, "table1", "given")
    spatial = next(row for row in own if row["label"] == "spatial only")
    assert spatial["printed"]["share"] == pytest.approx(2.8 / 4.6)
    assert spatial["share"] == pytest.approx(2.8 / 4.6, abs=0.02)
    assert spatial["printed"]["top1_change"] == pytest.approx(-0.5)
    swept = rows_of(document, "figure6", "given")[1:]
    assert [row["local_blocks"] for row in swept] == [0, 1, 2, 3, 4, 5, 7]
    assert len({row["gmacs"] for row in swept}) == 1
    drawn = {one["name"]: one["file"] for one in document["items"] if one["picture"]}
    assert drawn.pop("figure5", None) is None  # there is one training only
    assert set(contents(Path.cwd())) == set(drawn.values())
    for file in drawn.values():
        assert Path(file).read_bytes().startswith(b"\x89PNG\r\n")
    assert "a/b/figure6.png" in printed_as_text(document, capfd)


def test_random_weights_have_a_curve_that_says_so_and_no_quality(
    call: Call, photographs: Path
) -> None:
    images = ("--model", "test_vit", "--images", str(photographs))
    ended = call("paper", "figure2", "figure6", "figure8", *images, "-o", ".", "--format", "svg")
    assert ended.code == 0, ended
    assert "random weights: its D means nothing" in Path("figure2.svg").read_text()
    assert "random weights: its D means nothing" in Path("figure8.svg").read_text()
    assert "needs weights\n" in ended.out  # figure 6
    assert "divergence" not in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80


def test_two_trainings_of_one_model_are_drawn_beside_each_other(
    call: Call, photographs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models = [part for seed in (1, 2) for part in ("--model", trained(f"{seed}.safetensors", seed))]
    images = ("--images", str(labelled(photographs)), "--r", "2,4")
    ended = call("paper", "figure5", *models, *images, "-o", "out", "--json")
    assert ended.code == 0, ended
    assert [one["model"] for one in ended.json["models"]] == ["test_vit (1)", "test_vit (2)"]
    rows = rows_of(ended.json, "figure5", "given")
    assert [row["r"] for row in rows] == [None, 2, 4] * 2
    assert Path("out/figure5.png").is_file()
    assert "drawn in out/figure5.png" in printed_as_text(ended.json, capfd)


def test_unlabelled_images_judge_all_but_top1(call: Call, photographs: Path) -> None:
    model = ("--model", trained("a.safetensors"), "--images", str(photographs))
    ended = call("paper", "table4", *model)
    assert ended.code == 0, ended
    assert "needs labels" in ended.out
    assert "divergence" in ended.out


def test_speed_is_timed_in_turn_where_it_is_asked_for(call: Call) -> None:
    quick = ("--speed", "--runs", "3", "--batch-size", "2", "--threads", "1", "--r", "20")
    ended = call("paper", "table2", "--model", "dsm_tune_demo", "--count", "8", *quick, "--json")
    assert ended.code == 0, ended
    dense, *merged = rows_of(ended.json, "table2", "given")
    assert dense["timing"]["speedup"] == 1
    for row in merged:
        timing = row["timing"]
        assert timing["efficiency"] == pytest.approx(timing["speedup"] * row["share"])
    assert ended.json["speed"]["runs"] == 3
    assert all(row["timing"] is None for row in rows_of(ended.json, "table2"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["table3"], "ITEM must be one of table1, table2, table4"),
        (["figur2"], "but got 'figur2'; did you mean 'figure2'"),
        (["--model", "deit_tinny"], "--model must be a timm model, but got 'deit_tinny'"),
        (["--model", "swin_tiny_patch4_window7_224"], "cannot be merged: its class is Swin"),
        (["--model", "test_vit="], "--model must be NAME or NAME=FILE, but got 'test_vit='"),
        (["--model", "test_vit=no.pth"], "--checkpoint must be a file, but got 'no.pth'"),
        (
            ["--model", "test_vit", "--model", "test_vit"],
            "must not name the same model and weights",
        ),
        (["--checkpoint", "a.pth"], "--checkpoint must belong to one --model without a file"),
        (["--model", "dsm_tune_demo=a"], "has its own weights and takes no file"),
        (["--model", "resnet152"], "must also name a Vision Transformer, but got resnet152 alone"),
        (["--images", "."], "--images must be given with a --model"),
        (["--count", "5"], "--count must be given with a --model"),
        (["--pretrained"], "--pretrained must be given with a --model"),
        (["--model", "dsm_tune_demo", "--count", "0"], "--count must be from 1 to"),
        (["--r", "0"], "--r must be integers >= 1"),
        (["--runs", "9"], "--runs must be given with --speed alone"),
        (["--speed", "--runs", "1"], "--runs must be from 3 to"),
        (["--format", "svg"], "--format must be one of png, svg, with -o, but got 'svg'"),
        (["-o", "text.jpg"], "--output must be a file that can be written"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    call: Call, arguments: list[str], expected: str
) -> None:
    Path("text.jpg").write_text("no folder")
    before = contents(Path.cwd())
    item = () if arguments[0] in ("table3", "figur2") else ("table2",)
    assert expected in call("paper", "-q", *item, *arguments).error
    assert contents(Path.cwd()) == before


@pytest.mark.slow
def test_table_1_of_a_real_model_orders_as_the_readme_says(call: Call) -> None:
    weights = SHARED / "deit_tiny_patch16_224.safetensors"
    if not weights.is_file():
        pytest.skip(f"needs the shared DeiT-Ti weights, and there is no {weights}")
    model = ("--model", f"deit_tiny_patch16_224={weights}", "--images", str(SHARED / "photos"))
    ended = call("paper", "table1", "table7", "figure2", *model, "--count", "128", "--json", "-q")
    assert ended.code == 0, ended
    (facts,) = ended.json["models"]
    assert (facts["delay"], facts["delay_from"]) == (2, "similarity curve")
    dense, dsm = rows_of(ended.json, "table7")[:2]  # the paper's rows of this model
    assert dense["quality"]["top1"] == pytest.approx(0.876, abs=0.06)
    assert 0 < dsm["quality"]["divergence"] < 0.03
    own = rows_of(ended.json, "table1", "given")
    by_cost = sorted((row for row in own if row["label"] == "DSM"), key=lambda row: -row["gmacs"])
    assert by_cost[0]["quality"]["divergence"] < by_cost[1]["quality"]["divergence"] < 0.5
