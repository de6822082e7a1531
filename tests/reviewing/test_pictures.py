"""What is drawn of tokens: fills, borders, colours."""

from __future__ import annotations

import json
import struct

import hypothesis.strategies as st
import numpy as np
import pytest
import study_builder as build
from hypothesis import given

from dsm_tune.config import TuneConfig
from dsm_tune.reviewing import outcome, pictures
from dsm_tune.reviewing.heatmaps import sinks_on_image
from dsm_tune.reviewing.merged_tokens import Sample, merged_tokens_png
from dsm_tune.reviewing.pictures import DARK, INSET, Panel, encoded, tokens_on_image

Grid = tuple[int, int]


def grids(draw: st.DrawFn) -> pictures.Array:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    cells = draw(st.lists(st.integers(-1, 4), min_size=rows * columns, max_size=rows * columns))
    return np.array(cells).reshape(rows, columns)


@given(st.composite(grids)())
def test_borders_close_and_lie_inside_their_token(groups: pictures.Array) -> None:
    for group in np.unique(groups[groups >= 0]):
        lines = pictures._outline(groups == group)
        ends: dict[tuple[float, float], int] = {}
        for line in lines:
            middle = [(a + b) / 2 for a, b in zip(*line, strict=True)]
            column, row = (int(value) for value in middle)
            assert groups[row, column] == group
            for x, y in line:
                key = round(x, 6), round(y, 6)
                ends[key] = ends.get(key, 0) + 1
        assert all(count % 2 == 0 for count in ends.values())


def test_a_patch_alone_has_four_sides_a_little_inside() -> None:
    lines = pictures._outline(np.array([[True]]))
    near, far = INSET, 1 - INSET
    corners = {(round(x, 6), round(y, 6)) for line in lines for x, y in line}
    assert corners == {(near, near), (near, far), (far, near), (far, far)}


def test_a_merged_token_is_filled_with_its_mean_and_a_pruned_one_is_dark() -> None:
    image = np.zeros((4, 6, 3))
    image[:2, :2] = 1.0
    groups = np.array([[7, 7, 3], [-1, 4, 5]])
    fill = pictures._fill(image, groups)
    assert fill[0, 0].tolist() == fill[0, 1].tolist() == [0.5, 0.5, 0.5, 1.0]
    assert fill[1, 0].tolist() == [*DARK, 1.0]
    assert fill[0, 2, 3] == fill[1, 1, 3] == 0  # the image shows through


@given(st.composite(grids)())
def test_tokens_side_by_side_have_hues_apart(groups: pictures.Array) -> None:
    hues = pictures._hues(groups)
    merged = [g for g in np.unique(groups[groups >= 0]) if (groups == g).sum() > 1]
    assert sorted(hues) == sorted(merged)
    values = list(hues.values())
    pairs = [(a, b) for i, a in enumerate(values) for b in values[:i]]
    assert all(pictures._apart(a, b) > 0.04 for a, b in pairs)  # at most five tokens


@pytest.mark.parametrize("grid", [(1, 1), (3, 7), (24, 24)])
def test_pictures_of_any_grid_are_the_same_bytes_on_every_run(grid: Grid) -> None:
    rows, columns = grid
    image = np.random.default_rng(0).random((rows * 2, columns * 2, 3))
    groups = np.arange(rows * columns).reshape(grid) // 2
    panels = [Panel("image"), Panel("$x_y$", groups, 2)]
    for form in ("png", "svg"):
        first, second = (encoded(tokens_on_image(image, panels, "a", "b"), form) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_sinks_are_named_and_without_one_the_title_says_so(prefix: int) -> None:
    generator = np.random.default_rng(0)
    received, norms = (0.9 + 0.2 * generator.random((3, prefix + 8)) for _ in range(2))
    image = generator.random((4, 8, 3))
    calm = encoded(sinks_on_image(image, received, norms, (2, 4), [0, 2]), "svg")
    assert b"No attention sink" in calm
    received[1, 0] = 40.0
    marked = encoded(sinks_on_image(image, received, norms, (2, 4), [0, 2]), "svg").decode()
    assert (
        f"{'the class token' if prefix else 'a patch'} receives 40× its share in block 1" in marked
    )


@pytest.mark.parametrize("shape", [(28, 28), (224, 224), (518, 518), (208, 272)])
def test_a_kept_image_is_small_and_has_whole_pixels_per_patch(shape: Grid) -> None:
    grid = (shape[0] // 2, shape[1] // 2) if shape[0] == 28 else (shape[0] // 16, shape[1] // 16)
    image = np.random.default_rng(0).random((*shape, 3))
    groups = np.arange(grid[0] * grid[1]).reshape(grid) // 3
    body = json.loads(json.dumps(Sample("a.jpg", image, {2: groups, 5: groups // 2}).to_dict()))
    assert len(json.dumps(body)) < 140_000  # noise is the worst that JPEG can meet
    back = Sample.from_dict(body)
    assert [side % patches for side, patches in zip(back.image.shape, grid, strict=False)] == [0, 0]
    assert max(back.image.shape) <= 224
    assert list(back.groups) == [2, 5]
    assert (back.groups[2] == groups).all()


def test_a_kept_image_looks_like_itself() -> None:
    image = np.linspace(0, 1, 64 * 64 * 3).reshape(64, 64, 3)
    back = Sample.from_dict(Sample("a", image, {0: np.zeros((8, 8), int)}).to_dict())
    assert back.image.shape == image.shape
    assert np.abs(back.image - image).max() < 0.05


def test_samples_are_drawn_below_one_another_and_only_of_the_plan_that_was_chosen() -> None:
    result = build.study()
    assert result.chosen is not None
    groups = np.arange(196).reshape(14, 14) // 2
    samples = [Sample(f"{i}.jpg", np.full((28, 28, 3), 0.5), {2: groups, 9: groups}) for i in "ab"]
    wide, high = struct.unpack(
        ">II", merged_tokens_png(result.chosen.plan, samples, "deit_tiny")[16:24]
    )
    assert wide > 900  # three pictures, side by side
    assert high > 700  # two, one below the other
    config = TuneConfig(budget_gflops=0.9)
    kept = {"plan_digest": result.chosen.plan.digest, "samples": [s.to_dict() for s in samples]}
    assert "merged_tokens.png" in outcome.artifacts(result, [], config, None, kept)
    kept["plan_digest"] = "of another plan"
    assert "merged_tokens.png" not in outcome.artifacts(result, [], config, None, kept)
