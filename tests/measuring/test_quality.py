"""Divergence, agreement, accuracy, and the intervals that go with them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dsm_tune.measuring.quality import bootstrap_interval, compare

NO_LABELS = torch.tensor([-1, -1])


def test_divergence_is_kl_from_dense_to_merged_in_nats() -> None:
    dense = torch.tensor([[0.0, 0.0], [0.0, torch.log(torch.tensor(3.0))]])
    merged = torch.tensor([[0.0, torch.log(torch.tensor(3.0))], [0.0, 0.0]])
    found = compare(dense, merged, NO_LABELS, classes=2).divergence
    half = torch.tensor([0.5, 0.5]).double()
    tilted = torch.tensor([0.25, 0.75]).double()
    expected = [
        float((half * (half / tilted).log()).sum()),
        float((tilted * (tilted / half).log()).sum()),
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-7)
    assert expected[0] != pytest.approx(expected[1])


@given(st.integers(0, 1000), st.floats(-50.0, 50.0))
def test_divergence_is_never_negative_and_does_not_see_a_shift_of_all_logits(
    seed: int, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense, merged = torch.randn(2, 5, 7, generator=generator).unbind(0)
    labels = torch.full((5,), -1)
    found = compare(dense, merged, labels, classes=7).divergence
    assert (found >= 0).all()
    moved = compare(dense, merged.double() + shift, labels, classes=7).divergence
    assert torch.allclose(found, moved, atol=1e-9)
    assert compare(dense, dense, labels, classes=7).divergence.max() == 0


def test_agreement_is_the_same_first_class_and_accuracy_counts_labelled_images_only() -> None:
    dense = torch.eye(8)[:4]
    merged = torch.eye(8)[[0, 1, 3, 3]] + torch.linspace(0.0, 0.1, 8)
    labels = torch.tensor([0, 2, 3, -1])
    found = compare(dense, merged, labels, classes=8).summary()
    assert found.agreement == 0.75
    assert found.top1 == pytest.approx(2 / 3)  # images 0 and 2
    assert found.top5 == pytest.approx(2 / 3)  # class 2 is not among the five of image 1


def test_without_labels_there_is_no_accuracy_and_without_classes_it_is_the_cosine() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    turned = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    found = compare(features, turned, NO_LABELS, classes=0)
    assert found.divergence.tolist() == [0.0, 1.0]
    assert found.summary().top1 is None
    assert found.summary(1).divergence == 0.0


@given(st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=30), st.integers(0, 5))
def test_an_interval_lies_within_the_values_and_is_the_same_for_a_seed(
    values: list[float], seed: int
) -> None:
    sample = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_interval(sample, seed=seed, resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == bootstrap_interval(sample, seed=seed, resamples=200)


def test_intervals_of_the_mean_hold_it_about_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(200, 60, generator=generator).double()
    edges = [bootstrap_interval(sample, resamples=400) for sample in samples]
    assert 0.88 <= sum(low <= 0 <= high for low, high in edges) / 200 <= 0.99


def test_more_values_make_the_interval_narrower() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1600, generator=generator).double()
    few, many = (bootstrap_interval(values[:n]) for n in (100, 1600))
    assert many[1] - many[0] == pytest.approx((few[1] - few[0]) / 4, rel=0.35)
