"""The README's table of methods, and the benchmark that fills it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from methods import BEGIN, END, METHODS, Method, shape_of_method

from dsm_tune.plan import FEATURES, KINDS, NORMS, PRUNE_SCORES, QUOTAS, Geometry, MergePlan
from dsm_tune.searching.budget import fit_gmacs

TINY = Geometry((14, 14), 1, 12, 192, 3, 768, 16, 1000, "token")
ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_names_the_methods_of_the_benchmark_in_its_words() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    rows = [line.strip("| ").split(" | ")[:4] for line in table.strip().splitlines()[2:]]
    assert rows == [[m.says, m.formula, m.source, m.helps] for m in METHODS]


def test_every_kind_feature_score_length_and_quota_is_measured() -> None:
    assert {method.kind for method in METHODS} == set(KINDS)
    assert {m.matching.feature for m in METHODS if m.kind == "merge"} == set(FEATURES)
    assert {m.matching.prune_score for m in METHODS if m.kind == "prune"} == set(PRUNE_SCORES)
    assert {method.matching.norm for method in METHODS} == set(NORMS)
    assert {method.matching.quota for method in METHODS} == set(QUOTAS)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.says)
def test_every_method_meets_the_cost_that_all_are_compared_at(method: Method) -> None:
    plan = fit_gmacs(shape_of_method(method, TINY, 2), TINY, 0.71)
    assert plan is not None
    assert 0.69 < plan.gmacs <= 0.71
    assert MergePlan.from_json(plan.to_json()) == plan
