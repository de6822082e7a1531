"""MLflow is written in a process of its own, whose end in any way costs the search nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import study_builder as build

from dsm_tune.reviewing.queue import TrackingQueue
from dsm_tune.reviewing.stores import connect
from dsm_tune.reviewing.tracking import StudyLabels, StudyRuns
from dsm_tune.reviewing.writer import Writer

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 maps one relation with a loader that SQLAlchemy 2.1 deprecates.
    "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
)
REPOSITORY = Path(__file__).resolve().parents[2]


def labels(study_id: str = "a1") -> StudyLabels:
    return StudyLabels("demo", study_id, "deit_tiny", "cpu", "0.9 GMACs")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = f"sqlite:///{tmp_path_factory.mktemp('a store')}/mlflow.db"
    connect(made)
    return made


def queue_on(
    uri: str, experiment: str, warnings: list[str], study_id: str = "a1"
) -> tuple[TrackingQueue, Writer]:
    writer = Writer(uri, experiment, labels(study_id))
    return TrackingQueue(writer.open, warnings.append, end=writer.end, pauses=(0.1, 0.5)), writer


def standing(uri: str, experiment: str) -> list[tuple[Any, ...]]:
    """All that a person sees of an experiment, but for ids and times."""
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    shown = []
    for run in client.search_runs([found.experiment_id], max_results=1000):
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        files = sorted(file.path for file in client.list_artifacts(run.info.run_id))
        info = run.info.run_name, run.info.status
        shown.append((*info, run.data.params, run.data.metrics, tags, files))
    return sorted(shown, key=lambda one: int(one[4].get("dsm_tune.trial", -1)))


def is_gone(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{process_id}/stat")
    with contextlib.suppress(OSError):
        return state.read_text().rpartition(")")[2].split()[0] == "Z"  # nobody reaps it here
    return False


def wait_until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_what_the_process_writes_is_what_would_be_written_here(uri: str) -> None:
    trials = build.trials(8)
    result = build.study(trials)
    runs = StudyRuns.open(uri, "here", labels())
    warnings: list[str] = []
    queue, writer = queue_on(uri, "there", warnings)
    for trial in trials:
        runs.log_trial(trial)
        queue.log_trial(trial)
    files = {"pareto.png": b"png", "trials.csv": "a,b\n"}
    for one in (runs, queue):
        one.log_progress(8, 0.5, 0.04, 8)
        one.log_outcome(result, trials, files)
    runs.close("done")
    queue.close_runs("done")
    assert queue.drain(60)
    process = writer.process_id
    assert process is not None
    ids = {number: queue.run_id(number) for number in range(8)}
    parent = queue.parent_run_id
    assert queue.close(60)
    assert warnings == []
    assert standing(uri, "there") == standing(uri, "here")
    again = StudyRuns.open(uri, "there", labels())
    assert (again.parent_run_id, again.run_ids) == (parent, ids)
    assert is_gone(process)


def test_a_killed_writer_is_replaced_and_nothing_is_missing(uri: str) -> None:
    warnings: list[str] = []
    queue, writer = queue_on(uri, "killed", warnings)
    trials = build.trials(8)
    for trial in trials[:4]:
        queue.log_trial(trial)
    assert queue.drain(60)
    first = writer.process_id
    assert first is not None
    os.kill(first, signal.SIGKILL)
    for trial in trials[4:]:
        queue.log_trial(trial)
    assert queue.close(60)
    assert len(warnings) <= 1  # none, where it was dead before it was asked
    names = [one[4]["dsm_tune.trial"] for one in standing(uri, "killed")[1:]]
    assert names == [str(number) for number in range(8)]


def test_a_writer_that_does_not_move_holds_up_nobody(uri: str) -> None:
    warnings: list[str] = []
    queue, writer = queue_on(uri, "stopped", warnings)
    trials = build.trials(6)
    queue.log_trial(trials[0])
    assert queue.drain(60)
    process = writer.process_id
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    started = time.perf_counter()
    for trial in trials[1:]:
        queue.log_trial(trial)
    assert time.perf_counter() - started < 1
    assert not queue.close(0.5)
    assert (queue.dropped, queue.error) == (5, "it did not keep up within 0.5 s")
    assert is_gone(process)


@pytest.mark.slow
def test_two_studies_at_once_on_one_new_store_do_not_mix(tmp_path: Path) -> None:
    uri, warnings = f"sqlite:///{tmp_path}/mlflow.db", list[str]()
    queues = [queue_on(uri, "shared", warnings, study)[0] for study in ("one", "two")]
    trials = build.trials(7)
    for trial in trials:
        queues[0].log_trial(trial)
        if trial.number < 4:
            queues[1].log_trial(trial)
    for queue in queues:
        queue.close_runs("done")
    assert [queue.close(60) for queue in queues] == [True, True], warnings
    client = connect(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'shared'")
    for study, count in (("one", 7), ("two", 4)):
        where = f"tags.`dsm_tune.study_id` = '{study}'"
        (parent,) = client.search_runs([experiment.experiment_id], where)
        where = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        found = client.search_runs([experiment.experiment_id], where)
        assert sorted(run.data.tags["dsm_tune.trial"] for run in found) == [
            str(number) for number in range(count)
        ]


# Without `if __name__ == "__main__"`, as a reader of the README writes it.
SCRIPT = """
import os, sys, time
import study_builder as build
from dsm_tune.reviewing.queue import TrackingQueue
from dsm_tune.reviewing.records import StudyLabels
from dsm_tune.reviewing.writer import Writer

print("begins", flush=True)
writer = Writer(sys.argv[1], "script", StudyLabels("demo", "s", "m", "d", "b"))
queue = TrackingQueue(writer.open, print, end=writer.end)
queue.log_trial(build.trials(4)[3])
print(queue.drain(60), "mlflow" in sys.modules, writer.process_id, flush=True)
time.sleep(600)
"""


def test_a_scripts_writer_runs_no_line_of_it_and_dies_with_it(uri: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, str(script), uri],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "begins\n"
        done, has_mlflow, writer = process.stdout.readline().split()
        assert (done, has_mlflow) == ("True", "False")
        assert not is_gone(int(writer))
        process.kill()
        process.wait()
        wait_until(lambda: is_gone(int(writer)), "the writer outlives its script")
        assert process.stdout.read() == ""


def test_a_store_that_cannot_be_used_is_the_same_error_as_here(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("not a database, but long enough to be taken for one\n" * 99)
    warnings: list[str] = []
    queue, _ = queue_on(f"sqlite:///{path}", "x", warnings)
    queue.log_trial(build.trials(1)[0])
    assert not queue.close(60)
    (warning,) = warnings
    assert warning.startswith(
        "MLflow is not up to date (no result is lost): the MLflow store must be reachable, but sql"
    )
