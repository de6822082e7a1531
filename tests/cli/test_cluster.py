"""A tune submitted to three nodes, with PostgreSQL, MLflow and an object store, for real."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Ended, answer, environment, run
from ray_nodes import ray_nodes
from secrecy import CommandLines, files_below, places_of
from servers import ObjectStore, free_port, mlflow_server, object_store, postgres, wait_until

from dsm_tune.reviewing.stores import connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        # MLflow 3.17 maps one relation with a loader that SQLAlchemy 2.1 deprecates.
        "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
    ),
]
TRIALS = 12
TUNE = ("--budget-gflops", "60%", "--trials", f"{TRIALS}", "--seed", "3", "--workers", "2")


@dataclasses.dataclass(frozen=True)
class Site:
    """A cluster with its stores.

    Attributes:
        address: of the dashboard.
        storage: of the studies, its password included.
        tracking_uri: of the MLflow server.
        password: of the database.
        objects: where the MLflow server puts artifacts.
        logs: folders with what servers and nodes wrote.
    """

    address: str
    storage: str
    tracking_uri: str
    password: str
    objects: ObjectStore
    logs: tuple[Path, ...]

    @property
    def environ(self) -> dict[str, str]:
        """The environment that nodes and clients have."""
        return {"OPTUNA_STORAGE": self.storage, "MLFLOW_TRACKING_URI": self.tracking_uri}

    def submit(self, *arguments: str, cwd: Path) -> Ended:
        words = ("submit", *TUNE, *arguments, "--ray-address", self.address)
        return run(*words, cwd=cwd, timeout=500, **self.environ)


def make_database(url: str, name: str) -> str:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{url.rpartition('/')[0]}/{name}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgres())
        storage = make_database(database, "studies")
        backend = make_database(database, "mlflow")
        objects = stack.enter_context(object_store(folder))
        uri = stack.enter_context(mlflow_server(folder, free_port(), backend, objects))
        environ = {"OPTUNA_STORAGE": storage, "MLFLOW_TRACKING_URI": uri}
        address, nodes = stack.enter_context(ray_nodes("left", "right", **environ))
        password = database.split(":")[2].partition("@")[0]
        yield Site(address, storage, uri, password, objects, (folder, nodes))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("local")
    ended = run(*TUNE, "--json", cwd=folder, timeout=500)
    assert ended.code == 0, ended
    return answer(ended.json)


def query(site: Site, question: str) -> list[tuple[Any, ...]]:
    import psycopg

    with psycopg.connect(site.storage) as connection:
        return connection.execute(question).fetchall()


def test_a_submitted_tune_gives_the_answer_of_a_local_one(
    site: Site, local: dict[str, Any], tmp_path: Path
) -> None:
    with CommandLines() as watch:
        done = site.submit("--study", "whole", "--driver-resource", "right", "--json", cwd=tmp_path)
    assert done.code == 0, done
    assert answer(done.json) == local
    assert "study whole: job raysubmit_" in done.err
    assert f"{TRIALS}/{TRIALS} trials" in done.err
    assert list(tmp_path.iterdir()) == []  # nothing is kept on the client

    client = connect(site.tracking_uri)
    found = client.get_experiment_by_name("dsm-tune")
    runs = client.search_runs([found.experiment_id], "tags.`dsm_tune.study` = 'whole'")
    assert {one.info.status for one in runs} == {"FINISHED", "KILLED"}  # the latter are pruned
    assert sorted(int(one.data.tags.get("dsm_tune.trial", -1)) for one in runs) == [
        -1,
        *range(TRIALS),
    ]
    parent = done.json["parent_run_id"]
    stored = site.objects.objects()
    for name in ("report.html", "trials.csv", "pareto.png", "front.json"):
        assert [key for key in stored if key.endswith(f"{parent}/artifacts/{name}")], stored

    facts = query(site, "select key, value_json from study_user_attributes")
    assert "config" in dict(facts)
    from ray.job_submission import JobSubmissionClient

    jobs = JobSubmissionClient(site.address).list_jobs()
    assert any((job.metadata or {}).get("dsm_tune.study") == "whole" for job in jobs)
    logs = [
        JobSubmissionClient(site.address).get_job_logs(job.submission_id)
        for job in jobs
        if job.submission_id
    ]
    assert any(f"{TRIALS}/{TRIALS} trials" in log for log in logs)
    texts: dict[str, str | bytes] = {
        "client": done.out + done.err,
        "runs": str([one.to_dictionary() for one in runs]),
        "facts": str(facts),
        "jobs": str(jobs),
        "logs of jobs": str(logs),
        **{f"command line: {line}": line for line in watch.seen},
        **files_below(*site.logs),
    }
    assert places_of("mlflow server", texts.items())  # what is looked at is there
    for secret in (site.password, site.objects.access_key, site.objects.secret_key):
        assert places_of(secret, texts.items()) == []


def test_a_job_outlives_its_client_and_goes_on_after_it_was_stopped(
    site: Site, local: dict[str, Any], tmp_path: Path
) -> None:
    words = ("submit", *TUNE, "--study", "cut", "--ray-address", site.address)
    with (tmp_path / "err.txt").open("w") as err:
        client = subprocess.Popen(
            [sys.executable, "-m", "dsm_tune", *words],
            cwd=tmp_path,
            env=environment(**site.environ),
            stderr=err,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def said() -> str:
        return (tmp_path / "err.txt").read_text()

    wait_until(
        lambda: "searching default" in said() or client.poll() is not None, "no search", seconds=400
    )
    assert client.poll() is None, said()
    os.killpg(client.pid, signal.SIGINT)
    assert client.wait(timeout=60) == 130
    assert "the job goes on without this command; `ray job logs -f raysubmit_" in said()

    from ray.job_submission import JobStatus, JobSubmissionClient

    server = JobSubmissionClient(site.address)
    (job,) = [
        one for one in server.list_jobs() if (one.metadata or {}).get("dsm_tune.study") == "cut"
    ]
    assert job.status == JobStatus.RUNNING
    server.stop_job(job.submission_id)
    wait_until(
        lambda: server.get_job_status(job.submission_id) == JobStatus.STOPPED, "it does not stop"
    )
    done = site.submit("--study", "cut", "--json", cwd=tmp_path)
    assert done.code == 0, done
    assert "continuing the study cut" in done.err
    assert answer(done.json) == local
