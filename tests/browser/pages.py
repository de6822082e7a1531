"""The command line as a process, the MLflow page that it serves, and what lies in its store."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
STORES = ("OPTUNA_STORAGE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_ADDRESS")
DRAWN = "return document.querySelectorAll('#figure .scatterlayer .points path').length"

FIRST_OF_FRONT = """
const figure = document.getElementById('figure');
const front = figure.data.find((one) => one.name.startsWith('front'));
const { xaxis, yaxis } = figure._fullLayout;
const box = figure.getBoundingClientRect();
return [
  box.x + xaxis._offset + xaxis.l2p(front.x[0]), box.y + yaxis._offset + yaxis.l2p(front.y[0])
];
"""


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if key not in STORES}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), kept.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-m", "dsm_tune", *arguments],
        cwd=cwd,
        env={**kept, "PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@contextlib.contextmanager
def serving(study: str, folder: Path) -> Iterator[str]:
    """The address that ``dsm-tune ui STUDY`` says: the page of the study's run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = command("ui", study, "--port", f"{port}", cwd=folder)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/#/runs/[0-9a-f]{32}", said)
        assert found, said
        yield found[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()  # a shell that starts tests in the background ignores SIGINT
        process.communicate(timeout=60)


def file_of(folder: Path, name: str) -> str:
    (found,) = (folder / "mlartifacts").rglob(name)
    return found.as_uri()


def front(folder: Path) -> list[str]:
    """Names of the runs on the front, as they lie in MLflow's database."""
    database = sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)
    question = (
        "select name from runs join tags on tags.run_uuid = runs.run_uuid "
        "where tags.key = 'pareto' and tags.value = 'true'"
    )
    try:
        return [name for (name,) in database.execute(question)]
    finally:
        database.close()
