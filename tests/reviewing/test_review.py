"""The answer in words, the figures and the report say what the study found, and no more."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import io
import json
import re
import struct
import subprocess
import sys
from typing import Any

import pytest
import study_builder as build

from dsm_tune.results import FAULTS, Fault, LatencyMs, Result, TuneResult
from dsm_tune.reviewing import figures, interactive, points, records, report, summary

HOSTILE = "<script>alert(1)</script>|`*_$x$"


@pytest.fixture(scope="module")
def result() -> TuneResult:
    return build.study()


def dense_fits(by: str = "gmacs") -> TuneResult:
    some = build.study(by=by)
    budget = dataclasses.replace(some.budget, dense_fits=True)
    dense = dataclasses.replace(some.dense, feasible=True)
    return dataclasses.replace(some, budget=budget, dense=dense, chosen=dense, front=[dense])


def infeasible(by: str = "ms") -> TuneResult:
    some = build.study(by=by)
    budget = dataclasses.replace(some.budget, satisfiable=False)
    return dataclasses.replace(some, budget=budget, status="infeasible", front=[], chosen=None)


def bare(some: TuneResult) -> TuneResult:
    """A study of which hardly anything is known yet."""

    def strip(one: Result) -> Result:
        return Result(one.plan, one.gmacs)

    named = {name: strip(getattr(some, name)) for name in ("dense", "tome", "dsm")}
    body: dict[str, Any] = {**named, "front": [], "chosen": None, "status": "running", "images": {}}
    return dataclasses.replace(some, **body)


STUDIES = {
    "merged": build.study(),
    "merged_ms": build.study(by="ms"),
    "dense_fits": dense_fits(),
    "dense_fits_ms": dense_fits("ms"),
    "infeasible": infeasible(),
    "infeasible_gmacs": infeasible("gmacs"),
    "bare": bare(build.study()),
    "bare_ms": bare(build.study(by="ms")),
}


def test_the_answer_names_cost_quality_and_what_tuning_bought(result: TuneResult) -> None:
    words = summary.answer(result)
    assert words.startswith("A merged plan meets the budget of 0.9 GMACs: ")
    assert "instead of 1.25 GMACs" in words
    assert "0.084 for DSM and 0.101 for ToMe" in words
    assert "on 500 held-out images" in words


def test_a_dense_model_that_fits_is_the_choice() -> None:
    words = summary.answer(dense_fits())
    assert words.startswith("The dense model already meets the budget of 0.9 GMACs")
    assert "It is the choice" in words
    assert summary.rows(dense_fits())[-1].name == "chosen (dense)"


def test_where_nothing_fits_the_fastest_reachable_is_said() -> None:
    words = summary.answer(infeasible())
    assert words.startswith("Nothing meets the budget of 4.6 ms (p50, batch 1): ")
    assert "the fastest that is known takes 2.2 ms" in words
    assert [row.name for row in summary.rows(infeasible())] == ["dense", "ToMe", "DSM"]


def missed(measured: float, predicted: float) -> str:
    """The answer of a study that should have met 4.6 ms, whose fastest plan is ToMe's."""
    some = build.study(by="ms")
    tome, slow = (
        dataclasses.replace(
            some.tome, latency_ms=LatencyMs(ms, ms, ms, ms, ms, predicted=predicted), feasible=False
        )
        for ms in (measured, 99.0)
    )
    changes: dict[str, Any] = {"dense": slow, "tome": tome, "dsm": slow, "front": []}
    return summary.answer(dataclasses.replace(some, **changes, status="infeasible", chosen=None))


def test_where_plans_proved_slower_than_predicted_the_machine_is_blamed() -> None:
    words = missed(measured=6.0, predicted=3.0)
    assert "timed alone, ToMe took 6.00 ms, 2.0× what the device profile had said" in words
    assert "try again when it is idle" in words


def test_where_the_prediction_held_the_fastest_that_it_knows_is_said() -> None:
    words = missed(measured=6.0, predicted=5.9)
    assert "timed alone, ToMe took 6.00 ms; the device profile says that 2.2 ms can be" in words


def test_a_running_study_does_not_say_that_nothing_fits() -> None:
    assert summary.answer(STUDIES["bare"]).startswith("So far no plan is chosen")


def test_an_interrupted_study_says_that_it_is_not_the_last_word(result: TuneResult) -> None:
    assert summary.answer(dataclasses.replace(result, status="interrupted")).startswith("So far: ")


def test_overlapping_intervals_are_said_to_overlap(result: TuneResult) -> None:
    assert result.chosen is not None
    assert "overlap" not in summary.answer(result)
    dsm = dataclasses.replace(result.dsm, divergence_low=0.03)
    assert "(intervals overlap with DSM)" in summary.answer(dataclasses.replace(result, dsm=dsm))


@pytest.mark.parametrize(("top1", "words"), [(0.70, "drops by 2.0"), (0.73, "rises by 1.0")])
def test_with_labels_the_change_in_top1_is_said_with_its_interval(
    result: TuneResult, top1: float, words: str
) -> None:
    assert result.chosen is not None
    labelled = dataclasses.replace(
        result,
        dense=dataclasses.replace(result.dense, top1=0.72),
        chosen=dataclasses.replace(result.chosen, top1=top1, agreement=0.95),
    )
    assert re.search(rf"Top-1 {words} points ± 2\.\d on 500 held-out", summary.answer(labelled))


def test_a_model_without_a_head_has_a_cosine_and_no_nats(result: TuneResult) -> None:
    geometry = dataclasses.replace(build.DEIT_TINY, classes=0)
    plan = dataclasses.replace(build.DENSE, geometry=geometry)
    dense = dataclasses.replace(result.dense, plan=plan)
    pooled = dataclasses.replace(result, dense=dense)
    assert "1 − cosine" in summary.headings(pooled)
    assert "nats" not in summary.answer(pooled)


def test_wilsons_interval_has_its_known_values() -> None:
    assert summary.wilson(1.0, 100) == pytest.approx((100 / (100 + 1.96**2), 1.0))
    assert summary.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (3.904, 3.9, 3.98, "3.90 [3.90, 3.98]"),
        (120.4, None, None, "120"),
        (0.0, 0.0, 0.0, "0"),
        (None, 1, 2, "–"),
    ],
)
def test_figures_have_three_digits(
    value: float | None, low: float | None, high: float | None, text: str
) -> None:
    assert summary.interval(value, low, high) == text


def test_a_delay_that_is_a_convention_is_not_called_a_finding() -> None:
    fallen, found = [0.4, 0.3, 0.25, 0.24], [0.4, 0.2, 0.3, 0.4]
    assert "shows no transition" in summary.delay_words(fallen, 1)
    assert summary.delay_words(found, 1) == "D = 1, from the similarity curve"
    drawn = [figures.similarity_curve_svg(curve, 1).decode() for curve in (fallen, found)]
    assert "<!-- No block from which tokens grow alike: D = 1 is depth / 6 -->" in drawn[0]
    assert "<!-- Tokens grow alike from block 1 on" in drawn[1]


def test_a_plan_in_words_names_delay_r_and_what_is_unusual() -> None:
    assert summary.plan_words(build.DENSE) == "dense"
    lossless = dataclasses.replace(build.DENSE, last_block="prefix")
    assert summary.plan_words(lossless) == "dense, last=prefix"
    assert summary.plan_words(build.TOME) == "D=0 r=13"
    assert summary.plan_words(build.DSM) == "D=2 r=17 w=7–9"
    unusual = build.plan(13, feature="kv", salience=0.3)
    assert summary.plan_words(unusual) == "D=1 r=13 kv λ=0.3 last=prefix"


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_words_a_note_a_report_and_figures(name: str) -> None:
    study, trials = STUDIES[name], build.trials(20)
    for text in (summary.answer(study), summary.headline(study), records.note(study)):
        assert "None" not in text
        assert "nan" not in text
    assert len(records.note(study)) < 6000
    page = report.report_html(study, trials, command="dsm-tune")
    assert summary.rows(study)[-1].gmacs in page
    assert points.scatter(study, trials).top > 0


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize("name", ["merged_ms", "dense_fits", "infeasible", "bare_ms"])
def test_the_pareto_figure_is_1200_pixels_wide(name: str) -> None:
    assert png_size(figures.pareto_png(STUDIES[name], build.trials(20))) == (1200, 750)


def test_the_other_figures_are_as_wide(result: TuneResult) -> None:
    named = dataclasses.replace(result, model=HOSTILE)
    assert png_size(figures.tokens_png(named)) == (1200, 750)
    for delay in (0, 2, 12):
        curve = figures.similarity_curve_png(result.similarity_curve, delay, HOSTILE)
        assert png_size(curve) == (1200, 750)


def test_drawing_leaves_pyplot_alone() -> None:
    code = "import sys, dsm_tune.reviewing.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plan_is_drawn_once_and_failures_not_at_all() -> None:
    trials = build.trials(40)
    result = build.study(trials)
    drawn = points.scatter(result, trials).points
    digests = {one.plan.digest for one in [result.dense, result.tome, result.dsm, *result.front]}
    states = ("complete", "pruned")
    left = [t for t in trials if t.state in states and t.plan and t.plan.digest not in digests]
    background = drawn["trial"] + drawn["infeasible"] + drawn["pruned"]
    assert len(background) == len(left)
    assert len(drawn["front"]) == len(result.front)


def test_many_trials_are_thinned_out_and_results_are_not(result: TuneResult) -> None:
    some = [t for t in build.trials(400) if t.state == "complete"] * 12
    drawn = points.scatter(result, some).points
    assert 700 < len(drawn["trial"]) <= points.MOST
    assert len(drawn["front"]) == len(result.front)


def test_cost_is_what_the_budget_limits() -> None:
    by_ms, by_gmacs = STUDIES["merged_ms"], STUDIES["merged"]
    (dense,) = points.scatter(by_ms, []).points["dense"]
    assert dense.cost == by_ms.dense.latency_ms.p50
    assert dense.cost_edges == (by_ms.dense.latency_ms.low, by_ms.dense.latency_ms.high)
    (dense,) = points.scatter(by_gmacs, []).points["dense"]
    assert (dense.cost, dense.cost_edges) == (by_gmacs.dense.gmacs, None)


class Page(html.parser.HTMLParser):
    """Collects what a page would load and what stands in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_interactive_figure_loads_nothing_and_says_which_run(result: TuneResult) -> None:
    first = dataclasses.replace(result.front[0], run_id="r" * 32)
    named = dataclasses.replace(result, front=[first])
    text = interactive.pareto_html(named, build.trials(20))
    assert Page(text).loads == []
    assert "run " + "r" * 32 in text
    assert "budget 0.9 GMACs" in text
    assert len(text) < 2_500_000


def test_the_interactive_figure_escapes_names(result: TuneResult) -> None:
    text = interactive.pareto_html(dataclasses.replace(result, model=HOSTILE), [])
    assert "<script>alert" not in text


def test_the_report_is_one_page_that_loads_nothing(result: TuneResult) -> None:
    images = {"pareto.png": b"\x89PNG", "tokens.png": b"\x89PNG"}
    text = report.report_html(result, build.trials(), figures=images, command="dsm-tune --trials 9")
    page = Page(text)
    assert len(page.loads) == 2
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "default-src 'none'" in text
    assert summary.answer(result) in page.text
    assert "dsm-tune --trials 9" in page.text
    assert "RuntimeError: out of memory" in page.text


def test_the_report_escapes_what_users_named_and_keeps_secrets(result: TuneResult) -> None:
    named = dataclasses.replace(
        result,
        model=HOSTILE,
        study=HOSTILE,
        device={"name": HOSTILE, "fingerprint": HOSTILE},
        tracking_uri="http://me:hunter2@h",
    )
    why = f"{HOSTILE} x://a:hunter2@h"
    trials = [dataclasses.replace(t, why=why) for t in build.trials(20)]
    command = f"{HOSTILE} x://a:hunter2@h"
    text = report.report_html(named, trials, figures={HOSTILE: b""}, command=command)
    assert "<script" not in text
    assert "hunter2" not in text + records.note(named) + report.trials_csv(trials)


def test_the_note_keeps_its_table_whatever_the_words(result: TuneResult) -> None:
    named = dataclasses.replace(result, study="a`|b'")
    table = [line for line in records.note(named).splitlines() if line.startswith("|")]
    assert len(table) == 6
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {9}


def test_trials_csv_has_a_line_per_trial_and_a_column_per_param() -> None:
    trials = build.trials(12)
    trials[4] = dataclasses.replace(trials[4], why='=HYPERLINK("x"),\nmore', params={"delay": -1})
    lines = list(csv.DictReader(io.StringIO(report.trials_csv(trials))))
    assert len(lines) == 12
    assert lines[4]["why"] == '\'=HYPERLINK("x"),\nmore'
    assert (lines[4]["params.delay"], lines[4]["params.salience"]) == ("-1", "")
    assert float(lines[5]["divergence"]) == trials[5].divergence
    assert (lines[1]["feasible"], lines[0]["label"]) == ("true", "dense")


def test_front_json_reads_back_as_the_front(result: TuneResult) -> None:
    read = [Result.from_dict(body) for body in json.loads(report.front_json(result))]
    assert read == result.front


def test_a_result_measured_on_nothing_has_no_metrics() -> None:
    assert records.measured(Result(build.DENSE, 1.25)) == {}
    latency = LatencyMs(p50=4.0, high=float("nan"))
    half = Result(build.DENSE, 1.25, latency_ms=latency)
    assert records.measured(half) == {"latency_p50_ms": 4.0}


def test_latencies_that_were_predicted_are_drawn_beside_those_measured(result: TuneResult) -> None:
    png = figures.prediction_png(result)
    assert png is not None
    assert png.startswith(b"\x89PNG")
    assert figures.prediction_png(bare(result)) is None


def test_what_decided_is_drawn_for_any_number_of_parameters() -> None:
    for count in (1, 40):
        shares = {f"parameter_{i}": 1 / count for i in range(count)}
        assert figures.importance_png(shares).startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", FAULTS)
def test_every_kind_of_fault_has_words_for_one_and_for_several(kind: str) -> None:
    one, several = (summary.fault_words(Fault(kind, count, "why")) for count in (1, 17))
    assert "17" in several
    assert "17" not in one
    assert one.endswith(" (why)")
    assert summary.fault_words(Fault(kind, 1)) == one.removesuffix(" (why)")


def test_the_document_with_its_faults_is_read_back() -> None:
    faults = [Fault("store", 2, "disk full"), Fault("trial", 1)]
    some = dataclasses.replace(build.study(), faults=faults)
    body = json.loads(json.dumps(some.to_dict()))
    assert body["faults"][0] == {"kind": "store", "count": 2, "detail": "disk full"}
    assert TuneResult.from_dict(body) == some
    del body["faults"]  # as it was written before
    assert TuneResult.from_dict(body).faults == []
