"""`draw` makes a picture of any image, grid and plan, or says in one line why not."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Ended, contents

from dsm_tune import demo
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.plan import Matching, MergePlan, Step

Call = Callable[..., Ended]


def size_of(file: str) -> tuple[int, int]:
    content = Path(file).read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize(
    ("what", "form"),
    [("merged", "png"), ("windows", "svg"), ("sinks", "png"), ("sinks", "svg"), ("curve", "svg")],
)
def test_each_picture_is_drawn_of_the_demo(call: Call, what: str, form: str) -> None:
    ended = call("draw", what, "-o", f"a.{form}", "--index", "5")
    assert (ended.code, ended.out) == (0, ""), ended
    if form == "png":
        assert min(size_of("a.png")) > 300
    else:
        assert ElementTree.fromstring(Path("a.svg").read_bytes()).tag.endswith("svg")


def test_an_image_of_ones_own_is_drawn_on_a_grid_that_is_not_square(
    call: Call, photographs: Path
) -> None:
    image = ("--image", str(photographs / "3.jpg"), "--model", "test_vit")
    wide = call("draw", "-o", "w.png", *image, "--model-kwargs", '{"img_size": [96, 192]}')
    tall = call("draw", "-o", "t.png", *image, "--model-kwargs", '{"img_size": [192, 96]}')
    assert wide.code == tall.code == 0, (wide, tall)
    assert "depth / 6; --images has a folder to read D from" in wide.err
    assert size_of("w.png")[0] / size_of("w.png")[1] > size_of("t.png")[0] / size_of("t.png")[1]


def test_a_plan_that_prunes_and_ends_with_the_prefix_is_drawn(call: Call) -> None:
    steps = Step(1, "merge", 30, 7), Step(2, "prune", 40), Step(3, "merge", 20)
    geometry = read_geometry(demo.create_model())
    plan = MergePlan("", geometry, steps, Matching(), last_block="prefix")
    Path("plan.json").write_text(plan.to_json())
    for what in ("merged", "windows"):
        ended = call("draw", what, "-o", f"{what}.png", "--plan", "plan.json", "--blocks", "1,4")
        assert ended.code == 0, ended
    assert "107 of 197 tokens" in ended.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--output must be given"),
        (["-o", "a.gif"], "--output must end in .png or .svg, but got 'a.gif'"),
        (["mergd", "-o", "a.png"], "WHAT must be one of merged, windows, sinks, curve, but got"),
        (["-o", "no/a.png"], "--output must be a file that can be written"),
        (["-o", "a.png", "--index", "548"], "--index must be from 0 to 547, but got 548"),
        (["-o", "a.png", "--index", "-1"], "--index must be >= 0 and without --image"),
        (["-o", "a.png", "--blocks", "5"], "--blocks must be from 0 to 4, but got 5"),
        (["-o", "a.png", "--blocks", "1;2"], "--blocks must be integers >= 0 between commas"),
        (["-o", "a.png", "--method", "pitome"], "--method must be one of tome, dsm, but got"),
        (["-o", "a.png", "--r", "0"], "--r must be an integer >= 1, but got 0"),
        (["-o", "a.png", "--window", "0"], "window must be an integer >= 1, but got 0"),
        (["-o", "a.png", "--image", "no.jpg"], "an image must be readable, but no.jpg: not a file"),
        (["-o", "a.png", "--image", "text.jpg"], "not an image of the formats JPEG"),
        (["-o", "a.png", "--inflection", "1"], "--inflection must not be given: it changes noth"),
        (["sinks", "-o", "a.png", "--r", "3"], "--r must not be given: it changes nothing of the"),
        (["curve", "-o", "a.png", "--blocks", "3"], "--blocks must not be given"),
        (["-o", "a.png", "--plan", "a.json", "--delay", "3"], "nothing of a --plan, which says"),
        (["-o", "a.png", "--model", "test_vit"], "--images must name a folder"),
        (["-o", "a.png", "--plan", "no.json"], "--plan must be a readable file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    call: Call, arguments: list[str], expected: str
) -> None:
    Path("text.jpg").write_text("no image")
    before = contents(Path.cwd())
    assert expected in call("draw", "-q", *arguments).error
    assert contents(Path.cwd()) == before
