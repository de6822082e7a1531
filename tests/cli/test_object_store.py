"""Artifacts go through the MLflow server to S3-compatible storage, whose keys it alone has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Ended, environment, run
from secrecy import CommandLines, files_below, places_of
from servers import BUCKET, ObjectStore, free_port, mlflow_server, object_store

from dsm_tune.reviewing.stores import connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        # MLflow 3.17 maps one relation with a loader that SQLAlchemy 2.1 deprecates.
        "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning",
    ),
]
TUNE = ("--budget-gflops", "60%", "--study", "digits", "--trials", "12", "--json")
ARTIFACTS = {"report.html", "trials.csv", "pareto.html", "pareto.png", "front.json", "config.toml"}


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A tune whose artifacts lie in an object store.

    Attributes:
        folder: where it ran.
        servers: where the servers keep what they keep.
        uri: of the MLflow server.
        objects: the object store.
        ended: what the tune printed.
        commands: command lines of all processes while it ran.
    """

    folder: Path
    servers: Path
    uri: str
    objects: ObjectStore
    ended: Ended
    commands: frozenset[str]

    def run(self, *arguments: str) -> Ended:
        return run(*arguments, cwd=self.folder, MLFLOW_TRACKING_URI=self.uri)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    servers, folder = tmp_path_factory.mktemp("servers"), tmp_path_factory.mktemp("tune")
    with (
        object_store(servers) as objects,
        mlflow_server(servers, free_port(), f"sqlite:///{servers}/server.db", objects) as uri,
    ):
        with CommandLines() as watch:
            ended = run(*TUNE, cwd=folder, timeout=500, MLFLOW_TRACKING_URI=uri)
        assert ended.code == 0, ended
        yield Tuned(folder, servers, uri, objects, ended, frozenset(watch.seen))


def documents(tuned: Tuned) -> list[dict[str, Any]]:
    """All that MLflow says of all runs."""
    client = connect(tuned.uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return [one.to_dictionary() for one in client.search_runs(experiments, max_results=1000)]


def test_a_tune_without_keys_has_its_artifacts_in_the_object_store(tuned: Tuned) -> None:
    assert not [name for name in environment() if name.startswith(("AWS_", "MLFLOW_S3_"))]
    parent = tuned.ended.json["parent_run_id"]
    stored = {
        name.partition(f"/{parent}/artifacts/")[2]: size
        for name, size in tuned.objects.objects().items()
        if f"/{parent}/artifacts/" in name
    }
    assert stored.keys() >= ARTIFACTS
    assert min(stored.values()) > 0
    listed = {file.path for file in connect(tuned.uri).list_artifacts(parent)}
    assert listed >= ARTIFACTS
    assert not list(tuned.folder.rglob("mlartifacts"))  # nothing of it was kept here


def test_an_artifact_comes_back_through_the_server_as_it_was_stored(
    tuned: Tuned, tmp_path: Path
) -> None:
    parent = tuned.ended.json["parent_run_id"]
    file = connect(tuned.uri).download_artifacts(parent, "report.html", str(tmp_path))
    wanted = f"{parent}/artifacts/report.html"
    (name,) = [one for one in tuned.objects.objects() if one.endswith(wanted)]
    stored = tuned.objects.client().get_object(Bucket=BUCKET, Key=name)["Body"].read()
    assert Path(file).read_bytes() == stored
    assert b"</html>" in stored


def test_a_run_is_exported_and_registered_where_its_model_goes_to_the_object_store(
    tuned: Tuned,
) -> None:
    run_id = tuned.ended.json["chosen"]["run_id"]
    before = tuned.objects.objects()
    ended = tuned.run("export", run_id, "-o", "out", "--register", "digits", "--json")
    assert ended.code == 0, ended
    assert (tuned.folder / "out" / "model.safetensors").is_file()
    assert tuned.run("verify", "out", "--json").json["findings"][1]["status"] == "ok"
    added = tuned.objects.objects().keys() - before.keys()
    assert [name for name in added if name.endswith("MLmodel")]
    version = connect(tuned.uri).get_model_version_by_alias("digits", "champion")
    assert version.run_id == run_id


def test_no_key_of_the_object_store_is_in_logs_command_lines_runs_or_the_study(
    tuned: Tuned,
) -> None:
    runs = documents(tuned)
    assert len(runs) == 13  # the study and its trials
    texts: dict[str, str | bytes] = {
        "standard output": tuned.ended.out,
        "standard error": tuned.ended.err,
        "runs": str(runs),
        **{f"command line: {line}": line for line in tuned.commands},
        **files_below(tuned.folder, tuned.servers),  # the study, MLflow's database, both logs
    }
    assert places_of("mlflow server", texts.items())  # what is looked at is there
    assert places_of(f"PUT /{BUCKET}/", texts.items()) == [str(tuned.servers / "objects.log")]
    assert places_of(tuned.objects.secret_key, texts.items()) == []
    # A signed URL names the key that signed it, and the store logs what it is asked for.
    assert set(places_of(tuned.objects.access_key, texts.items())) <= {
        str(tuned.servers / "objects.log")
    }
