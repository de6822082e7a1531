"""Device profiles as data: what they predict, what they refuse, and how they are known again."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsm_tune import schedules
from dsm_tune.errors import PlanError, ProfileError
from dsm_tune.plan import Geometry, Matching, MergePlan, Step
from dsm_tune.profile import FORMAT, DeviceProfile, fingerprint_of

TINY = Geometry((14, 14), 1, 12, 192, 3, 768, 16, 1000, "token")
GRID = (1, 8, 32, 64, 128, 197)
NAMES = ("stem", "head", "attention", "attention_sized", "mlp", "prefix_block", "merge_k",
         "merge_kv", "local", "salience_class", "size_penalty", "prune_norm")  # fmt: skip


def profile(**changes: Any) -> DeviceProfile:
    parts = {name: tuple(0.01 * n for n in GRID) for name in NAMES}
    body: dict[str, Any] = {
        "device": {"name": "cpu", "threads": 2},
        "geometry": TINY,
        "dtype": "float32",
        "batch_size": 1,
        "runtime": "eager",
        "tokens": GRID,
        "parts": {**parts, "stem": (0.5,) * 6, "head": (0.25,) * 6},
    }
    return DeviceProfile(**{**body, **changes})


rising = st.lists(st.floats(0, 5), min_size=6, max_size=6).map(
    lambda steps: tuple(itertools.accumulate(steps))
)


@st.composite
def profiles(draw: Any) -> DeviceProfile:
    parts = {name: draw(rising) for name in NAMES}
    return profile(parts=parts, scale=draw(st.floats(0.5, 2.0)))


# -- JSON -------------------------------------------------------------------------------------


@given(profiles())
def test_a_profile_comes_back_from_its_json(one: DeviceProfile) -> None:
    again = DeviceProfile.from_json(one.to_json())
    assert again == one
    assert again.fingerprint == one.fingerprint


def test_a_profile_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(profile().to_json())
    assert DeviceProfile.load(file) == profile()
    assert DeviceProfile.load(str(file)) == profile()


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "gpu.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ProfileError, match="--device-profile must be a readable file"):
        DeviceProfile.load(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "dsm_tune.profile/2"}, f"a JSON object of the format '{FORMAT}'"),
        ({"sclae": 1.0}, "'sclae' is not a key of a profile; did you mean 'scale'?"),
        ({"geometry": 1}, "malformed"),
        ({"geometry": {"grid": [14, 14]}}, "malformed"),
        ({"tokens": None}, "malformed"),
        ({"tokens": []}, "tokens must be ascending counts"),
        ({"tokens": [8, 1, 32, 64, 128, 197]}, "tokens must be ascending counts"),
        ({"tokens": [1, 1, 32, 64, 128, 197]}, "tokens must be ascending counts"),
        ({"tokens": [0, 8, 32, 64, 128, 197]}, "tokens must be ascending counts"),
        ({"tokens": [1.5, 8, 32, 64, 128, 197]}, "tokens must be ascending counts"),
        ({"tokens": ["1", 8, 32, 64, 128, 197]}, "tokens must be ascending counts"),
        ({"parts": {}}, "parts must hold attention"),
        ({"parts": {"attention": 1}}, "malformed"),
        ({"device": "cpu"}, "device must be a JSON object"),
        ({"scale": "1"}, "scale must be a number"),
        ({"scale": float("nan")}, "scale must be a number"),
        ({"scale": 0}, "scale must be a number"),
        ({"error": -0.1}, "error must be a number"),
        ({"error": None}, "error must be a number"),
    ],
)
def test_a_malformed_profile_is_refused(change: dict[str, Any], said: str) -> None:
    body = {**json.loads(profile().to_json()), **change}
    with pytest.raises(ProfileError) as caught:
        DeviceProfile.from_json(json.dumps(body))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [f.name for f in dataclasses.fields(DeviceProfile)][:7])
def test_every_key_but_scale_and_error_must_be_there(missing: str) -> None:
    body = json.loads(profile().to_json())
    del body[missing]
    with pytest.raises(ProfileError, match=missing):
        DeviceProfile.from_json(json.dumps(body))


@pytest.mark.parametrize(
    "times", [[0.1], [0.1] * 5 + [-1.0], [0.1] * 5 + [float("nan")], ["a"] * 6]
)
def test_times_are_as_many_as_counts_and_never_negative(times: list[Any]) -> None:
    body = json.loads(profile().to_json())
    body["parts"]["mlp"] = times
    with pytest.raises(ProfileError, match=r"parts\.mlp must hold 6 times >= 0"):
        DeviceProfile.from_json(json.dumps(body))


@given(st.text(max_size=40))
def test_any_text_is_a_profile_or_a_profile_error(text: str) -> None:
    with pytest.raises(ProfileError):
        DeviceProfile.from_json(text)


@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(DeviceProfile)]),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
        ),
    )
)
def test_any_values_make_a_profile_that_predicts_or_a_profile_error(change: dict[str, Any]) -> None:
    body = {**json.loads(profile().to_json()), **change}
    try:
        one = DeviceProfile.from_json(json.dumps(body))
    except ProfileError as error:
        said = str(error)
    else:
        said = ""
        assert one.predict(MergePlan("", one.geometry)) >= 0
    assert "\n" not in said


# -- predictions ------------------------------------------------------------------------------


def test_the_dense_model_takes_stem_blocks_and_head() -> None:
    per_block = 2 * 0.01 * 197
    assert profile().predict(MergePlan("", TINY)) == pytest.approx(0.75 + 12 * per_block)
    assert profile(scale=1.5).predict(MergePlan("", TINY)) == pytest.approx(
        1.5 * (0.75 + 12 * per_block)
    )


def test_blocks_of_the_dense_model_may_take_a_time_of_their_own() -> None:
    one = profile(parts={**profile().parts, "block": (5.0,) * 6})
    assert one.predict(MergePlan("", TINY)) == pytest.approx(0.5 + 12 * 5.0 + 0.25)
    for plan in (schedules.tome(TINY, 8), MergePlan("", TINY, last_block="prefix")):
        assert one.predict(plan) == profile().predict(plan)


def test_each_part_of_a_step_is_added_at_the_count_that_enters_its_block() -> None:
    def plan(**matching: Any) -> MergePlan:
        return MergePlan("", TINY, (Step(0, "merge", 97, 7),), Matching(**matching))

    base = profile().predict(plan())
    rest = 11 * (0.01 * 100 + 0.01 * 100)  # eleven blocks of 100 tokens
    first = 0.01 * 197 + 0.01 * 100 + 0.01 * 197 + 0.01 * 197  # attention, mlp, merge_k, local
    assert base == pytest.approx(0.75 + first + rest)
    assert profile().predict(plan(salience=0.3)) == pytest.approx(base + 1.97)
    assert profile().predict(plan(size_penalty=0.1)) == pytest.approx(base + 1.97)
    pruned = MergePlan("", TINY, (Step(0, "prune", 97),))
    assert profile().predict(pruned) == pytest.approx(0.75 + first - 1.97 + rest)


def test_sizes_cost_from_the_first_merge_on_and_only_where_attention_is_proportional() -> None:
    doubled = tuple(0.02 * n for n in GRID)
    one = profile(parts={**profile().parts, "attention_sized": doubled})
    plan = schedules.dsm(TINY, 1, delay=10)
    sized = 0.01 * plan.tokens[11]  # of the last block alone
    plain = dataclasses.replace(plan, proportional_attention=False)
    assert one.predict(plan) == pytest.approx(one.predict(plain) + sized)
    pruned = dataclasses.replace(plan, steps=(Step(10, "prune", 1), Step(11, "prune", 1)))
    assert one.predict(pruned) == profile().predict(pruned)


def test_a_prefix_only_last_block_takes_its_own_time() -> None:
    plan = MergePlan("", TINY, last_block="prefix")
    expected = 0.75 + 11 * 2 * 1.97 + 1.97
    assert profile().predict(plan) == pytest.approx(expected)


@given(profiles(), st.integers(0, 16), st.integers(0, 16))
def test_a_schedule_that_removes_more_is_never_predicted_slower(
    one: DeviceProfile, r: int, more: int
) -> None:
    fewer, most = (one.predict(schedules.dsm(TINY, n, delay=2)) for n in (1 + r, 1 + r + more))
    assert most <= fewer * (1 + 1e-9)


@given(profiles(), st.integers(1, 197))
def test_between_two_counts_the_time_is_between_their_times(one: DeviceProfile, count: int) -> None:
    right = next(i for i, n in enumerate(GRID) if n >= count)
    low, high = one.parts["mlp"][max(right - 1, 0)], one.parts["mlp"][right]
    assert low - 1e-9 <= one._at("mlp", count) <= high + 1e-9
    assert one._at("mlp", GRID[right]) == pytest.approx(high)


def test_a_feature_that_was_not_timed_takes_the_time_of_k() -> None:
    plans = [
        schedules.tome(TINY, 8),
        dataclasses.replace(schedules.tome(TINY, 8), matching=Matching(feature="x")),
    ]
    one = profile()
    assert one.predict(plans[0]) == one.predict(plans[1])


def test_a_plan_of_another_geometry_is_refused() -> None:
    other = dataclasses.replace(TINY, depth=11)
    with pytest.raises(PlanError, match="the profile is for"):
        profile().predict(MergePlan("", other))


def test_a_profile_of_one_count_predicts_the_same_for_any() -> None:
    one = profile(tokens=(197,), parts=dict.fromkeys(NAMES, (1.0,)))
    assert one.predict(MergePlan("", TINY)) == 2 + 12 * 2


# -- what it was made for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"geometry": dataclasses.replace(TINY, width=384)}, "for the geometry"),
        ({"dtype": "float16"}, "for the dtype float32, but got float16"),
        ({"batch_size": 8}, "for the batch size 1, but got 8"),
        ({"runtime": "cudagraphs"}, "for the runtime eager, but got cudagraphs"),
    ],
)
def test_a_model_or_setting_it_was_not_made_for_is_refused(
    change: dict[str, Any], said: str
) -> None:
    asked = {"geometry": TINY, "dtype": "float32", "batch_size": 1, "runtime": "eager"}
    profile().check(**asked)
    with pytest.raises(ProfileError, match=said):
        profile().check(**{**asked, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"device": {"name": "cpu", "threads": 4}},
        {"geometry": dataclasses.replace(TINY, depth=11)},
        {"dtype": "float16"},
        {"batch_size": 2},
        {"runtime": "cudagraphs"},
    ],
)
def test_the_fingerprint_changes_with_what_was_measured(change: dict[str, Any]) -> None:
    assert profile(**change).fingerprint != profile().fingerprint


def test_the_fingerprint_does_not_change_with_the_times() -> None:
    assert profile(scale=1.1, error=0.2).fingerprint == profile().fingerprint
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    assert len(profile().fingerprint) == 16
