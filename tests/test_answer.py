"""From what a study stores to its answer: what is feasible, on the front, and chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dsm_tune import schedules
from dsm_tune.answer import Answer, profile_of
from dsm_tune.config import TuneConfig
from dsm_tune.measuring.profiling import describe_device
from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.profile import DeviceProfile
from dsm_tune.results import Evaluation, Fault, LatencyMs, Result
from dsm_tune.searching.budget import Limits
from dsm_tune.searching.study import Record
from dsm_tune.target import TargetDevice, predict_latency

GEOMETRY = Geometry((6, 6), 1, 4, 32, 2, 64, 4, 10, "token")
DENSE = MergePlan("toy", GEOMETRY)
PLANS = [DENSE, *(schedules.tome(GEOMETRY, r) for r in (2, 4, 6))]
DENSE_MS, IMAGES = 10.0, 8

PROFILE = DeviceProfile(
    device={"name": "cpu"},
    geometry=GEOMETRY,
    dtype="float32",
    batch_size=1,
    runtime="eager",
    tokens=(1, 37),
    parts={"stem": (2.0, 2.0), "head": (0.0, 0.0), "merge_k": (0.0, 0.0)}
    | dict.fromkeys(("attention", "attention_sized", "mlp"), (0.0, 1.0)),
)


def answer(limits: Limits, timed: dict[MergePlan, float] | None = None, **changes: Any) -> Answer:
    """A study of dense and three plans, of which some were timed: milliseconds by plan."""
    stored = {}
    for plan, ms in (timed or {}).items():
        latency = LatencyMs(ms, ms, ms, ms * 0.98, ms * 1.02, None, ms / DENSE_MS)
        result = Result(plan, plan.gmacs, latency_ms=latency, divergence=divergence(plan))
        ratio_high = ms / DENSE_MS * 1.02
        stored[plan.digest] = {"result": result.to_dict(), "ratio_high": ratio_high}
    facts = {
        "config": {"latency_stat": "p50", "batch_size": 1, "model": "toy"},
        "limits": dataclasses.asdict(limits),
        "dense_digest": DENSE.digest,
        "dense_ms": DENSE_MS,
        "profile": PROFILE.to_json(),
        "confirmed": stored,
        "status": "running",
        **changes,
    }
    records = [
        Record(number, 0, number, "", {}, plan, {IMAGES: Evaluation(IMAGES, divergence(plan))})
        for number, plan in enumerate(PLANS)
    ]
    complete = [dataclasses.replace(record, state="complete") for record in records]
    return Answer("toy", facts, complete, limits)


def divergence(plan: MergePlan) -> float:
    return 0.01 * sum(plan.removed)


def test_the_profile_predicts_what_the_tests_below_rely_on() -> None:
    predicted = [PROFILE.predict(plan) for plan in PLANS]
    assert predicted[0] == pytest.approx(DENSE_MS)
    assert predicted == sorted(predicted, reverse=True)


def test_before_the_confirmation_the_front_is_what_is_predicted_to_be_within_the_budget() -> None:
    limits = Limits(ms=PROFILE.predict(PLANS[2]))
    assert [result.plan for result in answer(limits).front()] == [PLANS[3], PLANS[2]]


def test_after_it_the_front_holds_what_was_measured_within_the_budget() -> None:
    limits = Limits(ms=8.0)
    found = answer(limits, {DENSE: 10.0, PLANS[2]: 8.1, PLANS[3]: 7.0}, status="done")
    assert [result.plan for result in found.front()] == [PLANS[3]]
    assert found.choose(found.front()) == found.front()[0]


def test_a_plan_whose_interval_reaches_over_the_budget_is_not_feasible() -> None:
    confirmed = {DENSE: 10.0, PLANS[3]: 7.9}  # its upper end is 8.06
    assert answer(Limits(ms=8.0), confirmed, status="done").front() == []
    assert len(answer(Limits(ms=8.1), confirmed, status="done").front()) == 1


def test_a_share_of_dense_is_judged_on_the_ratio_of_one_run() -> None:
    confirmed = {DENSE: 30.0, PLANS[3]: 7.0}  # the machine had slowed down: no absolute time counts
    assert len(answer(Limits(ms=8.0, ms_share=0.8), confirmed, status="done").front()) == 1
    assert answer(Limits(ms=8.0, ms_share=0.7), confirmed, status="done").front() == []


@pytest.mark.parametrize("share", [None, 0.8])
def test_misprediction_is_the_median_of_measured_over_predicted(share: float | None) -> None:
    factors = dict(zip(PLANS[1:], (1.1, 1.5, 1.2), strict=True))
    confirmed = {plan: f * PROFILE.predict(plan) / 1.02 for plan, f in factors.items()}
    found = answer(Limits(ms=8.0, ms_share=share), {DENSE: 10.0, **confirmed})
    assert found.misprediction() == pytest.approx(1.2)


def test_nothing_is_mispredicted_where_no_plan_that_removes_tokens_was_timed() -> None:
    assert answer(Limits(ms=8.0)).misprediction() is None
    assert answer(Limits(ms=8.0), {DENSE: 12.0}).misprediction() is None
    gmacs_only = answer(Limits(gmacs=1.0), {DENSE: 10.0, PLANS[1]: 9.0}, profile=None)
    assert gmacs_only.misprediction() is None


def test_corrections_scale_what_the_profile_of_a_study_predicts() -> None:
    facts = answer(Limits(ms=8.0), corrections=[1.5, 1.2]).facts
    corrected = profile_of(facts)
    assert corrected is not None
    for plan in PLANS:
        assert corrected.predict(plan) == pytest.approx(1.8 * PROFILE.predict(plan))
    assert profile_of({**facts, "profile": None}) is None


def test_a_latency_that_could_only_be_predicted_must_leave_room_for_the_profiles_error() -> None:
    careful = dataclasses.replace(PROFILE, error=0.1)
    predicted = careful.predict(PLANS[3])
    (one,) = predict_latency(careful, [PLANS[3]])
    result = Result(PLANS[3], PLANS[3].gmacs, latency_ms=one.latency_ms, divergence=0.1)
    stored = {PLANS[3].digest: {"result": result.to_dict(), "ratio_high": one.ratio_high}}
    for budget, expected in [(predicted * 1.09, 0), (predicted * 1.11, 1)]:
        found = answer(
            Limits(ms=budget), profile=careful.to_json(), confirmed=stored, status="done"
        )
        assert len(found.front()) == expected


@pytest.mark.parametrize(("name", "elsewhere"), [("NVIDIA H200", True), (None, False)])
def test_a_profile_of_another_device_is_known_as_such(
    name: str | None, elsewhere: bool, tmp_path: Path
) -> None:
    here = describe_device(torch.device("cpu"))
    device = here if name is None else {"name": name, "cuda": "13.0", "torch": "2.15"}
    file = tmp_path / "device.json"
    file.write_text(dataclasses.replace(PROFILE, device=device).to_json())
    config = TuneConfig(budget_ms=5.0, device="cpu", device_profile=str(file))
    assert TargetDevice(config).is_elsewhere is elsewhere
    assert TargetDevice(TuneConfig(budget_ms=5.0, device="cpu")).is_elsewhere is False


def test_faults_are_told_in_one_order_and_failed_trials_by_the_last_ones_cause() -> None:
    noted = {"store": {"count": 2, "detail": "refused"}, "worker": {"count": 3, "detail": ""}}
    found = answer(Limits(gmacs=1.0), faults=noted)
    assert found.faults() == [Fault("worker", 3), Fault("store", 2, "refused")]
    failed = [
        dataclasses.replace(record, state="failed", why=f"MemoryError {record.number}")
        for record in found.records[1:]
    ]
    found = dataclasses.replace(found, records=[found.records[0], *failed])
    assert found.faults()[2:] == [Fault("trial", 3, "trial 3: MemoryError 3")]


def test_a_study_without_faults_tells_none() -> None:
    assert answer(Limits(gmacs=1.0)).faults() == []
