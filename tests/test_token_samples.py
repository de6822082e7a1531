"""The patches of a token, traced through a plan on real images of the demo."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsm_tune.config import TuneConfig
from dsm_tune.inputs import Inputs, load_inputs
from dsm_tune.merging.published import dsm_plan
from dsm_tune.reviewing.merged_tokens import Sample
from dsm_tune.token_samples import patch_groups, spread, token_samples


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return load_inputs(TuneConfig(budget_gflops="60%"))


def test_each_image_has_as_many_tokens_after_a_block_as_the_plan_says(inputs: Inputs) -> None:
    plan = dsm_plan(inputs.model, r=20, delay=1, window=7)
    groups = patch_groups(inputs.model, plan, inputs.holdout.pixels[:3])
    assert len(groups) == plan.geometry.depth
    for block, of_block in enumerate(groups):
        assert of_block.shape == (3, 14, 14)
        for image in of_block:
            left = plan.tokens[0] - sum(plan.removed[: block + 1])
            assert plan.geometry.prefix + len(np.unique(image)) == left


def test_three_held_out_images_are_kept_with_their_names(inputs: Inputs) -> None:
    plan = dsm_plan(inputs.model, r=20, delay=1, window=7)
    kept = json.loads(json.dumps(token_samples(inputs, plan)))
    assert kept["plan_digest"] == plan.digest
    samples = [Sample.from_dict(body) for body in kept["samples"]]
    assert tuple(one.name for one in samples) == inputs.holdout.names[:3]
    groups = patch_groups(inputs.model, plan, inputs.holdout.pixels[:3])
    for row, sample in enumerate(samples):
        assert list(sample.groups) == spread([step.block for step in plan.active_steps])
        for block, of_block in sample.groups.items():
            assert (of_block == groups[block][row]).all()


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [0]), (4, [0, 1, 2, 3]), (12, [0, 4, 7, 11])]
)
def test_blocks_are_shown_from_the_first_to_the_last(count: int, expected: list[int]) -> None:
    assert spread(range(count)) == expected
