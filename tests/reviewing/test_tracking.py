"""MLflow: one study is one run with children, written once whatever happens in between."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import study_builder as build
from mlflow.tracking import MlflowClient

from dsm_tune import schedules
from dsm_tune.errors import StudyError
from dsm_tune.results import Trial
from dsm_tune.reviewing.queue import TrackingQueue
from dsm_tune.reviewing.records import ImagesLabel
from dsm_tune.reviewing.stores import (
    connect,
    quietly,
    redact,
    resolve_tracking_uri,
    unusable,
)
from dsm_tune.reviewing.tracking import StudyLabels, StudyRuns

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 maps one relation with a loader that SQLAlchemy 2.1 deprecates.
    "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
)


def labels(study_id: str = "a1", **fields: Any) -> StudyLabels:
    body = {"model": "deit_tiny", "device": "cpu", "budget": "0.9 GMACs"} | fields
    return StudyLabels(study="demo", study_id=study_id, **body)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('a store')}/mlflow.db"


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return request.node.name


@pytest.fixture
def runs(uri: str, experiment: str) -> StudyRuns:
    return StudyRuns.open(uri, experiment, labels())


def stored(uri: str, experiment: str, where: str = "") -> list[Any]:
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    return sorted(
        client.search_runs([found.experiment_id], where, max_results=1000),
        key=lambda run: int(run.data.tags.get("dsm_tune.trial", -1)),
    )


def everything(uri: str, experiment: str) -> list[tuple[Any, ...]]:
    """All that a person sees of an experiment, but for ids and times."""
    return [
        (run.info.run_name, run.info.status, run.data.params, run.data.metrics, run.data.tags)
        for run in stored(uri, experiment)
    ]


def children(uri: str, experiment: str, where: str = "") -> list[Any]:
    return [r for r in stored(uri, experiment, where) if "mlflow.parentRunId" in r.data.tags]


def test_a_study_opened_twice_has_one_run(uri: str, experiment: str) -> None:
    first = StudyRuns.open(uri, experiment, labels())
    assert StudyRuns.open(uri, experiment, labels()).parent_run_id == first.parent_run_id
    (run,) = stored(uri, experiment)
    assert run.info.run_name == "deit_tiny · cpu · 0.9 GMACs"


def test_two_studies_in_one_experiment_do_not_mix(uri: str, experiment: str) -> None:
    one = StudyRuns.open(uri, experiment, labels("one"))
    two = StudyRuns.open(uri, experiment, labels("two"))
    one.log_trial(build.trials(4)[3])
    assert one.parent_run_id != two.parent_run_id
    assert StudyRuns.open(uri, experiment, labels("two")).run_id(3) is None


def test_of_parents_created_at_the_same_time_the_first_stays(uri: str, experiment: str) -> None:
    first = StudyRuns.open(uri, experiment, labels())
    client = connect(uri)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    client.create_run(experiment_id, tags={"dsm_tune.study_id": "a1"})
    assert StudyRuns.open(uri, experiment, labels()).parent_run_id == first.parent_run_id
    assert len(stored(uri, experiment)) == 1


def test_a_trial_is_a_child_with_params_metrics_and_tags(
    uri: str, experiment: str, runs: StudyRuns
) -> None:
    trial = build.trials(4)[3]
    runs.log_trial(trial)
    (run,) = children(uri, experiment)
    assert trial.plan is not None
    assert run.info.run_id == runs.run_id(3)
    assert re.match(r"t003 · [\d.]+ GMACs · D=", run.info.run_name)
    assert run.data.params == {"delay": "0", "salience": repr(0.1 * 3)}
    assert run.data.metrics["divergence"] == trial.divergence
    assert run.data.metrics["gmacs"] == trial.plan.gmacs
    expected = {
        "mlflow.parentRunId": runs.parent_run_id,
        "state": "complete",
        "pareto": "false",
        "feasible": "true" if trial.feasible else "false",
        "plan_digest": trial.plan.digest,
        "plan": trial.plan.to_json(),
        "dsm_tune.study": "demo",
        "dsm_tune.trial": "3",
        "model": "deit_tiny",
        "device": "cpu",
        "budget": "0.9 GMACs",
    }
    assert expected.items() <= run.data.tags.items()
    assert run.info.end_time - run.info.start_time == pytest.approx(2500, abs=500)


def test_states_become_the_status_of_mlflow(uri: str, experiment: str, runs: StudyRuns) -> None:
    trial = build.trials(4)[3]
    for number, state in enumerate(["complete", "pruned", "failed", "duplicate"]):
        runs.log_trial(dataclasses.replace(trial, number=number, state=state, why=f"was {state}"))
    found = [(run.info.status, run.data.tags["why"]) for run in children(uri, experiment)]
    assert found == [
        ("FINISHED", "was complete"),
        ("KILLED", "was pruned"),
        ("FAILED", "was failed"),
    ]


def test_a_reference_is_named_so(uri: str, experiment: str, runs: StudyRuns) -> None:
    for trial in build.trials(3):
        runs.log_trial(trial)
    names = [run.info.run_name for run in children(uri, experiment)]
    assert names == ["Dense (reference)", "ToMe (reference)", "DSM (reference)"]


def test_a_trial_written_twice_stands_there_once(
    uri: str, experiment: str, runs: StudyRuns
) -> None:
    trials = build.trials(6)
    for trial in trials:
        runs.log_trial(trial)
    before = everything(uri, experiment)
    again = StudyRuns.open(uri, experiment, labels())
    for trial in trials:
        runs.log_trial(trial)
        again.log_trial(trial)
    assert everything(uri, experiment) == before
    history = connect(uri).get_metric_history(runs.run_id(3), "divergence")
    assert len(history) == 1


@pytest.mark.parametrize("last_call", ["create_run", "log_batch"])
def test_a_run_that_a_crash_left_open_is_completed_not_doubled(
    uri: str, experiment: str, runs: StudyRuns, last_call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, trial = runs._client, build.trials(4)[3]
    real = getattr(client, last_call)

    def crash(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(client, last_call, crash)
    with pytest.raises(KeyboardInterrupt):
        runs.log_trial(trial)
    (run,) = children(uri, experiment)
    assert run.info.status == "RUNNING"
    StudyRuns.open(uri, experiment, labels()).log_trial(trial)
    (run,) = children(uri, experiment)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["divergence"] == trial.divergence


def test_a_child_that_a_repeated_request_doubled_is_removed(
    uri: str, experiment: str, runs: StudyRuns
) -> None:
    runs.log_trial(build.trials(4)[3])
    client = connect(uri)
    (run,) = children(uri, experiment)
    client.create_run(run.info.experiment_id, run.info.start_time + 1, run.data.tags)
    StudyRuns.open(uri, experiment, labels())
    assert [one.info.run_id for one in children(uri, experiment)] == [run.info.run_id]


def test_children_are_read_page_by_page(
    uri: str, experiment: str, runs: StudyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsm_tune.reviewing.tracking.PAGE", 2)
    for trial in build.trials(5):
        runs.log_trial(trial)
    again = StudyRuns.open(uri, experiment, labels())
    assert [again.run_id(n) for n in range(5)] == [runs.run_id(n) for n in range(5)]


def test_a_step_of_progress_is_written_once_also_after_a_resume(
    uri: str, experiment: str, runs: StudyRuns
) -> None:
    for _ in range(2):
        for _ in range(2):
            runs.log_progress(0, None, float("nan"), 8)
            runs.log_progress(1, 0.5, 0.04, 16)
        runs = StudyRuns.open(uri, experiment, labels())

    def history(name: str) -> list[tuple[int, float]]:
        points = connect(uri).get_metric_history(runs.parent_run_id, name)
        return [(point.step, point.value) for point in points]

    assert history("trials_done") == [(0, 8), (1, 16)]
    assert history("hypervolume") == [(1, 0.5)]


def test_the_outcome_makes_tags_and_metrics_of_all_children_true(
    uri: str, experiment: str, runs: StudyRuns
) -> None:
    trials = build.trials(16)
    result = build.study(trials)
    for trial in trials[:-2]:  # the last two come with the outcome
        runs.log_trial(dataclasses.replace(trial, pareto=trial.number == 1))
    runs.log_outcome(result, trials, {})
    front = {one.trial for one in result.front}
    assert front
    for run in children(uri, experiment):
        on_front = int(run.data.tags["dsm_tune.trial"]) in front
        assert run.data.tags["pareto"] == ("true" if on_front else "false")
        assert run.data.metrics["pareto"] == float(on_front)
        assert ("latency_p50_ms" in run.data.metrics) == (on_front or "label" in run.data.tags)
    assert len(children(uri, experiment)) == len(trials)
    assert result.chosen is not None
    (chosen,) = children(uri, experiment, "tags.chosen = 'true'")
    assert chosen.data.metrics["divergence_holdout"] == result.chosen.divergence
    digests = [run.data.tags.get("plan_digest") for run in children(uri, experiment)]
    assert len(children(uri, experiment, "tags.pareto = 'true'")) == len(front)
    assert len(set(digests)) == len({trial.plan and trial.plan.digest for trial in trials})


def test_an_outcome_written_twice_is_written_once(
    uri: str, experiment: str, runs: StudyRuns
) -> None:
    trials = build.trials(12)
    for _ in range(2):
        runs.log_outcome(build.study(trials), trials, {"trials.csv": "a,b"})
        runs.close("done")
    before = everything(uri, experiment)
    again = StudyRuns.open(uri, experiment, labels())
    again.log_outcome(build.study(trials), trials, {"trials.csv": "a,b"})
    again.close("done")
    assert everything(uri, experiment) == before


def test_a_second_outcome_replaces_the_front_of_the_first(
    uri: str, experiment: str, runs: StudyRuns
) -> None:
    trials = build.trials(16)
    result = build.study(trials)
    runs.log_outcome(result, trials, {})
    other = dataclasses.replace(result, front=result.front[:1], chosen=result.front[0])
    assert len(result.front) > 1
    again = StudyRuns.open(uri, experiment, labels())
    again.log_trial(trials[result.front[0].trial or 0])  # says pareto=False, but knows less
    again.log_outcome(other, trials, {})
    for where in ("tags.pareto = 'true'", "metrics.pareto = 1", "tags.chosen = 'true'"):
        (run,) = children(uri, experiment, where)
        assert run.data.tags["dsm_tune.trial"] == str(result.front[0].trial)


def test_an_outcome_that_changes_little_costs_few_requests(
    uri: str, experiment: str, runs: StudyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = build.trials(40)
    result = build.study(trials)
    runs.log_outcome(result, trials, {})
    requests = []
    real = runs._client.log_batch
    monkeypatch.setattr(
        runs._client, "log_batch", lambda *a, **k: (requests.append(a), real(*a, **k))
    )
    runs.log_outcome(dataclasses.replace(result, front=result.front[1:]), trials, {})
    assert len(requests) == 1


def test_a_plan_too_long_for_a_tag_is_kept_as_a_file(
    uri: str, experiment: str, runs: StudyRuns
) -> None:
    geometry = dataclasses.replace(build.DEIT_TINY, depth=200)
    plan = schedules.tome(geometry, 1)
    runs.log_trial(dataclasses.replace(build.trials(4)[3], plan=plan))
    (run,) = children(uri, experiment)
    assert "plan" not in run.data.tags
    (path,) = Path(run.info.artifact_uri.removeprefix("file://").replace("%20", " ")).iterdir()
    assert path.read_text() == plan.to_json()


def test_the_study_run_has_the_note_and_the_artifacts_beside_the_database(
    uri: str, experiment: str, runs: StudyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs.log_outcome(build.study(), build.trials(), {"pareto.png": b"png", "trials.csv": "a\n"})
    runs.close("done")
    parent = connect(uri).get_run(runs.parent_run_id)
    note = parent.data.tags["mlflow.note.content"]
    assert "A merged plan meets the budget" in note
    assert "| chosen" in note
    assert "dsm-tune show demo" in note
    assert parent.info.status == "FINISHED"
    names = [file.path for file in connect(uri).list_artifacts(runs.parent_run_id)]
    assert names == ["pareto.png", "trials.csv"]
    folder = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert [path.read_bytes() for path in folder.rglob("pareto.png")] == [b"png"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("done", "FINISHED"),
        ("infeasible", "FINISHED"),
        ("interrupted", "KILLED"),
        ("failed", "FAILED"),
    ],
)
def test_the_study_run_ends_as_the_study_does_and_runs_again_on_resume(
    uri: str, experiment: str, runs: StudyRuns, status: str, expected: str
) -> None:
    runs.close(status)
    assert connect(uri).get_run(runs.parent_run_id).info.status == expected
    StudyRuns.open(uri, experiment, labels())
    assert connect(uri).get_run(runs.parent_run_id).info.status == "RUNNING"


def test_more_than_a_hundred_params_and_hostile_values_fit(uri: str, experiment: str) -> None:
    params = {f"p{i}": "x" * 9000 for i in range(150)}
    params["storage"] = "postgresql://u:hunter2@h/db"
    secret = labels(params=params, tags={"uri": "http://u:hunter2@h"})
    StudyRuns.open(uri, experiment, secret)
    (run,) = stored(uri, experiment)
    assert len(run.data.params) == 151
    assert "hunter2" not in str(run.to_dictionary())
    assert run.data.params["storage"] == "postgresql://***@h/db"


def test_a_deleted_experiment_is_an_error_that_says_how_to_go_on(uri: str, experiment: str) -> None:
    client = connect(uri)
    client.delete_experiment(client.create_experiment(experiment))
    with pytest.raises(StudyError, match=r"must not be deleted, .*mlflow experiments restore -x"):
        StudyRuns.open(uri, experiment, labels())


def test_a_file_that_is_no_database_is_an_error_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("not a database, but long enough to be taken for one\n" * 99)
    with pytest.raises(StudyError, match="MLflow store must be reachable, but sqlite:") as caught:
        StudyRuns.open(f"sqlite:///{path}", "x", labels())
    assert "\n" not in str(caught.value)


def test_nothing_is_printed_and_all_settings_are_as_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ), logging.getLogger("mlflow").level, logging.getLogger("alembic").level
    runs = StudyRuns.open(f"sqlite:///{tmp_path}/new/mlflow.db", "x", labels())
    runs.log_trial(build.trials(1)[0])
    runs.close("done")
    assert capfd.readouterr() == ("", "")
    after = dict(os.environ), logging.getLogger("mlflow").level, logging.getLogger("alembic").level
    assert after == before


def test_a_setting_of_the_user_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with quietly():
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (None, {}, "sqlite:////work/here/mlflow.db"),
        (None, {"MLFLOW_TRACKING_URI": "sqlite:///a.db"}, "sqlite:////work/here/a.db"),
        ("sqlite:///../a b.db?timeout=9", {}, "sqlite:////work/a b.db?timeout=9"),
        ("sqlite:////x/a.db", {"MLFLOW_TRACKING_URI": "http://h"}, "sqlite:////x/a.db"),
        ("http://h:5000", {}, "http://h:5000"),
        ("postgresql+psycopg2://h/db", {}, "postgresql+psycopg2://h/db"),
        ("databricks", {}, "databricks"),
    ],
)
def test_a_tracking_uri_is_made_absolute(
    given: str | None, environ: dict[str, str], expected: str
) -> None:
    assert resolve_tracking_uri(given, Path("/work/here"), environ=environ) == expected


@pytest.mark.parametrize("given", ["mlruns", "./mlruns", "/abs/mlruns", "file:///abs/mlruns"])
def test_a_folder_is_refused_with_what_is_accepted_instead(given: str) -> None:
    message = r"must not be a folder, .* accepted are sqlite:////.*mlruns/mlflow\.db, postgresql"
    with pytest.raises(StudyError, match=message):
        resolve_tracking_uri(given, Path("/work"), environ={})


@pytest.mark.parametrize(
    "given", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://a.db"]
)
def test_a_store_that_is_no_file_is_refused(given: str) -> None:
    with pytest.raises(StudyError, match="must name a database file"):
        resolve_tracking_uri(given, Path("/work"), environ={})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:pa/ss@w@h/db", "postgresql://***@h/db"),
        ("cannot reach http://tok@h:5000 now", "cannot reach http://***@h:5000 now"),
        ("mysql://h/db?password=a&ssl=1", "mysql://h/db?password=***&ssl=1"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
    ],
)
def test_secrets_are_redacted(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_an_error_is_redacted_before_it_is_shortened() -> None:
    error = OSError("x" * 180 + " postgresql://me:hunter2@" + "h" * 300)
    message = str(unusable("postgresql://me:hunter2@h/db", error))
    assert "hunter2" not in message
    assert len(message) < 400


class FakeRuns:
    """Counts what is written; fails as told."""

    parent_run_id = "p"

    def __init__(self, log: list[Any], fails: Callable[[int], bool] = lambda n: False) -> None:
        self.log, self.fails = log, fails

    def run_id(self, number: int) -> str | None:
        return f"run {number}"

    def log_trial(self, trial: Trial, result: object = None) -> None:
        if self.fails(trial.number):
            raise OSError(f"no connection to http://me:pw@h\nfor {trial.number}")
        self.log.append(trial.number)


def queue_of(open_runs: Callable[[], Any], warnings: list[str], **fields: Any) -> TrackingQueue:
    return TrackingQueue(open_runs, warnings.append, pauses=(0.01, 0.05), **fields)


def test_the_queue_writes_in_order_off_the_callers_thread() -> None:
    log: list[int] = []
    queue = queue_of(lambda: FakeRuns(log), [])
    trials = build.trials(9)
    for trial in trials:
        queue.log_trial(trial)
    assert queue.close(5)
    assert log == list(range(9))
    assert (queue.parent_run_id, queue.run_id(2)) == ("p", "run 2")


def test_a_store_that_comes_back_misses_nothing_and_is_reported_once() -> None:
    log, warnings, tries = [], [], itertools.count()

    def open_runs() -> Any:
        if next(tries) < 3:
            raise StudyError("nobody listens at http://me:hunter2@h")
        return FakeRuns(log)

    queue = queue_of(open_runs, warnings)
    for trial in build.trials(5):
        queue.log_trial(trial)
    assert queue.close(5)
    assert log == [0, 1, 2, 3, 4]
    message = "MLflow is not up to date (no result is lost): nobody listens at http://***@h"
    assert warnings == [message]


def test_a_write_that_cannot_be_made_is_dropped_and_the_rest_is_written() -> None:
    log: list[int] = []
    warnings: list[str] = []
    queue = queue_of(lambda: FakeRuns(log, lambda number: number == 2), warnings)
    for trial in build.trials(5):
        queue.log_trial(trial)
    assert not queue.close(5)
    assert (log, queue.dropped) == ([0, 1, 3, 4], 1)
    assert len(warnings) == 1
    assert "\n" not in warnings[0]


def test_a_dead_store_costs_the_caller_nothing_and_bounded_memory() -> None:
    def open_runs() -> Any:
        raise OSError("dead")

    queue = queue_of(open_runs, [], size=3)
    started = time.perf_counter()
    for trial in build.trials(40):
        queue.log_trial(trial)
    assert time.perf_counter() - started < 0.2
    assert queue.pending == 3
    assert not queue.close(0.1)
    assert queue.dropped == 40


def test_a_dead_store_is_not_waited_for() -> None:
    def open_runs() -> Any:
        raise OSError("dead")

    queue = queue_of(open_runs, [])
    queue.log_trial(build.trials(1)[0])
    started = time.perf_counter()
    assert not queue.drain(60)
    assert not queue.close(60)
    assert time.perf_counter() - started < 20


def test_images_are_inputs_with_their_digests_once(uri: str, experiment: str) -> None:
    images = tuple(
        ImagesLabel(split, f"photographs ({split})", split * 2, "/photographs", 9)
        for split in ("search", "holdout")
    )
    for _ in range(2):
        StudyRuns.open(uri, experiment, labels(images=images))
    (run,) = stored(uri, experiment)
    found = {
        (one.tags[0].value, one.dataset.name, one.dataset.digest)
        for one in run.inputs.dataset_inputs
    }
    assert len(run.inputs.dataset_inputs) == 2
    assert found == {(one.split, one.name, one.digest) for one in images}


def test_a_trial_that_runs_has_no_run(uri: str, experiment: str, runs: StudyRuns) -> None:
    trials = [dataclasses.replace(trial, state="running") for trial in build.trials(2)]
    runs.log_outcome(build.study(), trials, {})
    assert children(uri, experiment) == []


def test_what_the_queue_dropped_a_later_sync_writes(uri: str, experiment: str) -> None:
    trials = build.trials(6)
    queue = queue_of(lambda: StudyRuns.open(uri, experiment, labels()), [], size=2)
    for trial in trials:
        queue.log_trial(trial)
    queue.close(20)
    runs = StudyRuns.open(uri, experiment, labels())
    for trial in trials:
        runs.log_trial(trial)
    assert len(children(uri, experiment)) == 6


OPEN = """
import sys
from dsm_tune.reviewing.tracking import StudyLabels, StudyRuns
runs = StudyRuns.open(sys.argv[1], "x", StudyLabels("demo", sys.argv[2], "m", "d", "b"))
print(runs.parent_run_id)
"""


@pytest.mark.slow
def test_processes_that_open_a_fresh_store_at_once_share_it(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-c", OPEN, uri]
    started = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "aab"
    ]
    answers = [process.communicate(timeout=120)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(set(answers)) == 2


@contextlib.contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """A real MLflow server on loopback, in a process group of its own."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_server_killed_in_mid_search_ends_up_equal_to_one_that_was_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri, trials = f"http://127.0.0.1:{port}", build.trials(12)
    result, warnings = build.study(trials), []
    artifacts = {"report.html": "<p>hello", "pareto.png": b"png"}
    queue = queue_of(lambda: StudyRuns.open(uri, "hurt", labels()), warnings)
    with server(tmp_path, port):
        for trial in trials[:5]:
            queue.log_trial(trial)
        assert queue.drain(60)
    for trial in trials[5:]:
        queue.log_trial(trial)
    assert not queue.close(1)
    assert len(warnings) == 1
    with server(tmp_path, port):
        for name in ("hurt", "whole"):
            runs = StudyRuns.open(uri, name, labels())
            for trial in trials:
                runs.log_trial(trial)
            runs.log_outcome(result, trials, artifacts)
            runs.close("done")
        hurt, whole = everything(uri, "hurt"), everything(uri, "whole")
        client = MlflowClient(uri)
        names = [file.path for file in client.list_artifacts(runs.parent_run_id)]
    for runs_of in (hurt, whole):
        for _, _, _, _, tags in runs_of:
            tags.pop("mlflow.parentRunId", None)
    assert hurt == whole
    assert len(hurt) == 13
    assert names == ["pareto.png", "report.html"]
    assert capfd.readouterr().out == ""
