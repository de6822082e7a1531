"""``sync`` writes to MLflow what it lacks of a study, from the study's storage alone."""

from __future__ import annotations

import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import stored_study as stored

from dsm_tune.answer import Answer
from dsm_tune.config import TuneConfig
from dsm_tune.errors import StudyError
from dsm_tune.reviewing import outcome
from dsm_tune.reviewing.stores import connect
from dsm_tune.searching.importance import parameter_importance
from dsm_tune.searching.search import Progress
from dsm_tune.searching.study import Study
from dsm_tune.sync import sync

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 maps one relation with a loader that SQLAlchemy 2.1 deprecates.
    "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
)
TRIALS = 16
FILES = {
    *("report.html", "pareto.html", "pareto.png", "trials.csv", "front.json", "config.toml"),
    *("similarity_curve.png", "tokens.png", "prediction.png", "merged_tokens.png"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def storage(folder: Path) -> str:
    return f"sqlite:///{folder}/dsm_tune.db"


def empty_store(folder: Path, name: str, empty: str) -> str:
    """A store with MLflow's tables, which take it a while to make."""
    shutil.copy(empty.removeprefix("sqlite:///"), folder / name)
    return f"sqlite:///{folder}/{name}"


@pytest.fixture(scope="module")
def empty(folder: Path) -> str:
    made = f"sqlite:///{folder}/empty.db"
    connect(made)
    return made


@pytest.fixture(scope="module")
def uri(folder: Path, empty: str) -> str:
    return empty_store(folder, "mlflow.db", empty)


@pytest.fixture(scope="module")
def study(storage: str) -> Study:
    return stored.make(storage, "digits", trials=TRIALS)


def standing(uri: str, study: str, experiment: str = "dsm-tune") -> dict[str, Any]:
    """All that MLflow shows of a study, by trial, but for ids, times and the study's own name."""
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    where = f"tags.`dsm_tune.study` = '{study}'"
    runs = client.search_runs([found.experiment_id], where, max_results=1000)
    shown = {}
    for run in runs:
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        metrics = {k: v for k, v in run.data.metrics.items() if k != "evaluation_seconds"}
        shown[tags.get("dsm_tune.trial", "study")] = {
            "name": run.info.run_name,
            "status": run.info.status,
            "params": run.data.params,
            "metrics": metrics,
            "tags": tags,
            "inputs": sorted(one.dataset.digest for one in run.inputs.dataset_inputs),
            "files": [one.path for one in client.list_artifacts(run.info.run_id)],
        }
        if "mlflow.parentRunId" not in run.data.tags:
            shown["steps"] = {
                name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
                for name in ("hypervolume", "best_divergence", "trials_done")
            }
    assert len(shown) == len(runs) + 1, "two runs of one trial"
    return shown


def test_sync_writes_runs_steps_and_files_from_the_storage_alone(
    study: Study, storage: str, uri: str
) -> None:
    done = sync("digits", storage=storage, tracking_uri=uri)
    shown = standing(uri, "digits")
    assert done.trials == len(study.records()) == TRIALS
    assert done.written == TRIALS + 1
    assert set(shown) == {"study", "steps", *map(str, range(TRIALS))}
    assert [step for step, _ in shown["steps"]["trials_done"]] == list(range(1, TRIALS + 1))
    assert shown["study"]["status"] == "FINISHED"
    assert shown["study"]["files"] == list(done.files)
    assert set(done.files) == FILES
    fronts = [run["tags"]["pareto"] for key, run in shown.items() if key.isdigit()]
    assert fronts.count("true") == len(Answer.of(study).front())


def test_twice_is_the_same_as_once(study: Study, storage: str, uri: str) -> None:
    first = sync("digits", storage=storage, tracking_uri=uri)
    client = connect(uri)
    before = standing(uri, "digits"), client.get_run(first.parent_run_id).info.end_time
    again = sync("digits", storage=storage, tracking_uri=uri)
    assert again.written == 0
    assert again.parent_run_id == first.parent_run_id
    assert (standing(uri, "digits"), client.get_run(first.parent_run_id).info.end_time) == before


def test_what_a_tune_had_written_and_what_sync_writes_are_equal(
    storage: str, uri: str, folder: Path, empty: str
) -> None:
    """The live one as ``tuning`` does it; the other one never had a store while it was searched."""
    config = TuneConfig(
        model=stored.MODEL,
        images="/photographs",
        budget_gflops="57%",
        study="live",
        storage=storage,
    )
    queues: list[Any] = []

    def on_progress(progress: Progress) -> None:
        if not queues:
            queues.append(outcome.open_queue("live", search.study.facts, uri, config, print))
        queues[0].log_trial(Answer.of(search.study).trial(progress.record))
        queues[0].log_progress(
            progress.done, progress.hypervolume, progress.best_divergence, progress.done
        )

    search = stored.search(storage, "live", trials=TRIALS, on_progress=on_progress)
    stored.drive(search)
    stored.confirm(search.study)
    queue = queues[0]
    assert queue.drain(60)
    answer = Answer.of(search.study)
    result = answer.result()
    trials = answer.trials(result.front)
    importance, samples = parameter_importance(search.study), search.study.facts["token_samples"]
    files = outcome.artifacts(result, trials, config, importance, samples)
    queue.log_outcome(result, trials, files)
    queue.close_runs("done")
    assert queue.close(60)
    live = standing(uri, "live")
    elsewhere = empty_store(folder, "elsewhere.db", empty)
    sync("live", storage=storage, tracking_uri=elsewhere)
    synced = standing(elsewhere, "live")
    for shown in (live, synced):
        del shown["study"]["tags"]["mlflow.note.content"]  # it names the store
    assert synced == live
    sync("live", storage=storage, tracking_uri=uri)
    back = standing(uri, "live")
    del back["study"]["tags"]["mlflow.note.content"]
    assert back == live


def test_a_study_that_is_still_searched_is_written_as_far_as_it_is(
    storage: str, folder: Path, empty: str
) -> None:
    uri = empty_store(folder, "early.db", empty)
    search = stored.search(storage, "early", trials=TRIALS)
    stored.drive(search, jobs=17)
    open_trials = [r.number for r in search.records() if r.state == "running"]
    assert open_trials
    sync("early", storage=storage, tracking_uri=uri)
    shown = standing(uri, "early")
    assert not set(map(str, open_trials)) & set(shown)
    assert shown["study"]["status"] == "RUNNING"
    assert "So far" in shown["study"]["tags"]["mlflow.note.content"]
    stored.drive(search)
    stored.confirm(search.study)
    sync("early", storage=storage)
    whole = standing(uri, "early")
    assert whole["study"]["status"] == "FINISHED"
    assert set(map(str, range(TRIALS))) <= set(whole)


def test_a_store_that_the_runs_moved_to_is_theirs_from_then_on(storage: str, folder: Path) -> None:
    stored.make(storage, "moved", trials=4)
    new = f"sqlite:///{folder}/new.db"
    sync("moved", storage=storage, tracking_uri=new)
    facts = Study.load(storage, "moved").facts
    assert facts["tracking_uri"] == new
    ids = {run.info.run_id for run in connect(new).search_runs(["1"], max_results=100)}
    assert {*facts["run_ids"].values(), facts["parent_run_id"]} == ids
    assert sync("moved", storage=storage).tracking_uri == new


def test_a_server_that_is_down_is_one_line_and_changes_nothing(study: Study, storage: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = dict(Study.load(storage, "digits").facts)
    with pytest.raises(StudyError, match="the MLflow store must be reachable") as refused:
        sync("digits", storage=storage, tracking_uri=f"http://me:hunter2@127.0.0.1:{port}")
    assert "hunter2" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert Study.load(storage, "digits").facts == before


def test_two_studies_at_once_on_one_store_do_not_mix(
    storage: str, folder: Path, empty: str
) -> None:
    uri, alone = (empty_store(folder, f"{name}.db", empty) for name in ("shared", "alone"))
    for seed, name in enumerate(("one", "two")):
        stored.make(storage, name, trials=8, seed=seed)
        sync(name, storage=storage, tracking_uri=alone)
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            sync(name, storage=storage, tracking_uri=uri)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[name]) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for name in ("one", "two"):
        together, in_turn = standing(uri, name), standing(alone, name)
        for shown in (together, in_turn):
            del shown["study"]["tags"]["mlflow.note.content"]  # it names the store
        assert together == in_turn
