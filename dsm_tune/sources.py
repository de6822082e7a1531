"""What is to go to production: a study's choice, the plan of a run, or a plan in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsm_tune.answer import Answer, load_study
from dsm_tune.config import TuneConfig, absolute_storage
from dsm_tune.errors import StudyError
from dsm_tune.inputs import load_model
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.loading import weights_digest
from dsm_tune.methods import read_plan, trials_of_run
from dsm_tune.plan import MergePlan
from dsm_tune.results import Result
from dsm_tune.searching.store import study_names

__all__ = ["Source", "of_plan", "of_study"]


@dataclasses.dataclass(frozen=True)
class Source:
    """What is to be exported.

    Attributes:
        config: makes the model; names the images.
        model: dense, in its dtype, on the CPU, in evaluation mode.
        plan: made for its geometry.
        made: where it is from and what was measured, for the manifest.
        tracking_uri: where its runs are, if it is of a study.
    """

    config: TuneConfig
    model: nn.Module
    plan: MergePlan
    made: Mapping[str, Any]
    tracking_uri: str | None = None


def of_study(study_or_run: str, storage: str | None) -> Source:
    """The choice of a study, or the plan of one of its MLflow runs.

    Args:
        study_or_run: name of a study; or id of a trial's run, or eight or more of its first digits.
        storage: database URL; as for :func:`dsm_tune.tune`.

    Raises:
        StudyError: if there is neither, nothing was chosen, or the weights are others now.
    """
    url = absolute_storage(storage, Path.cwd())
    if study_or_run not in study_names(url):
        found = trials_of_run(study_or_run, url)
        if len(found) == 1:
            study, number = found[0]
            answer = Answer.of(study)
            return _tuned(answer, _complete(answer, number))
    answer = Answer.of(load_study(url, study_or_run))
    if answer.facts.get("limits") is None:
        raise StudyError(f"the study {study_or_run!r} has not begun its search yet")
    chosen = answer.choose(answer.front())
    if chosen is None:
        raise StudyError(
            f"the study {study_or_run!r} must have a plan within its budget to be exported, "
            f"but has none; `dsm-tune show {study_or_run}` says what is reachable"
        )
    return _tuned(answer, chosen)


def _complete(answer: Answer, number: int) -> Result:
    for record in answer.records:
        if record.number == number and record.state == "complete":
            return answer.result_of(record)
    raise StudyError(f"the run {answer.run_ids[number]} must be of a complete trial, but it is not")


def _tuned(answer: Answer, chosen: Result) -> Source:
    facts, stored = answer.facts, dict(answer.facts["config"])
    if not stored.pop("by_name", True):
        raise StudyError(
            f"the study {answer.name!r} was made for a module in Python, which only its program "
            "can make; dsm_tune.merged(module, plan) runs its plan"
        )
    config = TuneConfig.from_dict(stored)
    model = load_model(config)
    known = facts.get("weights_digest")
    if known is not None and known != weights_digest(model):
        raise StudyError(
            f"the weights must be those that the study {answer.name!r} was made with, "
            f"but {config.checkpoint or config.model_name} has others now"
        )
    profile, result = answer.profile, answer.result()
    described = {} if profile is None else dict(profile.device)
    made = {
        "study": answer.name,
        "run_id": chosen.run_id,
        "command": config.command,
        "device": {**facts["device"], "described": described},
        **_serving(config),
        "limits": facts["limits"],
        "images": facts["images"],
        "dense": _figures(result.dense),
        "exported": _figures(chosen),
    }
    return Source(config, _typed(model, config.dtype), chosen.plan, made, facts.get("tracking_uri"))


def _serving(config: TuneConfig) -> dict[str, Any]:
    """How it is to be timed where it is verified."""
    served = {"runtime": config.runtime, "batch_size": config.batch_size, "device": config.device}
    return {"serving": served, "threads": config.threads, "stat": config.latency_stat}


def _figures(result: Result) -> dict[str, Any]:
    return {name: value for name, value in result.to_dict().items() if name != "plan"}


def of_plan(file: str, config: TuneConfig) -> Source:
    """A plan in a file, for the model of a configuration.

    Raises:
        ConfigError: if the file cannot be read.
        PlanError: if it is no plan, or made for another model.
        ModelError: if the model cannot be made.
    """
    model = load_model(config)
    plan = read_plan(file, read_geometry(model))
    return Source(config, _typed(model, config.dtype), plan, _serving(config))


def _typed(model: nn.Module, dtype: str) -> nn.Module:
    return model.to(getattr(torch, dtype))
