"""The similarity curve and the delay that it shows."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from small_vits import KINDS, images_for, small_vit
from torch import Tensor, nn

from dsm_tune.errors import ImagesError
from dsm_tune.merging.halves import attend
from dsm_tune.merging.similarity import (
    delay_stability,
    detect_delay,
    find_transition,
    similarity_curve,
    similarity_curves,
)

DEIT_TINY = [0.257, 0.334, 0.272, 0.290, 0.312, 0.329, 0.327, 0.337, 0.325, 0.324, 0.356, 0.340]


def mean_cosine_by_definition(tokens: Tensor) -> float:
    """The mean of the cosines of all ordered pairs of distinct tokens."""
    n, total = len(tokens), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                a, b = tokens[i].double(), tokens[j].double()
                total += float(a @ b / (a.norm() * b.norm()))
    return total / (n * (n - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_is_the_mean_cosine_of_all_pairs_after_each_attention(kind: str) -> None:
    model = small_vit(kind)
    images = images_for(model, 3)
    expected = []
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for block in model.blocks:
            behind_attention, _ = attend(block, x, None)
            found = [mean_cosine_by_definition(tokens) for tokens in behind_attention]
            expected.append(sum(found) / len(found))
            x = block(x)
    assert similarity_curve(model, images) == pytest.approx(expected, abs=1e-5)
    assert similarity_curve(model, images, batch_size=2) == pytest.approx(expected, abs=1e-5)


def test_the_curve_of_equal_tokens_is_1() -> None:
    model = small_vit("avg")
    with torch.no_grad():
        curve = similarity_curves(_without_places(), torch.ones(1, 3, *model.patch_embed.img_size))
    assert curve.flatten().tolist() == pytest.approx([1.0] * 4)


def _without_places() -> nn.Module:
    import copy

    model = copy.deepcopy(small_vit("avg"))
    model.pos_embed.data.zero_()
    return model


def test_hooks_and_mode_are_as_before_also_after_an_exception() -> None:
    model = small_vit("class")
    images = images_for(model)

    def hooks() -> list[int]:
        return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]

    before = hooks()
    similarity_curve(model, images)
    assert hooks() == before
    with pytest.raises(AssertionError, match="Input height"):
        similarity_curve(model, torch.zeros(1, 3, 3, 3))
    assert hooks() == before
    model.train()
    try:
        similarity_curve(model, images)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8), (3,)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ImagesError, match=r"^images must have the shape \[B, 3, H, W\], but got \["
    ):
        similarity_curve(small_vit("class"), torch.zeros(shape))


def test_the_curve_of_deit_tiny_is_the_documented_one_and_its_delay_is_2(
    deit_tiny: nn.Module, photos: Tensor
) -> None:
    curves = similarity_curves(deit_tiny, photos)
    curve = curves.mean(dim=0).tolist()
    assert curve == pytest.approx(DEIT_TINY, abs=6e-4)
    assert detect_delay(curve) == 2
    stability = delay_stability(curves, resamples=50)
    assert stability[2] >= 0.9
    assert sum(stability.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("curve", "delay"),
    [
        (DEIT_TINY, 2),
        ([0.9, 0.6, 0.3, 0.5, 0.7, 0.9], 2),  # a V
        ([0.9, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 1),
        ([0.5, 0.4, 0.3, 0.2, 0.5, 0.8, 0.8, 0.8], 3),
        ([0.9, 0.6, 0.3, 0.5, 0.45, 0.7, 0.9, 0.95], 2),  # a small dip on the way up
        ([0.9, 0.6, 0.3, 0.5, 0.7, 0.65, 0.7, 0.9], 2),
        ([0.1, 0.6, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9], 2),  # a lower first value is not the delay
        ([0.1, 0.6, 0.45, 0.3, 0.5, 0.7, 0.9, 0.95], 3),
        ([0.9, 0.6, 0.3, 0.5, 0.7, 0.9, 0.8, 0.4], 2),  # a fall in the last blocks
        ([0.9, 0.6, 0.4, 0.5, 0.7, 0.9, 0.5, 0.2], 2),  # even below the delay
        ([0.7, 0.5, 0.3, 0.3, 0.5, 0.7], 2),  # a flat floor: the first block of it
    ],
)
def test_the_delay_is_where_the_converging_phase_begins(curve: list[float], delay: int) -> None:
    assert find_transition(curve) == delay
    assert detect_delay(curve) == delay


@pytest.mark.parametrize(
    "curve",
    [
        [0.1 * i for i in range(12)],
        [0.9 - 0.05 * i for i in range(12)],
        [0.5] * 12,
        [0.5] * 24,
        [0.0] * 32,
        [0.3],
        [0.1, 0.2],
        [0.2, 0.1],
    ],
)
def test_a_curve_without_a_transition_falls_back_to_a_sixth_of_the_depth(
    curve: list[float],
) -> None:
    assert find_transition(curve) is None
    assert detect_delay(curve) == round(len(curve) / 6)


# Sixty-fourths, so that adding and scaling round nothing.
dyadic = st.integers(-64, 64).map(lambda n: n / 64)


@given(st.lists(dyadic, min_size=1, max_size=32), dyadic, st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_a_constant_or_a_positive_factor_does_not_move_the_delay(
    curve: list[float], constant: float, factor: float
) -> None:
    delay = detect_delay(curve)
    assert detect_delay([value + constant for value in curve]) == delay
    assert detect_delay([value * factor for value in curve]) == delay


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
def test_the_delay_is_a_block_and_begins_a_rise(curve: list[float]) -> None:
    delay = detect_delay(curve)
    assert 0 <= delay < len(curve)
    transition = find_transition(curve)
    if transition is not None:
        assert 0 < transition < len(curve) - 1
        assert max(curve[:transition]) > curve[transition] < max(curve[transition + 1 :])


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
)
def test_the_delay_of_any_fall_and_rise_is_its_lowest_block(
    falls: list[int], rises: list[int]
) -> None:
    curve = [float(sum(falls[i:])) for i in range(len(falls) + 1)]
    for rise in rises:
        curve.append(curve[-1] + rise)
    shallow = min(sum(falls), sum(rises)) < 0.25 * max(sum(falls), sum(rises))
    assert find_transition(curve) == (None if shallow else len(falls))


@pytest.mark.parametrize(
    "curve", [[], [float("nan"), 0.2, 0.3], [0.1, float("inf")], [0.1] * 50 + [-float("inf")]]
)
def test_an_empty_or_infinite_curve_is_refused_in_one_line(curve: list[float]) -> None:
    with pytest.raises(
        ImagesError, match=r"^a similarity curve must hold finite numbers, but got [^\n]*$"
    ):
        detect_delay(curve)


def test_stability_follows_the_seed_and_counts_shares() -> None:
    curves = torch.tensor([DEIT_TINY, DEIT_TINY[::-1]], dtype=torch.float64)
    first, same = delay_stability(curves, seed=4), delay_stability(curves, seed=4)
    assert first == same
    assert list(first.values()) == sorted(first.values(), reverse=True)
    assert delay_stability(curves[:1]) == {2: 1.0}
