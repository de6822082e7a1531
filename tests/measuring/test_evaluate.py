"""What a plan is worth on a set of images, and that nothing that is kept changes it."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dsm_tune import demo, schedules
from dsm_tune.measuring.evaluate import Evaluator
from dsm_tune.measuring.quality import PerImage, compare
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.merged import merged
from dsm_tune.plan import Matching, MergePlan, Step

BATCH = 4
MODEL = demo.create_model().eval()
GEOMETRY = read_geometry(MODEL)
ROOM = GEOMETRY.tokens * GEOMETRY.width * 4  # bytes of one image's tokens


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    pixels, labels = demo.load_split("search")
    return pixels[:10], labels[:10]  # the last batch is not full


def evaluator(cache_bytes: int = 1 << 30) -> Evaluator:
    return Evaluator(MODEL, *images(), batch_size=BATCH, cache_bytes=cache_bytes)


def by_hand(plan: MergePlan) -> PerImage:
    """The same batches, from the images, with nothing kept."""
    pixels, labels = images()
    with torch.inference_mode():
        dense = torch.cat([MODEL(batch) for batch in pixels.split(BATCH)])
        with merged(MODEL, plan) as fast:
            outputs = torch.cat([fast(batch) for batch in pixels.split(BATCH)])
    return compare(dense, outputs, labels, classes=GEOMETRY.classes)


def bits(found: PerImage) -> list[list[float]]:
    return [getattr(found, name).tolist() for name in ("divergence", "agrees", "hit1", "hit5")]


@st.composite
def plans(draw: st.DrawFn) -> MergePlan:
    first = draw(st.integers(0, GEOMETRY.depth - 1))
    end = draw(st.sampled_from(["all", "prefix"]))
    blocks = range(first, GEOMETRY.depth - (end == "prefix"))
    kinds = st.sampled_from(["merge", "merge", "prune"])
    windows = st.sampled_from([None, 4])
    steps = [Step(b, draw(kinds), draw(st.integers(0, 9)), draw(windows)) for b in blocks]
    matching = Matching(
        feature=draw(st.sampled_from(["k", "kv", "x", "random"])),
        salience=draw(st.sampled_from([0.0, 0.3])),
    )
    return MergePlan("", GEOMETRY, tuple(steps), matching, last_block=end)


@settings(max_examples=15)
@given(st.lists(plans(), min_size=1, max_size=3), st.sampled_from([0, 10 * ROOM, 30 * ROOM]))
def test_what_is_kept_changes_no_bit_of_any_plan_whatever_came_before(
    some: list[MergePlan], cache_bytes: int
) -> None:
    shared = evaluator(cache_bytes)
    for plan in some:
        assert bits(shared.evaluate(plan)) == bits(by_hand(plan))


@given(st.integers(1, 10))
def test_a_few_images_give_what_they_give_among_all(count: int) -> None:
    plan = schedules.dsm(GEOMETRY, 6, delay=2)
    few, every = evaluator().evaluate(plan, count), evaluator().evaluate(plan)
    assert few.divergence.tolist() == every.divergence[:count].tolist()


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_kept_tokens_stay_within_their_room(levels: int) -> None:
    shared = evaluator(cache_bytes=levels * 10 * ROOM)
    for first in (3, 1, 2, 4):
        shared.evaluate(MergePlan("", GEOMETRY, (Step(first, "merge", 5),)))
    kept = shared._kept.values()
    assert len({block for block, _ in shared._kept}) == levels
    assert sum(x.numel() * x.element_size() for x in kept) == levels * 10 * ROOM


def test_tokens_of_a_level_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, plan = evaluator(), MergePlan("", GEOMETRY, (Step(2, "merge", 5),))
    first = shared.evaluate(plan)

    def refuse(*_: object) -> None:
        raise AssertionError("the images are gone through once more")

    monkeypatch.setattr(shared, "_pixels", refuse)
    assert bits(shared.evaluate(plan)) == bits(first)


def test_dense_outputs_from_elsewhere_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = evaluator().dense_outputs()
    other, plan = evaluator(), schedules.tome(GEOMETRY, 5)
    other.know_dense(outputs)
    monkeypatch.setattr(other, "dense_batch", None)
    assert bits(other.evaluate(plan)) == bits(by_hand(plan))


def test_the_plan_that_removes_nothing_agrees_with_dense_in_every_bit() -> None:
    found = evaluator().evaluate(MergePlan("", GEOMETRY))
    assert found.divergence.tolist() == [0.0] * 10
    assert found.agrees.all()
