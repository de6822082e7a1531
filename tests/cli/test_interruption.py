"""A tune that is killed or interrupted in mid-search goes on where it was."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Ended, children, run, start
from processes import alive, descendants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TRIALS = 24
TUNE = ("--budget-gflops", "60%", "--study", "cut", "--trials", f"{TRIALS}", "--json")


def query(folder: Path, question: str) -> list[tuple[Any, ...]]:
    database = folder / "dsm_tune.db"
    if not database.is_file():
        return []
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)
    try:
        return connection.execute(question).fetchall()
    except sqlite3.OperationalError:  # its tables are being made
        return []
    finally:
        connection.close()


def evaluations(folder: Path) -> dict[tuple[int, str], str]:
    """What was evaluated, as it is stored; the seconds in it tell one run from another."""
    rows = query(
        folder,
        "select t.number, a.key, a.value_json from trials t join trial_user_attributes a "
        "on a.trial_id = t.trial_id where a.key like 'evaluation:%'",
    )
    return {(number, key): value for number, key, value in rows}


def ended(folder: Path) -> dict[int, tuple[Any, ...]]:
    rows = query(
        folder,
        "select t.number, t.state, t.datetime_complete, a.value_json from trials t "
        "join trial_user_attributes a on a.trial_id = t.trial_id "
        "where a.key = 'plan' and t.state != 'RUNNING'",
    )
    return {row[0]: row[1:] for row in rows}


def wait_for_the_middle_of_a_generation(process: subprocess.Popen[str], folder: Path) -> None:
    end = time.monotonic() + 400
    while time.monotonic() < end:
        assert process.poll() is None, (folder / "err.txt").read_text()
        done = set(ended(folder))
        if done and {number for number, _ in evaluations(folder)} - done:
            return
        time.sleep(0.05)
    raise AssertionError("the search has not come to its second generation in time")


@contextlib.contextmanager
def tuning(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A tune in mid-search; whatever is left of it is ended."""
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        process = start(*TUNE, cwd=folder, stdout=out, stderr=err)
        below: set[int] = set()
        try:
            wait_for_the_middle_of_a_generation(process, folder)
            below = descendants(process.pid)
            yield process
            end = time.monotonic() + 120
            while alive(below) and time.monotonic() < end:
                time.sleep(0.5)
            assert not alive(below), "Ray outlives its driver"
        finally:
            for pid in alive(below | descendants(process.pid) | {process.pid}):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def check_finished(folder: Path, resumed: Ended) -> None:
    assert resumed.code == 0, resumed
    document = resumed.json
    counts = document["trials"]
    assert document["status"] == "done"
    assert counts["complete"] + counts["pruned"] + counts["failed"] == TRIALS
    assert counts["failed"] == 0
    found = children(folder, document["parent_run_id"])
    assert sorted(int(one["tags"]["dsm_tune.trial"]) for one in found) == list(range(TRIALS))
    digests = [one["tags"]["plan_digest"] for one in found]
    assert len(set(digests)) == TRIALS
    pareto = {one["run_id"] for one in found if one["tags"]["pareto"] == "true"}
    assert pareto == {one["run_id"] for one in document["front"]}


def test_a_killed_tune_resumes_without_losing_or_repeating_a_trial(tmp_path: Path) -> None:
    with tuning(tmp_path) as process:
        process.kill()
        process.wait()
        done, evaluated = ended(tmp_path), evaluations(tmp_path)
    shown = run("show", "cut", "--json", cwd=tmp_path)
    assert shown.code == 0
    assert shown.json["status"] == "running"
    resumed = run("resume", "cut", "--json", cwd=tmp_path, timeout=500)
    check_finished(tmp_path, resumed)
    assert evaluated.items() <= evaluations(tmp_path).items()
    assert done.items() <= ended(tmp_path).items()


def test_ctrl_c_finishes_what_runs_saves_and_resumes(tmp_path: Path) -> None:
    with tuning(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes too
        assert process.wait(timeout=120) == 130
        done, evaluated = ended(tmp_path), evaluations(tmp_path)
    interrupted = Ended(130, (tmp_path / "out.txt").read_text(), (tmp_path / "err.txt").read_text())
    assert interrupted.json["status"] == "interrupted"
    assert interrupted.err.splitlines()[-1] == (
        "dsm-tune: interrupted, saved; go on with: dsm-tune resume cut"
    )
    assert "Traceback" not in interrupted.err
    check_finished(tmp_path, run("resume", "cut", "--json", cwd=tmp_path, timeout=500))
    assert evaluated.items() <= evaluations(tmp_path).items()
    assert done.items() <= ended(tmp_path).items()


def test_a_second_process_on_a_study_that_runs_is_refused_in_one_line(tmp_path: Path) -> None:
    with tuning(tmp_path) as process:
        refused = run("resume", "cut", cwd=tmp_path, timeout=100)
        process.kill()
        process.wait()
    assert "the study 'cut' must be run by one process at a time" in refused.error
    assert f"and process {process.pid} on " in refused.error
    assert run("show", "cut", "--json", cwd=tmp_path).json["faults"] == []
