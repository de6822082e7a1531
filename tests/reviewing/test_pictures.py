"""What is drawn of tokens: fills, borders, colours."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from dsm_tune.reviewing import pictures
from dsm_tune.reviewing.heatmaps import sinks_on_image
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
