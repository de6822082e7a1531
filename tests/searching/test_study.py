"""The study's storage, and the samplers that see its trials through a mirror."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import small_search as small
from hypothesis import given
from hypothesis import strategies as st

from dsm_tune.errors import StudyError
from dsm_tune.plan import MergePlan
from dsm_tune.results import Evaluation
from dsm_tune.searching import samplers
from dsm_tune.searching.samplers import Mirror, derive_seed
from dsm_tune.searching.space import FORMAT, SAMPLERS
from dsm_tune.searching.store import study_names
from dsm_tune.searching.study import Record, Study


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db"


PLAN = MergePlan("toy", small.GEOMETRY)
RECORD = Record(-1, 0, 0, "dense", {}, PLAN)


# -- storage ----------------------------------------------------------------------------------


def test_facts_are_kept_with_the_study(url: str) -> None:
    made = Study.create(url, "one", {"delay": 2, "curve": [0.5, None], "limits": {"gmacs": 1.0}})
    made.put("delay", 3)
    found = Study.load(url, "one")
    assert found.facts == {"delay": 3, "curve": [0.5, None], "limits": {"gmacs": 1.0}}
    assert found.name == "one"
    assert study_names(url) == ["one"]


def test_a_record_comes_back_as_it_was_stored(url: str) -> None:
    made, space = Study.create(url, "one", {}), small.space()
    params = space.complete({"feature": "v", "slope": 0.1})
    drawn = Record(-1, 1, 2, "", params, PLAN, redrawn={"duplicate": 1, "unfit": 0})
    first, second = made.add(RECORD, space), made.add(drawn, space)
    assert (first.number, second.number) == (0, 1)
    evaluation = Evaluation(10, 0.1 + 0.2, 0.9, None, None, 1.5)
    made.store(1, evaluation)
    made.close(1, "pruned", values=None, excess=-0.1, why="not among the best")
    made.close(0, "complete", values=(0.0, 1.0), excess=0.3, why="")
    zero, one = Study.load(url, "one").records()
    assert zero == Record(0, 0, 0, "dense", {}, PLAN, state="complete")
    assert one.params == params
    assert one.evaluations == {10: evaluation}
    assert (one.state, one.why, one.redrawn) == ("pruned", "not among the best", drawn.redrawn)


@pytest.mark.parametrize("state", ["complete", "pruned", "failed"])
def test_a_trial_that_crashed_while_it_was_closed_can_be_closed_again(url: str, state: str) -> None:
    values = (0.1, 1.0) if state == "complete" else None
    for write in (1, 2, 3):
        name = f"study {write}"
        made = Study.create(url, name, {})
        made.add(RECORD, small.space())
        try:
            with small.crash_at(write, after=True):
                made.close(0, state, values=values, excess=-0.5, why="because")
        except small.Crash:
            found = Study.load(url, name)
            if found.records()[0].state == "running":
                found.close(0, state, values=values, excess=-0.5, why="because")
        found = Study.load(url, name)
        assert found.records()[0].state == state
        assert found.optuna_study.trials[0].constraints == (
            {"budget": -0.5} if state == "complete" else {}
        )


def test_a_name_is_taken_once(url: str) -> None:
    Study.create(url, "one", {})
    with pytest.raises(StudyError, match="the study 'one' exists already"):
        Study.create(url, "one", {})


def test_an_unknown_study_is_refused_with_a_suggestion(url: str) -> None:
    Study.create(url, "demo-60%", {})
    with pytest.raises(StudyError, match=r"no study 'demo-6%'.*did you mean 'demo-60%'\?"):
        Study.load(url, "demo-6%")


def test_reading_makes_no_file(tmp_path: Path, url: str) -> None:
    with pytest.raises(StudyError, match="there is no study store at"):
        Study.load(url, "one")
    assert study_names(url) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["studies.db", "", "://", "nonsense://x"])
def test_what_is_no_database_url_is_refused_in_one_line(bad: str) -> None:
    with pytest.raises(StudyError) as caught:
        Study.create(bad, "one", {})
    assert "\n" not in str(caught.value)


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="must be readable and writable"):
        Study.create(f"sqlite:///{tmp_path}/no/such/folder/x.db", "one", {})
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one" * 20)
    with pytest.raises(StudyError, match="must be readable and writable"):
        Study.create(f"sqlite:///{tmp_path}/text.db", "one", {})


def test_a_password_is_never_shown() -> None:
    with pytest.raises(StudyError) as caught:
        Study.create("postgresql://me:secret@127.0.0.1:1/x", "one", {})
    assert "secret" not in str(caught.value)


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4))
def test_a_derived_seed_depends_on_all_its_parts(parts: list[int]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 1 << 32
    assert derive_seed(*parts) == seed
    assert derive_seed(*parts, 0) != seed
    assert derive_seed(parts[0] + 1, *parts[1:]) != seed


# -- samplers ---------------------------------------------------------------------------------

TWO = f"""
format = "{FORMAT}"
[reduction]
slope = [-1.0, 1.0]
bump = [-1.0, 1.0]
cost_share = [0.8, 1.0]
[search]
generation = 6
"""


def told(count: int, seed: int = 0) -> list[tuple[dict[str, Any], tuple[float, float]]]:
    """Trials of a smooth problem; its Pareto set has ``slope`` from 0 to 0.5, ``bump`` = 0.3."""
    dice, found = random.Random(seed), []
    for _ in range(count):
        params = {
            "slope": dice.uniform(-1, 1),
            "bump": dice.uniform(-1, 1),
            "cost_share": dice.uniform(0.8, 1),
        }
        off = (params["bump"] - 0.3) ** 2
        found.append((params, (params["slope"] ** 2 + off, (params["slope"] - 0.5) ** 2 + off)))
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_draw_depends_on_the_seed_and_on_what_was_told_only(sampler: str) -> None:
    space, some = small.space(TWO, sampler=sampler), told(18)
    mirror = Mirror(space, some)
    first = mirror.draw(1)
    assert mirror.draw(2) != first
    assert mirror.draw(1) == first  # the draws before it leave no trace
    assert Mirror(space, some).draw(1) == first
    assert (Mirror(space, told(18, seed=1)).draw(1) == first) == (sampler == "random")
    assert all(kind.admits(first[name]) for name, kind in space.parameters.items())


@pytest.mark.parametrize("generation", [1, 2, 6])
def test_nsga2_breeds_from_the_trials_it_was_told(generation: int) -> None:
    space, some = small.space(TWO, sampler="nsga2", generation=generation), told(24)
    mirror = Mirror(space, some)
    drawn = [mirror.draw(seed) for seed in range(20)]
    inherited = [
        any(params[name] == parent[name] for parent, _ in some)
        for params in drawn
        for name in ("slope", "bump", "cost_share")
    ]
    assert 0.4 < sum(inherited) / len(inherited) < 1.0  # and about one in three mutates


def test_nsga2_breeds_from_the_best() -> None:
    space, some = small.space(TWO, sampler="nsga2"), told(60)
    drawn = [Mirror(space, some).draw(seed) for seed in range(20)]
    parents = [p for p, _ in some if any(p["bump"] == child["bump"] for child in drawn)]
    spread = sum(abs(p["bump"] - 0.3) for p in parents) / len(parents)
    everyone = sum(abs(p["bump"] - 0.3) for p, _ in some) / len(some)
    assert spread < 0.6 * everyone


@pytest.mark.parametrize("sampler", ["tpe_equal_cost", "tpe", "gp"])
def test_a_model_of_the_space_draws_closer_to_the_front_than_chance(sampler: str) -> None:
    space, some = small.space(TWO, sampler=sampler), told(60)
    mirror = Mirror(space, some)
    draws = 6 if sampler == "gp" else 30
    off = [abs(mirror.draw(seed)["bump"] - 0.3) for seed in range(draws)]
    chance = [abs(mirror.draw(seed, at_random=True)["bump"] - 0.3) for seed in range(30)]
    assert sum(off) / len(off) < 0.75 * sum(chance) / len(chance)


def test_too_few_trials_to_learn_from_are_not_learnt_from() -> None:
    few = told(samplers.STARTUP - 1)
    for sampler in ("tpe", "gp"):
        mirror = Mirror(small.space(TWO, sampler=sampler), few)
        assert mirror.draw(3) == mirror.draw(3, at_random=True)


def test_at_equal_cost_each_slot_has_its_part_of_the_costs_most_near_the_budget() -> None:
    space = small.space(TWO, sampler="tpe_equal_cost")
    for some in (told(0), told(60)):
        mirror = Mirror(space, some)
        for seed in range(5):
            shares = [mirror.draw(seed, slot=slot)["cost_share"] for slot in range(6)]
            assert shares == sorted(shares, reverse=True)
            assert 0.8 <= shares[-1] < 0.86
            assert shares[0] > 0.997
            assert sum(share > 0.95 for share in shares) >= 3


def test_at_equal_cost_a_cheap_plan_is_not_good_for_being_cheap() -> None:
    # The loss doubles with each 0.1 of cost saved; beside that, slope 0.5 is best. Cheapest of all
    # is what is worst but for that.
    dice, some = random.Random(0), []
    for _ in range(60):
        slope = dice.uniform(-1, 1)
        cost = 0.7 + 0.15 * (slope + 1)
        loss = (slope - 0.5) ** 2 - math.log(2) * (cost - 0.7) / 0.1
        some.append(({"slope": slope, "bump": 0.0, "cost_share": 0.9}, (loss, cost)))
    for other in told(20):
        some.append((other[0], (3.0, 0.8)))
    nearer = Mirror(small.space(TWO, sampler="tpe_equal_cost"), some)
    off = [abs(nearer.draw(seed)["slope"] - 0.5) for seed in range(30)]
    assert sum(off) / len(off) < 0.35


@given(
    st.lists(st.floats(-5, 1), min_size=8, max_size=30),
    st.floats(-40, -0.1),
    st.integers(0, 2**20),
)
def test_what_cost_explains_is_taken_off(losses: list[float], slope: float, seed: int) -> None:
    costs = [0.6 + 0.4 * index / (len(losses) - 1) for index in range(len(losses))]
    points = [(slope * cost, cost) for cost in costs]
    points[seed % len(points)] = (5.0, 0.6)  # one hopeless plan does not change what cost is worth
    flat = samplers._at_equal_cost(points)
    rest = [value for value, (loss, _) in zip(flat, points, strict=True) if loss != 5.0]
    assert max(rest) - min(rest) < 1e-6 * abs(slope)
    rising = list(zip(sorted(losses), costs, strict=True))
    assert samplers._at_equal_cost(rising) == [v for v, _ in rising]  # a cost is never rewarded
