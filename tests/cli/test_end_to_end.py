"""The demo from the first command to the last, through the real command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Ended, children, contents, run, runs

from dsm_tune.plan import MergePlan
from dsm_tune.profile import DeviceProfile
from dsm_tune.searching.study import Study

STUDY = "digits"
TUNE = ("--budget-gflops", "60%", "--trials", "8", "--study", STUDY, "--json")
KEYS = {
    *("study", "status", "seconds", "tracking_uri", "parent_run_id", "model", "device", "images"),
    *("similarity_curve", "delay", "budget", "dense", "tome", "dsm", "trials", "front", "chosen"),
    "faults",
}
RESULT_KEYS = {
    *("run_id", "trial", "gmacs", "latency_ms", "throughput", "divergence", "divergence_search"),
    *("agreement", "top1", "feasible", "plan"),
}
LATENCY_KEYS = {"p50", "p90", "p99", "low", "high", "predicted", "ratio_to_dense"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Ended:
    return run(*TUNE, cwd=folder)


def is_front(points: list[tuple[float, float]]) -> bool:
    """Ascending in cost and mutually non-dominated."""
    return all(
        first[0] <= second[0] and first[1] >= second[1] and first != second
        for first, second in itertools.pairwise(points)
    )


def test_json_is_one_document_as_the_interface_says(tuned: Ended) -> None:
    assert tuned.code == 0, tuned
    document = tuned.json
    assert document.keys() >= KEYS
    assert document["study"] == STUDY
    assert document["status"] == "done"
    assert document["images"] == {"search": 150, "holdout": 398, "labelled": True}
    assert len(document["similarity_curve"]) == 5
    assert 0 <= document["delay"] <= 5
    assert document["budget"]["satisfiable"] is True
    assert document["budget"]["dense_fits"] is False
    assert document["budget"]["gmacs"] == pytest.approx(0.6 * document["dense"]["gmacs"])
    for result in (document["dense"], document["tome"], document["dsm"], *document["front"]):
        assert result.keys() >= RESULT_KEYS
        assert result["latency_ms"].keys() >= LATENCY_KEYS
        plan = MergePlan.from_dict(result["plan"])
        assert plan.gmacs == pytest.approx(result["gmacs"])
        assert result["latency_ms"]["p50"] > 0
        assert result["divergence"] >= 0
        assert 0 <= result["agreement"] <= 1
    assert document["trials"]["complete"] + document["trials"]["pruned"] == 8
    assert document["trials"]["failed"] == 0


def test_the_front_is_feasible_sorted_and_not_dominated_and_holds_the_choice(tuned: Ended) -> None:
    document = tuned.json
    front, chosen = document["front"], document["chosen"]
    assert front
    assert is_front([(one["gmacs"], one["divergence"]) for one in front])
    assert all(one["feasible"] for one in front)
    assert all(one["gmacs"] <= document["budget"]["gmacs"] for one in front)
    assert chosen in front


def test_mlflow_has_a_parent_and_a_child_for_each_trial(tuned: Ended, folder: Path) -> None:
    document = tuned.json
    assert document["tracking_uri"] == f"sqlite:///{folder / 'mlflow.db'}"
    parents = [one for one in runs(folder) if "mlflow.parentRunId" not in one["tags"]]
    assert [one["run_id"] for one in parents] == [document["parent_run_id"]]
    assert parents[0]["status"] == "FINISHED"
    found = children(folder, document["parent_run_id"])
    assert len(found) == 8
    complete = [one for one in found if one["tags"]["state"] == "complete"]
    assert len(complete) == document["trials"]["complete"]
    assert {one["tags"]["pareto"] for one in found} <= {"true", "false"}
    pareto = {one["run_id"] for one in found if one["tags"]["pareto"] == "true"}
    assert pareto == {one["run_id"] for one in document["front"]}
    digests = [one["tags"]["plan_digest"] for one in found]
    assert len(set(digests)) == len(digests)


def test_progress_is_plain_lines_of_ours_on_stderr(tuned: Ended) -> None:
    starts = (
        f"study {STUDY}",
        "dense outputs",
        "delay D",
        "budget 0.0123 GMACs; dense 0.0206 GMACs; fastest reachable ",
        "searching",
        "8/8 trials, best divergence ",
        "confirming",
        "timing",
    )
    lines = tuned.err.splitlines()
    assert [line for line in lines if not line.startswith((*starts, *"12345678"))] == []
    for start in starts:
        assert any(line.startswith(start) for line in lines), start
    assert "\x1b" not in tuned.err


def test_a_dry_run_says_what_is_reachable_and_writes_nothing(tmp_path: Path) -> None:
    told = run("--budget-gflops", "60%", "--dry-run", "--json", cwd=tmp_path)
    assert told.code == 0
    document = told.json
    assert document["budget"]["satisfiable"] is True
    assert document["budget"]["dense_fits"] is False
    assert document["budget"]["fastest_gmacs"] < document["budget"]["gmacs"]
    assert document["budget"]["gmacs"] == pytest.approx(0.6 * document["dense"]["gmacs"])
    assert document["dense"]["top1"] > 0.9
    assert document["estimated_seconds"] > 0
    assert contents(tmp_path) == {}


def test_show_prints_the_same_document_and_writes_nothing(
    tuned: Ended, folder: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = contents(folder)
    shown = call("show", STUDY, "--json")
    assert (shown.code, shown.err) == (0, "")
    assert shown.json == tuned.json
    assert contents(folder) == before


def test_show_is_a_table_that_fits_eighty_columns(
    tuned: Ended, folder: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    shown = call("show", STUDY)
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in shown.out
    for name in ("dense", "ToMe", "DSM", "chosen"):
        assert any(line.startswith(f"{name} ") for line in lines), name
    assert any(line.startswith("trial ") and " * " in line for line in lines)
    assert any(line.startswith(f"  dsm-tune ui {STUDY} ") for line in lines)


def test_show_picks_anew_by_another_budget(
    tuned: Ended, folder: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    looser = call("show", STUDY, "--json", "--budget-gmacs", "100%")
    assert looser.code == 0
    assert looser.json["chosen"]["divergence_search"] == 0
    none = call("show", STUDY, "--json", "--budget-gmacs", "1%")
    assert none.code == 3
    assert none.json["chosen"] is None
    assert none.json["front"] == []
    assert none.json["budget"]["satisfiable"] is False
    assert "was tuned for latency" in call("show", STUDY, "--budget-ms", "5").error


def test_another_configuration_of_the_same_name_is_refused(
    tuned: Ended, folder: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = contents(folder)
    assert "exists with another budget_gflops" in call(*TUNE, "--budget-gmacs", "70%").error
    assert contents(folder) == before


def test_the_same_command_again_does_nothing_twice_and_more_trials_continue(
    tuned: Ended, folder: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = contents(folder)
    again = call(*TUNE)
    assert again.code == 0
    assert again.json == tuned.json
    assert "finished already" in again.err
    assert contents(folder) == before

    more = run("resume", STUDY, "--trials", "12", "--json", cwd=folder)
    assert more.code == 0, more
    document = more.json
    counts = document["trials"]
    assert counts["complete"] + counts["pruned"] + counts["failed"] == 12
    assert document["parent_run_id"] == tuned.json["parent_run_id"]
    found = children(folder, document["parent_run_id"])
    assert sorted(int(one["tags"]["dsm_tune.trial"]) for one in found) == list(range(12))
    pareto = {one["run_id"] for one in found if one["tags"]["pareto"] == "true"}
    assert pareto == {one["run_id"] for one in document["front"]}
    digests = [one["tags"]["plan_digest"] for one in found]
    assert len(set(digests)) == len(digests)


@pytest.mark.slow
def test_a_budget_below_the_reachable_exits_with_three_and_says_what_can_be_reached(
    folder: Path,
) -> None:
    ended = run("--budget-gflops", "1%", "--json", "--trials", "3", cwd=folder)
    assert ended.code == 3, ended
    document = ended.json
    assert document["status"] == "infeasible"
    assert document["chosen"] is None
    assert document["front"] == []
    assert document["budget"]["satisfiable"] is False
    assert document["dense"]["divergence"] == 0
    assert document["tome"]["divergence"] > 0
    assert "satisfiable: no" in ended.err
    assert json.dumps(document, allow_nan=False)


@pytest.mark.slow
def test_a_profile_that_promised_too_much_is_corrected_and_the_search_goes_on(
    tmp_path: Path,
) -> None:
    made = run("profile", "--batch-size", "64", "-o", "true.json", cwd=tmp_path)
    assert made.code == 0, made
    profile = DeviceProfile.load(tmp_path / "true.json")
    dense = MergePlan("", profile.geometry)
    budget = 0.8 * profile.predict(dense)
    hopeful = dataclasses.replace(profile, scale=0.6 * profile.scale)
    (tmp_path / "hopeful.json").write_text(hopeful.to_json())
    options = ("--batch-size", "64", "--device-profile", "hopeful.json", "--trials", "12")
    told = run(*options, "--budget-ms", f"{budget}", "--json", cwd=tmp_path)
    assert "no plan met the budget when timed" in told.err
    document = told.json
    assert sum(document["trials"][state] for state in ("complete", "pruned")) > 12
    for result in document["front"]:
        assert result["latency_ms"]["high"] <= budget
    # Where the machine did not slow down between the two commands, something is found.
    assert told.code == (3 if document["chosen"] is None else 0)


@pytest.mark.slow
def test_one_worker_finds_the_trials_and_the_front_that_two_find(
    tuned: Ended, folder: Path, tmp_path: Path
) -> None:
    alone = run(*TUNE, "--workers", "1", cwd=tmp_path)
    assert alone.code == 0, alone
    studies = [
        Study.load(f"sqlite:///{where / 'dsm_tune.db'}", STUDY) for where in (folder, tmp_path)
    ]
    two, one = ([(r.label, r.plan.digest, r.state) for r in s.records()][:8] for s in studies)
    assert one == two
    fronts = [[(r["plan"], r["divergence"]) for r in t.json["front"]] for t in (tuned, alone)]
    assert fronts[0] == fronts[1]


@pytest.mark.slow
def test_a_study_goes_on_under_another_budget_and_keeps_what_it_has_found(
    tuned: Ended, folder: Path
) -> None:
    shutil.copytree(folder, other := folder.parent / "other-budget")
    told = run(
        *("resume", STUDY, "--budget-gflops", "45%", "--trials", "20", "--json"),
        *("--storage", f"sqlite:///{other / 'dsm_tune.db'}"),
        cwd=other,
    )
    assert told.code == 0, told
    document = told.json
    assert document["budget"]["gmacs"] == pytest.approx(0.45 * document["dense"]["gmacs"])
    assert all(one["gmacs"] <= document["budget"]["gmacs"] for one in document["front"])
    assert document["chosen"] in document["front"]
    assert document["tome"]["gmacs"] <= document["budget"]["gmacs"]
    done = sum(document["trials"][state] for state in ("complete", "pruned"))
    assert done == 20
    again = run(
        *("resume", STUDY, "--budget-gflops", "45%", "--json", "--trials", "20"),
        *("--storage", f"sqlite:///{other / 'dsm_tune.db'}"),
        cwd=other,
    )
    assert (again.code, again.json["front"]) == (0, document["front"])
    assert "finished already" in again.err


@pytest.mark.slow
def test_a_model_can_be_tuned_for_onnx_runtime(tmp_path: Path) -> None:
    options = ("--runtime", "onnx", "--batch-size", "8", "--trials", "8", "--study", "served")
    ended = run("--budget-ms", "80%", *options, "--json", cwd=tmp_path)
    assert ended.code in (0, 3), ended  # 3 where nothing is fast enough on a busy machine
    document = ended.json
    for result in (document["dense"], document["tome"], document["dsm"], *document["front"]):
        assert result["latency_ms"]["p50"] > 0
        assert result["latency_ms"]["predicted"] > 0
    again = run("--budget-ms", "80%", *options[2:], cwd=tmp_path)
    assert again.code == 2, again
    assert "runtime" in again.error
