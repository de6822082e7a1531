"""An MLflow server that dies in mid-search costs no trial, and ``sync`` makes its runs whole."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import run, start
from servers import free_port, mlflow_server, postgres, wait_until

from dsm_tune.reviewing.stores import connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        # MLflow 3.17 maps one relation with a loader that SQLAlchemy 2.1 deprecates.
        "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
    ),
]
TRIALS = 24  # long enough for MLflow to be there before the last
TUNE = ("--budget-gflops", "60%", "--study", "digits", "--trials", f"{TRIALS}", "--json")
OF_A_CLOCK = ("latency", "chosen_latency", "throughput", "evaluation_seconds")
OF_A_STUDY = ("mlflow.parentRunId", "dsm_tune.study_id", "mlflow.note.content")


def standing(uri: str) -> dict[str, Any]:
    """The runs of the one study there, by trial: all but ids and what a clock has said."""
    client = connect(uri)
    found = client.get_experiment_by_name("dsm-tune")
    shown: dict[str, Any] = {}
    if found is None:
        return shown
    for one in client.search_runs([found.experiment_id], max_results=1000):
        tags, metrics = one.data.tags, one.data.metrics
        key = tags.get("dsm_tune.trial", "study")
        assert key not in shown, f"two runs of {key}"
        shown[key] = {
            "name": one.info.run_name,
            "status": one.info.status,
            "params": one.data.params,
            "metrics": {k: v for k, v in metrics.items() if not k.startswith(OF_A_CLOCK)},
            "clock": sorted(k for k in metrics if k.startswith(OF_A_CLOCK)),
            "tags": {k: v for k, v in tags.items() if k not in OF_A_STUDY},
            "files": sorted(file.path for file in client.list_artifacts(one.info.run_id)),
            "inputs": sorted(one.dataset.digest for one in one.inputs.dataset_inputs),
        }
        if key == "study" and one.info.status == "FINISHED":
            assert "**A merged plan meets the budget" in tags["mlflow.note.content"]
        if key == "study":
            shown["steps"] = {
                name: [(m.step, m.value) for m in client.get_metric_history(one.info.run_id, name)]
                for name in ("hypervolume", "best_divergence", "trials_done")
            }
    return shown


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(*TUNE, cwd=folder, timeout=400).code == 0
    return standing(f"sqlite:///{folder}/mlflow.db")


def ended(folder: Path) -> int:
    """How many trials have ended, as the study's storage has it."""
    with contextlib.suppress(sqlite3.OperationalError):  # its tables are being made
        database = sqlite3.connect(f"file:{folder / 'dsm_tune.db'}?mode=ro", uri=True, timeout=30)
        try:
            question = "select count(*) from trials where state != 'RUNNING'"
            return int(database.execute(question).fetchone()[0])
        finally:
            database.close()
    return 0


def trial_runs(uri: str) -> int:
    client = connect(uri)
    found = client.get_experiment_by_name("dsm-tune")
    where = "tags.`dsm_tune.trial` LIKE '%'"
    return 0 if found is None else len(client.search_runs([found.experiment_id], where))


@contextlib.contextmanager
def backend(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder}/server.db"
    else:
        with postgres() as uri:
            yield uri


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_server_that_died_in_mid_search_has_after_sync_what_an_undisturbed_one_has(
    kind: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    port = free_port()
    with backend(kind, tmp_path) as store:
        with mlflow_server(tmp_path, port, store) as uri:
            tune = start(
                *TUNE,
                *("--tracking-uri", uri),
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            wait_until(
                lambda: trial_runs(uri) > 0 or tune.poll() is not None,
                "no trial has a run",
                seconds=400,
            )
            assert tune.poll() is None, tune.communicate()
            assert ended(tmp_path) < TRIALS
        out, err = tune.communicate(timeout=400)
        assert tune.returncode == 0, err
        assert f'"complete": {undisturbed_count(undisturbed, "complete")}' in out
        assert "`dsm-tune sync digits` writes what is missing" in err
        refused = run("sync", "digits", cwd=tmp_path)  # the server is still down
        assert refused.error.startswith("dsm-tune: error: the MLflow store must be reachable")
        with mlflow_server(tmp_path, port, store) as uri:
            assert len(standing(uri)) < len(undisturbed)
            synced = run("sync", "digits", "--json", cwd=tmp_path)
            assert synced.code == 0, synced
            assert synced.json["trials"] == TRIALS
            whole = standing(uri)
            assert run("sync", "digits", "--json", cwd=tmp_path).json["written"] == 0
            assert standing(uri) == whole
    whole["study"]["params"].pop("tracking_uri", None)
    assert whole == undisturbed


def undisturbed_count(shown: dict[str, Any], state: str) -> int:
    return sum(one["tags"].get("state") == state for k, one in shown.items() if k.isdigit())
