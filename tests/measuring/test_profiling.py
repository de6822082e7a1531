"""Device profiles as they are measured: what is timed, and what becomes of the times."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch

from dsm_tune import demo, schedules
from dsm_tune.config import TuneConfig
from dsm_tune.errors import ConfigError
from dsm_tune.measuring.confirm import Target, confirm_latency, profile_target
from dsm_tune.measuring.profiling import _calibrate, _calibration_plans, measure_profile
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.plan import FEATURES, Matching, MergePlan
from dsm_tune.profile import DeviceProfile
from dsm_tune.target import measure_device

MODEL = demo.create_model().eval()
GEOMETRY = read_geometry(MODEL)
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def measured(seconds: float = 0.0) -> DeviceProfile:
    ticks = itertools.count()
    return measure_profile(
        MODEL, PIXELS, matchings=[Matching("kv")], seconds=seconds, clock=lambda: next(ticks)
    )


def test_a_profile_names_what_was_measured_and_times_what_steps_may_do() -> None:
    found = measured()
    assert (found.geometry, found.dtype, found.batch_size) == (GEOMETRY, "float32", 2)
    assert found.runtime == "eager"
    assert found.device["threads"] == torch.get_num_threads()
    assert found.tokens[-1] == GEOMETRY.tokens
    wanted = {"attention", "attention_sized", "mlp", "prefix_block", "stem", "head"}
    steps = {"merge_k", "merge_kv", "local", "size_penalty", "norm", "prune_norm", "prune_class"}
    assert wanted | steps <= set(found.parts)
    assert "merge_v" not in found.parts
    assert min(found.parts["attention"]) > 0
    assert DeviceProfile.from_json(found.to_json()) == found


@pytest.mark.parametrize(("of_blocks", "of_steps"), [(1.0, 1.0), (0.8, 2.5), (1.3, 0.5)])
def test_whole_forwards_that_take_other_multiples_for_blocks_and_steps_are_met(
    of_blocks: float, of_steps: float
) -> None:
    counts = (GEOMETRY.tokens // 2, GEOMETRY.tokens)
    steps = ("merge_k", "local", "salience_class", "size_penalty", "norm")
    blocks = ("attention", "attention_sized", "mlp", "prefix_block", "stem", "head")
    parts = dict.fromkeys(blocks, (1.0, 2.0)) | dict.fromkeys(steps, (0.2, 0.3))
    raw = DeviceProfile({"name": "made up"}, GEOMETRY, "float32", 1, "eager", counts, parts)
    truth = {name: tuple(of_blocks * ms for ms in parts[name]) for name in blocks}
    truth |= {name: tuple(of_steps * ms for ms in parts[name]) for name in steps}
    true = dataclasses.replace(raw, parts=truth)
    plans = _calibration_plans(GEOMETRY)
    found = _calibrate(raw, plans, [true.predict(plan) for plan in plans])
    assert found.error < 1e-6
    unseen = schedules.dsm(GEOMETRY, 7, delay=2)
    assert found.predict(unseen) == pytest.approx(true.predict(unseen))


def test_a_profile_of_onnx_runtime_times_the_same_parts_as_an_eager_one() -> None:
    ticks = itertools.count()
    found = measure_profile(
        MODEL, PIXELS, matchings=[], seconds=0.0, runtime="onnx", clock=lambda: next(ticks)
    )
    assert found.runtime == "onnx"
    assert set(found.parts) == set(measured().parts) - {"merge_kv", "block"}
    assert found.device["onnxruntime"]
    assert min(found.parts["attention"]) > 0
    assert found.fingerprint != dataclasses.replace(found, runtime="eager").fingerprint


def test_confirmation_in_onnx_runtime_times_each_plan_beside_dense() -> None:
    target = Target(MODEL, PIXELS, "cpu", "float32", 1, "onnx")
    plans = [MergePlan("", GEOMETRY), schedules.tome(GEOMETRY, 30)]
    device, (dense, tome) = confirm_latency(target, plans, stat="p50", seconds=0.5)
    assert device["onnxruntime"]
    assert dense.latency_ms.ratio_to_dense == 1.0
    assert tome.latency_ms.ratio_to_dense is not None


def test_plans_for_calibration_reach_from_dense_to_few_tokens() -> None:
    plans = _calibration_plans(GEOMETRY)
    assert plans[0].gmacs == MergePlan("", GEOMETRY).gmacs
    costs = [plan.gmacs for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert plans[-1].tokens[-1] < GEOMETRY.tokens / 3


def test_confirmation_times_dense_beside_each_plan_and_bounds_the_ratio() -> None:
    target = Target(MODEL, PIXELS, "cpu", "float32", 1, "eager")
    plans = [MergePlan("", GEOMETRY), schedules.tome(GEOMETRY, 20)]
    device, (dense, tome) = confirm_latency(target, plans, stat="p90", seconds=0.5)
    assert device["threads"] == 1
    assert dense.latency_ms.ratio_to_dense == 1.0
    latency = tome.latency_ms
    assert latency.p50 is not None
    assert latency.p90 is not None
    assert latency.low is not None
    assert latency.high is not None
    assert latency.ratio_to_dense is not None
    assert 0 < latency.p50 <= latency.p90
    assert latency.low <= latency.p90 <= latency.high
    assert tome.ratio_high >= latency.ratio_to_dense
    assert latency.device_p50 is None


def test_the_profile_of_a_target_is_of_its_dtype_and_threads() -> None:
    target = Target(copy.deepcopy(MODEL), PIXELS, "cpu", "bfloat16", 1, "eager")
    found = profile_target(target, [], seconds=0.0)
    assert found.dtype == "bfloat16"
    assert found.device["threads"] == 1


def test_a_runtime_that_the_device_does_not_have_is_refused_before_anything_is_timed() -> None:
    config = TuneConfig(budget_ms=1, device="cpu", runtime="cudagraphs")
    said: list[str] = []
    with pytest.raises(ConfigError, match="accepted are eager, onnx"):
        measure_device(config, said.append)
    assert not said


def test_a_profile_for_any_tune_holds_every_feature() -> None:
    config = TuneConfig(budget_ms=1, device="cpu", threads=1)
    found = measure_device(config, lambda _: None)
    assert {f"merge_{name}" for name in FEATURES if name != "random"} <= set(found.parts)
