"""What ``submit`` sends to a cluster, what it keeps to itself, how it ends; Ray is made up here.

``test_cluster.py`` does the same with a real one.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.job_submission
from command_line import Ended

from dsm_tune.config import TuneConfig
from dsm_tune.submission import entrypoint, warnings

BUDGET = ("--budget-gflops", "60%")
FAR = ("--ray-address", "http://head.example:8265")
POSTGRES = "postgresql://tuner@db.example/studies"


@dataclasses.dataclass
class Cluster:
    """Stands for Ray's client: its jobs, and what each call to it shall do."""

    jobs: list[Any] = dataclasses.field(default_factory=list)
    submitted: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    addresses: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    states: list[tuple[str, int | None, str]] = dataclasses.field(default_factory=list)

    def __call__(self, address: str) -> Cluster:
        self.addresses.append((address, os.environ.get("RAY_ADDRESS")))
        return self

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def submit_job(self, **asked: Any) -> str:
        self.submitted.append(asked)
        return "raysubmit_1"

    def get_job_info(self, job_id: str) -> Any:
        if self.states[0][0] == "Ctrl-C":
            raise KeyboardInterrupt
        status, code, self.log = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return SimpleNamespace(
            submission_id=job_id, status=status, driver_exit_code=code, message="It ended."
        )

    def get_job_logs(self, job_id: str) -> str:
        return self.log


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(states=[("SUCCEEDED", 0, "one\ntwo\n")])
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", made)
    monkeypatch.setattr("dsm_tune.searching.jobs.POLL_SECONDS", 0.01)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    return made


Call = Callable[..., Ended]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--ray-address must be the address of a cluster's dashboard, such as http://"),
        (["--ray-address", "head:6379"], "but got 'head:6379'"),
        (["--ray-address", "http://me:word@head:8265"], "but got 'http://***@head:8265'"),
        ([*FAR, "--images", "photos"], "--images must be an absolute path on the cluster"),
        ([*FAR, "--checkpoint", "a.pth"], "--checkpoint must be an absolute path on the cluster"),
        ([*FAR, "--search-space", "mine.toml"], "--search-space must be an absolute path on the"),
        ([*FAR, "--storage", "sqlite:///here.db"], "--storage must be a server, or sqlite:////"),
        ([*FAR, "--tracking-uri", "sqlite:///m.db"], "--tracking-uri must be a server, or sqlite"),
        ([*FAR, "--json"], "--json needs the study's store as this machine reaches it: --storage"),
        ([*FAR, "--dry-run"], "there is no option --dry-run"),
    ],
)
def test_what_a_cluster_would_not_reach_is_refused_before_it_is_asked(
    call: Call, cluster: Cluster, arguments: list[str], expected: str
) -> None:
    assert expected in call("submit", *BUDGET, *arguments).error
    assert cluster.addresses == []


@pytest.mark.parametrize("name", ["--storage", "--tracking-uri"])
@pytest.mark.parametrize(
    "url", ["postgresql://me:hush@db/x", "https://me:hush@db/x", "postgresql://db/x?password=hush"]
)
def test_a_password_in_an_address_is_refused_and_not_repeated(
    call: Call, cluster: Cluster, name: str, url: str
) -> None:
    error = call("submit", *BUDGET, *FAR, name, url).error
    assert f"{name} must hold no password" in error
    assert "hush" not in error
    assert cluster.submitted == []


def test_a_dashboard_that_does_not_answer_is_one_line(call: Call) -> None:
    error = call("submit", *BUDGET, "--ray-address", "http://127.0.0.1:1").error
    assert "--ray-address must be the dashboard of a Ray cluster with a job server" in error


def test_the_job_is_told_what_was_given_and_nothing_of_this_machine(
    call: Call, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", "postgresql://me:hush@127.0.0.1:1/studies")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@there")
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere.example:8265")
    options = ("--trials", "12", "--study", "a b", "--tracking-uri", "http://there:5000")
    ended = call("submit", *BUDGET, *FAR, *options, "--driver-resource", "gpu")
    assert cluster.addresses == [("http://head.example:8265", None)]  # the option wins
    (job,) = cluster.submitted
    assert job["metadata"] == {"dsm_tune.study": "a b"}
    assert job["entrypoint_resources"] == {"gpu": 0.001}
    assert "hush" not in str(job)
    assert job["entrypoint"].endswith(
        "exec python -m dsm_tune tune --budget-gflops 60% --trials 12 --study 'a b' "
        "--tracking-uri http://there:5000"
    )
    assert ended.err.splitlines()[:3] == [
        "study a b: job raysubmit_1 on http://head.example:8265",
        "one",
        "two",
    ]


def test_the_study_has_the_same_name_there_as_here() -> None:
    config = TuneConfig(budget_gflops="60%", storage=POSTGRES, tracking_uri="http://there:5000")
    words = shlex.split(entrypoint(config))
    assert words[words.index("--study") + 1] == config.study_name


@pytest.mark.parametrize("given", [(), ("storage",), ("tracking_uri",)])
def test_a_job_without_stores_ends_before_it_begins(tmp_path: Path, given: tuple[str]) -> None:
    stores = {"storage": POSTGRES, "tracking_uri": "http://there:5000"}
    config = TuneConfig(budget_gflops="60%", **{name: stores[name] for name in given})
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    line = entrypoint(config)
    run = {"shell": True, "capture_output": True, "text": True}
    bare = subprocess.run(line, env={"PATH": str(tmp_path)}, **run)
    assert bare.returncode != 0
    assert bare.stdout == ""
    assert "must be set where the job runs" in bare.stderr
    environ = {"OPTUNA_STORAGE": "x", "MLFLOW_TRACKING_URI": "y", "PATH": str(tmp_path)}
    whole = subprocess.run(line, env=environ, **run)
    assert whole.stdout.splitlines()[:5] == ["-m", "dsm_tune", "tune", "--budget-gflops", "60%"]


def test_a_study_that_a_job_works_on_is_followed_not_begun_again(
    call: Call, cluster: Cluster
) -> None:
    cluster.jobs = [
        SimpleNamespace(
            submission_id=name,
            status=status,
            driver_exit_code=None,
            message="",
            metadata=metadata,
        )
        for name, status, metadata in [
            ("ended", "SUCCEEDED", {"dsm_tune.study": "s"}),
            ("other", "RUNNING", None),
            ("it", "RUNNING", {"dsm_tune.study": "s"}),
        ]
    ]
    ended = call("submit", *BUDGET, *FAR, "--study", "s")
    assert ended.code == 0
    assert cluster.submitted == []
    assert "study s: following job it on http://head.example:8265" in ended.err


@pytest.mark.parametrize(
    ("status", "code", "expected", "words"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 2, 2, "job raysubmit_1 ended with exit code 2"),
        ("FAILED", 3, 3, ""),
        ("FAILED", 130, 130, "ended with exit code 130"),
        ("FAILED", 1, 1, "error: job raysubmit_1 failed: It ended."),
        ("FAILED", None, 1, "error: job raysubmit_1 failed: It ended."),
        ("STOPPED", None, 130, "the job was stopped; the same command goes on with its study"),
    ],
)
def test_it_ends_as_its_job_ends(
    call: Call, cluster: Cluster, status: str, code: int | None, expected: int, words: str
) -> None:
    cluster.states = [("PENDING", None, ""), ("RUNNING", None, "a\nhal"), (status, code, "a\nhalf")]
    ended = call("submit", *BUDGET, *FAR, "--study", "s")
    assert ended.code == expected
    assert ended.err.splitlines()[1:3] == ["a", "half"]  # each line once, and whole
    assert words in ended.err


def test_ctrl_c_leaves_the_job_and_says_how_to_follow_and_stop_it(
    call: Call, cluster: Cluster
) -> None:
    cluster.states = [("Ctrl-C", None, "")]
    ended = call("submit", *BUDGET, *FAR)
    assert ended.code == 130
    for word in ("logs -f", "stop"):
        assert f"`ray job {word} raysubmit_1 --address http://head.example:8265`" in ended.err


def test_a_job_whose_answer_cannot_be_read_here_says_so(call: Call, cluster: Cluster) -> None:
    ended = call("submit", *BUDGET, *FAR, "--storage", "sqlite:////no/such/study.db")
    assert ended.code == 2
    assert "--storage is a file: the node where the job runs and this machine must" in ended.err
    assert "the job is done, but its answer must be readable from here" in ended.err


def test_addresses_of_this_machine_are_doubted_only_for_a_cluster_elsewhere() -> None:
    config = TuneConfig(
        budget_gflops="60%", storage="postgresql://127.0.0.1/x", tracking_uri="http://localhost:1"
    )
    assert warnings(config, "http://127.0.0.1:8265") == []
    assert [line.split()[0] for line in warnings(config, "http://head.example:8265")] == [
        "--storage",
        "--tracking-uri",
    ]
