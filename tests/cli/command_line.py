"""Runs the real command line: in this process, or in one of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
STORES = ("OPTUNA_STORAGE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_ADDRESS")


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error: exit 2, nothing on stdout."""
        assert self.code == 2, self
        assert self.out == "", self
        assert len(self.err.splitlines()) == 1, self
        assert self.err.startswith("dsm-tune: error: "), self
        return self.err.strip()


def answer(document: Any) -> dict[str, Any]:
    """What a study's document says of its plans, wherever it ran and whatever happened meanwhile.

    That is all but times, ids, names and faults.
    """

    def shown(result: Any) -> Any:
        names = ("trial", "gmacs", "plan", "divergence", "divergence_search", "agreement", "top1")
        return {name: result[name] for name in names}

    return {
        **{name: document[name] for name in ("status", "delay", "similarity_curve", "trials")},
        **{name: shown(document[name]) for name in ("dense", "tome", "dsm", "chosen")},
        "front": [shown(one) for one in document["front"]],
    }


def environment(**more: str) -> dict[str, str]:
    """This process's, less what would lead a tune elsewhere, and less keys of object stores."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in STORES and not key.startswith(("AWS_", "MLFLOW_S3_"))
    }
    path = os.pathsep.join(filter(None, [str(REPOSITORY), kept.get("PYTHONPATH", "")]))
    return {**kept, "PYTHONPATH": path, "COLUMNS": "80", **more}


def start(*arguments: str, cwd: Path, **more: Any) -> subprocess.Popen[str]:
    """Start ``dsm-tune`` in a session of its own, as a terminal does."""
    command = [sys.executable, "-m", "dsm_tune", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment(), text=True, start_new_session=True, **more
    )


def run(*arguments: str, cwd: Path, timeout: float = 280, **more: str) -> Ended:
    """Run ``dsm-tune`` as a process."""
    command = [sys.executable, "-m", "dsm_tune", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment(**more), text=True, capture_output=True, timeout=timeout
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> Mapping[str, str]:
    """Digests of all files below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def runs(folder: Path) -> list[dict[str, Any]]:
    """MLflow's runs with their tags, as they lie in its database."""
    database = sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)
    try:
        found = []
        for run_id, status in database.execute("select run_uuid, status from runs"):
            rows = database.execute("select key, value from tags where run_uuid = ?", [run_id])
            found.append({"run_id": run_id, "status": status, "tags": dict(rows.fetchall())})
        return found
    finally:
        database.close()


def children(folder: Path, parent: str) -> list[dict[str, Any]]:
    return [one for one in runs(folder) if one["tags"].get("mlflow.parentRunId") == parent]
