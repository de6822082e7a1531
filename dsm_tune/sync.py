"""``dsm-tune sync``: what MLflow lacks of a study, written from the study's storage alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dsm_tune.answer import Answer, load_study
from dsm_tune.config import TuneConfig, absolute_storage
from dsm_tune.errors import DsmTuneError, StudyError
from dsm_tune.reviewing.outcome import artifacts, labels_of
from dsm_tune.reviewing.stores import redact, resolve_tracking_uri, unusable
from dsm_tune.searching.importance import parameter_importance
from dsm_tune.searching.study import Study

__all__ = ["Synced", "sync"]


@dataclasses.dataclass(frozen=True)
class Synced:
    """What stands in MLflow now.

    Attributes:
        study: its name.
        tracking_uri: of the store, without secrets.
        parent_run_id: the study's run.
        trials: how many trials have a run.
        written: how many runs, the study's included, lacked something.
        files: names of the study run's artifacts.
    """

    study: str
    tracking_uri: str
    parent_run_id: str
    trials: int
    written: int
    files: tuple[str, ...]


def sync(study: str, *, storage: str | None = None, tracking_uri: str | None = None) -> Synced:
    """Write to MLflow what it lacks of a study: runs, metrics, tags, figures, report.

    Doing it twice is the same as doing it once; it may be done while the study runs.

    Args:
        study: its name.
        storage: database URL; as for :func:`dsm_tune.tune`.
        tracking_uri: of the MLflow store; by default where the study's runs are. From another one
            on, they are there.

    Raises:
        StudyError: if there is no such study, its search has not begun, or MLflow cannot be
            reached; what was written until then stays.
    """
    found = load_study(absolute_storage(storage, Path.cwd()), study)
    facts = found.facts
    if facts.get("limits") is None:
        raise StudyError(
            f"the study {study!r} has not begun its search yet, there is nothing to write; "
            "try again in a moment"
        )
    uri = resolve_tracking_uri(tracking_uri or facts.get("tracking_uri"), Path.cwd())
    stored = {key: value for key, value in facts["config"].items() if key != "by_name"}
    config = TuneConfig.from_dict(stored)

    from dsm_tune.reviewing.tracking import StudyRuns  # MLflow takes seconds

    labels = labels_of(study, facts, config)
    runs = StudyRuns.open(uri, config.experiment, labels, runs_now=False)
    try:
        return _write(runs, found, config, uri)
    except DsmTuneError:
        raise
    except Exception as error:  # MLflow lets the errors of its libraries through
        raise unusable(uri, error) from error


def _write(runs: Any, study: Study, config: TuneConfig, uri: str) -> Synced:
    """Trials first, for the report names their runs; then the answer."""
    answer = Answer.of(study)
    for record in answer.records:
        runs.log_trial(answer.trial(record))
        if stood := record.progress:
            done = stood["done"]
            runs.log_progress(done, stood["hypervolume"], stood["best_divergence"], done)
    parent = runs.parent_run_id
    ids = {str(r.number): run for r in answer.records if (run := runs.run_id(r.number))}
    for key, value in {"tracking_uri": uri, "parent_run_id": parent, "run_ids": ids}.items():
        if study.facts.get(key) != value:
            study.put(key, value)
    answer = Answer.of(study)  # it names the runs now
    result = answer.result()
    trials = answer.trials(result.front)
    importance, samples = parameter_importance(study), study.facts.get("token_samples")
    files = artifacts(result, trials, config, importance, samples)
    runs.log_outcome(result, trials, files)
    runs.close(result.status)
    return Synced(
        study.name, redact(uri), parent, len(ids), len(runs.written), tuple(sorted(files))
    )
