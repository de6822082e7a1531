"""The search: the same trials however it is run, interrupted or crashed, and what they come to."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
import small_search as small
from hypothesis import given, settings
from optuna.trial import TrialState

from dsm_tune.plan import MergePlan
from dsm_tune.results import Evaluation
from dsm_tune.searching import samplers
from dsm_tune.searching.budget import Cost, Limits
from dsm_tune.searching.pareto import non_dominated
from dsm_tune.searching.search import Progress, Search
from dsm_tune.searching.study import Study

SAMPLERS = ("tpe_equal_cost", "tpe", "nsga2", "random", "gp")
slow_storage = settings(max_examples=5)


@contextmanager
def fresh_url() -> Iterator[str]:
    with TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/studies.db"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Search:
    url = f"sqlite:///{tmp_path_factory.mktemp('undisturbed')}/studies.db"
    return small.drive(small.open_search(url))


# -- reproducible by construction -------------------------------------------------------------


@slow_storage
@given(workers=st.integers(1, 6), data=st.data())
def test_the_trials_do_not_depend_on_how_many_run_at_once_nor_which_ends_first(
    workers: int, data: st.DataObject, undisturbed: Search
) -> None:
    with fresh_url() as url:
        search = small.drive(
            small.open_search(url),
            workers=workers,
            pick=lambda count: data.draw(st.integers(0, count - 1)),
        )
        assert small.story(search) == small.story(undisturbed)
        assert small.front(search) == small.front(undisturbed)


@slow_storage
@given(data=st.data())
def test_the_trials_do_not_depend_on_how_far_ahead_they_are_drawn(
    data: st.DataObject, undisturbed: Search
) -> None:
    with fresh_url() as url:
        search = small.open_search(url)

        def preparing(plan: MergePlan, images: int) -> Evaluation:
            for _ in range(data.draw(st.integers(0, 5))):
                search.prepare()
            return small.evaluate(plan, images)

        small.drive(search, preparing, workers=data.draw(st.integers(1, 3)))
        assert small.story(search) == small.story(undisturbed)


def test_a_trial_is_given_out_before_the_next_one_is_drawn(url: str) -> None:
    search = small.open_search(url)
    known = len(search.records())
    while (job := search.next()) is not None and job.number < known:
        search.report(job, small.evaluate(job.plan, job.images))
    assert job is not None
    assert len(search.records()) == known + 1
    search.prepare()
    assert len(search.records()) == known + 2
    second = search.next()
    assert second is not None
    assert second.number == job.number + 1
    assert len(search.records()) == known + 2


def test_another_seed_gives_other_trials(url: str, undisturbed: Search) -> None:
    other = small.story(small.drive(small.open_search(url, seed=1)))
    assert other != small.story(undisturbed)
    assert other[:5] == small.story(undisturbed)[:5]  # what is known does not depend on it


@slow_storage
@given(data=st.data(), workers=st.integers(1, 4))
def test_a_stopped_search_that_is_opened_anew_gives_the_same_trials(
    data: st.DataObject, workers: int, undisturbed: Search
) -> None:
    with fresh_url() as url:
        for _ in range(data.draw(st.integers(1, 3))):
            search = small.open_search(url)
            left = data.draw(st.integers(0, 20))

            def stopping(
                plan: MergePlan, images: int, search: Search = search, left: int = left
            ) -> Evaluation:
                nonlocal ran
                ran += 1
                if ran >= left:
                    search.stop("interrupted")
                return small.evaluate(plan, images)

            ran = 0
            small.drive(search, stopping, workers=workers)
        search = small.drive(small.open_search(url))
        assert small.story(search) == small.story(undisturbed)
        assert small.front(search) == small.front(undisturbed)


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory) -> int:
    url = f"sqlite:///{tmp_path_factory.mktemp('writes')}/studies.db"
    with small.crash_at(-1, after=True) as count:
        small.drive(small.open_search(url))
    return count[0]


@settings(max_examples=8)
@given(data=st.data(), after=st.booleans())
def test_a_search_that_crashes_at_any_write_goes_on_with_the_same_trials(
    data: st.DataObject, after: bool, writes: int, undisturbed: Search
) -> None:
    with fresh_url() as url:
        write = data.draw(st.integers(1, writes))
        with small.crash_at(write, after=after), pytest.raises(small.Crash):
            small.drive(small.open_search(url), workers=2)
        search = small.drive(small.open_search(url), workers=2)
        assert small.story(search) == small.story(undisturbed)
        assert small.front(search) == small.front(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_a_search_that_crashes_at_each_write_in_turn_goes_on_with_the_same_trials(
    after: bool, writes: int, undisturbed: Search
) -> None:
    for write in range(1, writes + 1):
        with fresh_url() as url:
            with small.crash_at(write, after=after), pytest.raises(small.Crash):
                small.drive(small.open_search(url))
            assert small.story(small.drive(small.open_search(url))) == small.story(undisturbed)


def test_nothing_that_was_stored_is_evaluated_again(url: str) -> None:
    done: list[tuple[str, int]] = []

    def counting(plan: MergePlan, images: int) -> Evaluation:
        done.append((plan.digest, images))
        return small.evaluate(plan, images)

    writes = itertools.count(15, 12)
    for _ in range(30):
        try:
            with small.crash_at(next(writes), after=True):
                search = small.drive(small.open_search(url), counting)
        except small.Crash:
            continue
        break
    assert len({r.number for r in search.records()}) == 14
    assert len(done) == len(set(done))


@pytest.mark.parametrize("sampler", [pytest.param("gp", marks=pytest.mark.slow), *SAMPLERS[:-1]])
def test_every_sampler_gives_distinct_plans_within_the_budget_and_the_same_again(
    sampler: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "STARTUP", 4)
    planner, trials = small.planner(small.space(sampler=sampler)), 19

    def run(url: str, *, stops: tuple[int, ...] = ()) -> Search:
        for stop in stops:
            search = small.open_search(url, planner=planner, trials=trials)
            for _ in range(stop):
                job = search.next()
                assert job is not None
                search.report(job, small.evaluate(job.plan, job.images))
        return small.drive(small.open_search(url, planner=planner, trials=trials), workers=3)

    search = run(url)
    drawn = [r for r in search.records() if r.generation]
    assert max(r.generation for r in drawn) == 3
    assert all(search.planner.limits.admit(search.cost_of(r)) for r in drawn)
    assert len({r.plan.digest for r in search.records()}) == trials
    again = run(f"sqlite:///{tmp_path}/again.db", stops=(9, 8))
    assert small.story(again) == small.story(search)


# -- generations ------------------------------------------------------------------------------


def test_generation_0_is_what_is_known_dense_tome_and_dsm_first(undisturbed: Search) -> None:
    known = [r for r in undisturbed.records() if r.generation == 0]
    labels = [r.label for r in known]
    assert labels[:3] == ["dense", "tome", "dsm"]
    assert {"tome-decreasing", "dsm-delay-0", "dsm-delay-2", "enqueued-0"} <= set(labels)
    assert not any(known[0].plan.removed)
    assert all(r.state == "complete" for r in known[:3])  # what others are compared with
    assert [r.slot for r in known] == list(range(len(known)))


@pytest.mark.parametrize("trials", [1, 3, 5, 7, 9, 14])
def test_as_many_distinct_plans_are_tried_as_were_asked_for(url: str, trials: int) -> None:
    search = small.drive(small.open_search(url, trials=trials))
    digests = {r.plan.digest for r in search.records()}
    assert (
        len(digests) == len(search.records()) == max(trials, 3)
    )  # the references are always there
    assert not search.stopped


def test_no_plan_is_tried_twice(undisturbed: Search) -> None:
    digests = [r.plan.digest for r in undisturbed.records()]
    assert len(digests) == len(set(digests)) == 14


def test_what_is_known_is_thinned_out_too_but_for_dense_tome_and_dsm(undisturbed: Search) -> None:
    known = [r for r in undisturbed.records() if r.generation == 0]
    assert [sorted(r.evaluations) for r in known[:3]] == [[small.IMAGES]] * 3
    others = [r.state for r in known[3:]]
    assert others.count("complete") == math.ceil(len(others) / 2)
    assert others.count("pruned") == len(others) // 2


def test_a_generation_is_thinned_out_before_it_spends_all_images(undisturbed: Search) -> None:
    for generation in (1, 2):
        members = [r for r in undisturbed.records() if r.generation == generation]
        whole = [r for r in members if r.state == "complete"]
        assert len(whole) == math.ceil(len(members) / 2)
        for record in members:
            assert sorted(record.evaluations) == ([10, 40] if record in whole else [10])
        for record in members:
            if record.state == "pruned":
                assert record.why == "not among the best of its generation on 10 images"


def test_those_that_go_on_are_not_dominated_by_those_that_do_not(undisturbed: Search) -> None:
    for generation in (1, 2):
        members = [r for r in undisturbed.records() if r.generation == generation]
        points = {
            r.number: (undisturbed.objectives(r)[0], r.evaluations[10].divergence) for r in members
        }
        stopped = [r.number for r in members if r.state == "pruned"]
        for record in members:
            for other in stopped if record.state == "complete" else []:
                a, b = points[other], points[record.number]
                assert not (a != b and a[0] <= b[0] and a[1] <= b[1])


def test_a_space_with_one_point_ends_normally_when_it_is_exhausted(url: str) -> None:
    alone = small.space(f'format = "{small.FORMAT}"\n[search]\ngeneration = 4\n')
    search = small.drive(small.open_search(url, planner=small.planner(alone), trials=30))
    assert search.finished
    assert search.stopped == "no further distinct plan meets the budget"
    assert len(search.records()) < 30
    assert all(r.state == "complete" for r in search.records())
    again = small.open_search(url, planner=small.planner(alone), trials=30)
    assert small.story(again) == small.story(search)
    assert again.finished


def test_a_small_space_is_searched_whole(url: str) -> None:
    text = f'format = "{small.FORMAT}"\n[matching]\nfeature = ["k", "q", "v", "x"]\n'
    search = small.drive(
        small.open_search(url, planner=small.planner(small.space(text)), trials=40)
    )
    features = {r.plan.matching.feature for r in search.records() if any(r.plan.removed)}
    assert features == {"k", "q", "v", "x"}
    assert search.stopped


def test_more_trials_continue_a_finished_study(url: str) -> None:
    first = small.story(small.drive(small.open_search(url, trials=11)))
    more = small.story(small.drive(small.open_search(url, trials=19)))
    assert more[:11] == first
    assert len(more) == 19


def test_a_stopped_search_gives_out_no_job_but_takes_what_runs(url: str) -> None:
    search = small.open_search(url)
    job = search.next()
    assert job is not None
    search.stop("time limit reached")
    search.stop("interrupted")
    assert search.stopped == "time limit reached"
    assert search.next() is None
    assert not search.finished
    search.report(job, small.evaluate(job.plan, job.images))
    assert search.finished
    assert search.records()[job.number].evaluations


def test_a_stopped_search_asks_no_further_generation(url: str) -> None:
    search = small.open_search(url)
    jobs = []
    while (job := search.next()) is not None:
        jobs.append(job)
    search.stop("interrupted")
    for job in jobs:
        search.report(job, small.evaluate(job.plan, job.images))
    assert search.finished
    assert {r.generation for r in search.records()} == {0}
    assert all(r.evaluations for r in search.records())


def test_a_job_that_is_given_back_comes_again_first(url: str) -> None:
    search = small.open_search(url)
    first = search.next()
    assert first is not None
    search.give_back(first)
    assert search.next() == first


def test_progress_counts_up_and_its_hypervolume_never_falls(url: str) -> None:
    seen: list[Progress] = []
    search = small.drive(small.open_search(url, on_progress=seen.append), workers=2)
    assert [p.done for p in seen] == list(range(1, 15))
    assert {p.trials for p in seen} == {14}
    volumes = [p.hypervolume for p in seen[2:]]  # from when both references are known
    assert volumes == sorted(volumes)
    assert 0 < volumes[-1] < 1
    best = [p.best_divergence for p in seen if p.best_divergence is not None]
    assert best == sorted(best, reverse=True)
    merged = [search.objectives(r)[1] for r in search.front() if any(r.plan.removed)]
    assert best[-1] == min(merged)


# -- trials that fail -------------------------------------------------------------------------


def failing(which: int, **result: Any) -> small.Evaluate:
    """Every ``which``-th plan gives this result."""

    def evaluate(plan: MergePlan, images: int) -> Evaluation:
        if int(plan.digest, 16) % which == 0:
            return Evaluation(images, **result)
        return small.evaluate(plan, images)

    return evaluate


@pytest.mark.parametrize(
    ("result", "why"),
    [
        ({"error": "RuntimeError: out of memory"}, "RuntimeError: out of memory"),
        ({"divergence": math.nan}, "divergence must be a finite number, but got nan"),
        ({"divergence": math.inf}, "divergence must be a finite number, but got inf"),
    ],
)
def test_a_failed_trial_keeps_its_cause_and_is_never_on_the_front(
    url: str, result: dict[str, Any], why: str
) -> None:
    search = small.drive(small.open_search(url, trials=20), failing(3, **result), workers=2)
    failed = [r for r in search.records() if r.state == "failed"]
    assert failed
    assert all(r.why == why for r in failed)
    assert all(int(r.plan.digest, 16) % 3 == 0 for r in failed)
    assert not {r.number for r in failed} & {r.number for r in search.front()}
    assert len(search.records()) == 20
    assert search.hypervolume() >= 0
    reopened = small.open_search(url, trials=20)
    assert small.story(reopened) == small.story(search)
    assert small.front(reopened) == small.front(search)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_whose_trials_all_fail_ends_with_an_empty_front(url: str, sampler: str) -> None:
    planner = small.planner(small.space(sampler=sampler))
    search = small.drive(small.open_search(url, planner=planner), failing(1, error="no"))
    assert {r.state for r in search.records()} == {"failed"}
    assert search.front() == []
    assert search.hypervolume() == 0.0


def test_a_trial_that_fails_only_on_all_images_failed(url: str) -> None:
    def evaluate(plan: MergePlan, images: int) -> Evaluation:
        return small.evaluate(plan, images) if images < 40 else Evaluation(images, error="late")

    search = small.drive(small.open_search(url), evaluate)
    assert {r.state for r in search.records() if r.generation} == {"pruned", "failed"}
    assert search.front() == []


# -- the front, and what Optuna makes of it ---------------------------------------------------


def test_the_front_holds_complete_feasible_mutually_non_dominated_trials(
    undisturbed: Search,
) -> None:
    able = [
        r
        for r in undisturbed.records()
        if r.state == "complete" and undisturbed.planner.limits.admit(undisturbed.cost_of(r))
    ]
    points = [undisturbed.objectives(r) for r in able]
    found = undisturbed.front()
    assert [r.number for r in found] == [able[i].number for i in non_dominated(points)]
    assert found
    assert not any(r.label == "dense" for r in found)  # it is over the budget
    assert not any(r.state == "pruned" for r in found)
    costs = [undisturbed.objectives(r)[0] for r in found]
    assert costs == sorted(costs)


def test_optuna_sees_the_same_front_states_and_constraints(undisturbed: Search) -> None:
    seen = undisturbed.study.optuna_study
    assert seen.metric_names == ["divergence", "cost"]
    assert {t.number for t in seen.best_trials} == {r.number for r in undisturbed.front()}
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    for record, trial in zip(undisturbed.records(), seen.trials, strict=True):
        assert trial.number == record.number
        assert trial.state == states[record.state]
        assert trial.datetime_complete is not None
        if record.state == "complete":
            cost, divergence = undisturbed.objectives(record)
            assert trial.values == [divergence, cost]
            excess = undisturbed.planner.limits.excess(undisturbed.cost_of(record))
            assert trial.constraints == {"budget": excess}
        for name, value in trial.params.items():
            assert record.params[name] == value


def test_dense_is_tried_but_infeasible_to_optuna_too(undisturbed: Search) -> None:
    trial = undisturbed.study.optuna_study.trials[0]
    assert trial.constraints["budget"] == pytest.approx(1 / small.SHARE - 1)


def test_a_budget_that_dense_meets_puts_dense_on_the_front(url: str) -> None:
    limits = dataclasses.replace(small.planner(share=1.1).limits)
    targets = dataclasses.replace(limits, gmacs=0.75 * MergePlan("", small.GEOMETRY).gmacs)
    planner = dataclasses.replace(small.planner(), limits=limits, targets=targets, by_gmacs=True)
    search = small.drive(small.open_search(url, planner=planner))
    assert any(r.label == "dense" for r in search.front())
    assert len(search.front()) > 1


def test_what_computes_no_more_than_the_head_reads_is_known_where_it_meets_the_budget() -> None:
    dense = MergePlan("toy", small.GEOMETRY)
    lossless = small.planner(share=0.99).known()["dense-prefix"]
    assert not any(lossless.removed)
    assert lossless.gmacs < dense.gmacs
    assert "dense-prefix" not in small.planner(share=lossless.gmacs / dense.gmacs - 0.01).known()
    averaging = dataclasses.replace(small.GEOMETRY, head="avg")
    assert "dense-prefix" not in dataclasses.replace(small.planner(), geometry=averaging).known()


@pytest.mark.parametrize("fits", [True, False])
def test_a_reference_that_cannot_meet_the_budget_removes_tokens_all_the_same(fits: bool) -> None:
    def cost_of(plan: MergePlan) -> Cost:  # as on a small model, where merging does not pay
        return Cost(plan.gmacs, 3.0 + 2.0 * len(plan.active_steps))

    dense = MergePlan("toy", small.GEOMETRY)
    limits = Limits(ms=4.0 if fits else 2.0)
    targets = dataclasses.replace(limits, gmacs=0.75 * dense.gmacs) if fits else limits
    planner = dataclasses.replace(
        small.planner(), limits=limits, targets=targets, cost_of=cost_of, by_gmacs=fits
    )
    for label in ("tome", "dsm"):
        plan = planner.known()[label]
        assert any(plan.removed)
        assert not fits or 0.7 * dense.gmacs < plan.gmacs <= 0.75 * dense.gmacs


def test_another_budget_tries_first_what_is_known_under_it_and_repeats_nothing(url: str) -> None:
    small.drive(small.open_search(url, trials=10))
    before = {r.number: r.plan.digest for r in Study.load(url, "small").records()}
    begun = max(r.generation for r in Study.load(url, "small").records()) + 1
    evaluated: list[str] = []

    def evaluate(plan: MergePlan, images: int) -> Evaluation:
        evaluated.append(plan.digest)
        return small.evaluate(plan, images)

    tighter = small.planner(share=0.5)
    search = small.open_search(url, trials=22, planner=tighter, known_at=[0, begun])
    small.drive(search, evaluate)
    after = {r.number: r for r in search.records()}
    assert {n: after[n].plan.digest for n in before} == before
    assert not set(evaluated) & set(before.values())
    first = [r for r in search.records() if r.generation == begun]
    known = {plan.digest for plan in tighter.known().values()}
    assert {r.label for r in first} >= {"tome", "dsm"}
    assert {r.plan.digest for r in first if r.label[:4] in ("tome", "dsm", "dsm-")} <= known
    assert len(after) == 22
    drawn = [r for n, r in after.items() if n >= 10 and r.label not in ("tome", "dsm")]
    assert len(drawn) >= 10
    assert all(tighter.limits.excess(search.cost_of(r)) <= 0 for r in drawn)


def test_a_study_is_read_by_others_while_it_runs(url: str) -> None:
    search = small.open_search(url)
    job = search.next()
    assert job is not None
    search.report(job, small.evaluate(job.plan, job.images))
    reader = Study.load(url, "small")
    assert [r.plan.digest for r in reader.records()] == [r.plan.digest for r in search.records()]
    assert reader.records()[job.number].latest == small.evaluate(job.plan, job.images)
    small.drive(search)
    assert {r.state for r in reader.records()} == {"complete", "pruned"}
