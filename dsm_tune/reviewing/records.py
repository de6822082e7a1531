"""What a trial and a study look like in MLflow, as plain data."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping
from typing import Any

from dsm_tune.results import Result, Trial, TuneResult
from dsm_tune.reviewing import summary
from dsm_tune.reviewing.stores import redact

__all__ = [
    "ImagesLabel",
    "Record",
    "StudyLabels",
    "finite",
    "measured",
    "note",
    "of_chosen",
    "of_study",
    "of_trial",
    "verdict",
]

STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
NAMES = {"dense": "Dense", "tome": "ToMe", "dsm": "DSM"}
GAP = "\N{EN SPACE}"  # MLflow's tables have none between their columns
LONGEST = 6000  # characters of a param, a tag or a note that every MLflow store takes


@dataclasses.dataclass(frozen=True)
class ImagesLabel:
    """A set of images that a study used.

    Attributes:
        split: ``search`` or ``holdout``.
        name: of the set.
        digest: of its pixels and labels.
        source: where it came from.
        count: of images.
    """

    split: str
    name: str
    digest: str
    source: str
    count: int


@dataclasses.dataclass(frozen=True)
class StudyLabels:
    """What a study is called and by what it is known again.

    Attributes:
        study: its name.
        study_id: unique; identifies it across names and stores.
        model: its timm name.
        device: its name.
        budget: as text, such as ``5 ms`` or ``0.71 GMACs``.
        params: the configuration.
        tags: further tags of the study run.
        images: that it used.
    """

    study: str
    study_id: str
    model: str
    device: str
    budget: str
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    images: tuple[ImagesLabel, ...] = ()

    @property
    def common_tags(self) -> dict[str, str]:
        """The tags that study and trial runs share: MLflow's filter hides children without them."""
        tags = {"model": self.model, "device": self.device, "budget": self.budget}
        return _texts({**tags, "dsm_tune.study": self.study, "mlflow.source.name": "dsm-tune"})


@dataclasses.dataclass(frozen=True)
class Record:
    """One MLflow run: its name, status, params, metrics and tags."""

    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def of_study(labels: StudyLabels) -> Record:
    """Return the study run as it is when the study begins."""
    tags = {**labels.common_tags, **_texts(labels.tags), "dsm_tune.study_id": labels.study_id}
    name = redact(f"{labels.model} · {labels.device} · {labels.budget}")
    return Record(name, "RUNNING", _texts(labels.params), {}, tags)


def of_trial(trial: Trial, result: Result | None, labels: StudyLabels) -> Record:
    """Return the run of a trial that has ended."""
    tags = {**labels.common_tags, "dsm_tune.trial": str(trial.number), "state": trial.state}
    metrics: dict[str, float | None] = {
        "divergence": trial.divergence,
        "agreement": trial.agreement,
        "top1": trial.top1,
        "latency_predicted_ms": trial.predicted_ms,
        "evaluation_seconds": trial.seconds,
        "images": trial.images,
    }
    if trial.why:
        tags["why"] = trial.why
    if trial.label:
        tags["label"] = trial.label
    if trial.plan is not None:
        metrics["gmacs"] = trial.plan.gmacs
        tags["plan_digest"] = trial.plan.digest
        text = trial.plan.to_json()
        tags |= {"plan": text} if len(text) <= LONGEST else {}
    flags_tags, flags_metrics = verdict(pareto=trial.pareto, feasible=trial.feasible)
    return Record(
        name=_trial_name(trial),
        status=STATUS[trial.state],
        params=_texts(trial.params),
        metrics=finite({**metrics, **flags_metrics, **(measured(result) if result else {})}),
        tags={**_texts(tags), **flags_tags},
    )


def verdict(*, pareto: bool, feasible: bool) -> tuple[dict[str, str], dict[str, float]]:
    """Return the tags ``true`` or ``false``, to filter by, and the metrics 0 or 1, to plot by."""
    flags = {"pareto": pareto, "feasible": feasible}
    return (
        {name: "true" if flag else "false" for name, flag in flags.items()},
        {name: float(flag) for name, flag in flags.items()},
    )


def measured(result: Result) -> dict[str, float]:
    """Return the metrics of a confirmed result; those that are not known are left out."""
    latency = result.latency_ms
    return finite(
        {
            "latency_p50_ms": latency.p50,
            "latency_p90_ms": latency.p90,
            "latency_p99_ms": latency.p99,
            "latency_low_ms": latency.low,
            "latency_high_ms": latency.high,
            "latency_ratio_to_dense": latency.ratio_to_dense,
            "latency_device_p50_ms": latency.device_p50,
            "throughput_images_per_second": result.throughput,
            "divergence_holdout": result.divergence,
            "divergence_holdout_low": result.divergence_low,
            "divergence_holdout_high": result.divergence_high,
            "agreement_holdout": result.agreement,
            "top1_holdout": result.top1,
            "top5_holdout": result.top5,
        }
    )


def of_chosen(result: TuneResult) -> dict[str, float]:
    """Return the metrics of the study run that say what was chosen."""
    one = result.chosen
    if one is None:
        return {}
    latency = one.latency_ms
    return finite(
        {
            "chosen_gmacs": one.gmacs,
            "chosen_latency_p50_ms": latency.p50,
            "chosen_latency_ratio_to_dense": latency.ratio_to_dense,
            "chosen_divergence_holdout": one.divergence,
            "chosen_agreement_holdout": one.agreement,
            "chosen_top1_holdout": one.top1,
        }
    )


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the values that are known and finite, which is all that every store takes."""
    known = {name: value for name, value in values.items() if value is not None}
    return {name: float(value) for name, value in known.items() if math.isfinite(value)}


def note(result: TuneResult) -> str:
    """Return the description of the study run, in Markdown: the answer, the table, what next."""
    table = [summary.headings(result), *(row.cells for row in summary.rows(result))]
    lines = [f"| {' | '.join(_markdown(cell) + GAP for cell in cells)} |" for cells in table]
    lines.insert(1, "|" + " --- |" * len(table[0]))
    study, uri = shlex.quote(result.study), redact(result.tracking_uri)
    see = uri if uri.startswith("http") else f"dsm-tune ui {study}"
    export = f"`dsm-tune export {study} -o out/`; another plan, by the id of its run: "
    production = [f"- For production: {export}`dsm-tune export RUN_ID -o out/`"]
    text = "\n".join(
        [
            f"**{_markdown(summary.answer(result))}**",
            "",
            *lines,
            "",
            "Brackets: 95 % intervals. ToMe and DSM: as published, fitted to the same budget.",
            "",
            "**What next**",
            "- The front: filter the runs by `tags.pareto = 'true'`.",
            "- Figures and `report.html`: the artifacts of this run.",
            f"- The table in a terminal: `dsm-tune show {study}`",
            *(production if result.chosen is not None else ()),
            f"- Search on: `dsm-tune resume {study} --trials N`",
            f"- This page: `{see}`",
        ]
    )
    return text[:LONGEST]


def _trial_name(trial: Trial) -> str:
    if trial.label in NAMES:
        return f"{NAMES[trial.label]} (reference)"
    if trial.plan is None:
        return f"t{trial.number:03d} · {trial.state}"
    words = summary.plan_words(trial.plan)
    return f"t{trial.number:03d} · {trial.plan.gmacs:.3g} GMACs · {words}"  # MLflow cuts its end


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(key)[:250]: redact(str(value))[:LONGEST] for key, value in values.items()}


def _markdown(text: str) -> str:
    for sign in "\\`*_|<[":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
