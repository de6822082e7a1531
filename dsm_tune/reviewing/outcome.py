"""What of a study goes to MLflow, and when: trials as they end, the answer at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsm_tune.config import TuneConfig
from dsm_tune.results import Trial, TuneResult
from dsm_tune.reviewing.queue import TrackingQueue
from dsm_tune.reviewing.records import ImagesLabel, StudyLabels

__all__ = ["artifacts", "labels_of", "open_queue"]


def open_queue(
    study: str,
    facts: Mapping[str, Any],
    tracking_uri: str,
    config: TuneConfig,
    warn: Callable[[str], None],
) -> TrackingQueue:
    """Open the study's runs in the background: its own stands there before the first trial ends."""
    labels = labels_of(study, facts, config)
    queue = TrackingQueue.for_study(tracking_uri, config.experiment, labels, warn)
    queue.put(lambda runs: None)
    return queue


def labels_of(study: str, facts: Mapping[str, Any], config: TuneConfig) -> StudyLabels:
    """Return what the study's runs are known by."""
    budgets = [(config.budget_ms, "ms"), (config.budget_gflops, "GMACs")]
    words = [f"{value} {unit}" for value, unit in budgets if value is not None]
    return StudyLabels(
        study=study,
        study_id=facts["study_id"],
        model=config.model_name,
        device=facts["device"]["name"],
        budget=" and ".join(words),
        params={
            k: v for k, v in config.to_dict().items() if k not in ("storage", "tracking_uri") and v
        },
        tags={f"env.{k}": v for k, v in facts.get("environment", {}).items()},
        images=_images(facts, config),
    )


def _images(facts: Mapping[str, Any], config: TuneConfig) -> tuple[ImagesLabel, ...]:
    """What the study searched and judged on; both digests have the same length."""
    digests = facts.get("identity", {}).get("images_digest", "")
    half = len(digests) // 2
    source = config.images or config.model_name
    name = Path(source).name
    parts = {"search": digests[:half], "holdout": digests[half:]}
    return tuple(
        ImagesLabel(split, f"{name} ({split})", digest, source, facts["images"][split])
        for split, digest in parts.items()
        if digest
    )


def artifacts(
    result: TuneResult,
    trials: Sequence[Trial],
    config: TuneConfig,
    importance: Mapping[str, float] | None = None,
    samples: Mapping[str, Any] | None = None,
) -> dict[str, bytes | str]:
    """Return the study's artifacts by their fixed names.

    Args:
        result: of the study.
        trials: all of them.
        config: what repeats it.
        importance: of the space's parameters, from 0 to 1.
        samples: what the study keeps of a plan on some images; drawn if that plan is the choice.
    """
    # What draws takes a second to import, and is not needed before the end.
    from dsm_tune.reviewing import figures, interactive, merged_tokens, report

    pictures = {
        "pareto.png": figures.pareto_png(result, trials),
        "similarity_curve.png": figures.similarity_curve_png(
            result.similarity_curve, result.delay, result.model
        ),
    }
    if result.front:
        pictures["tokens.png"] = figures.tokens_png(result)
    if importance:
        pictures["importance.png"] = figures.importance_png(importance)
    if prediction := figures.prediction_png(result):
        pictures["prediction.png"] = prediction
    plan = None if result.chosen is None else result.chosen.plan
    if samples and plan is not None and plan.digest == samples["plan_digest"]:
        some = [merged_tokens.Sample.from_dict(body) for body in samples["samples"]]
        pictures["merged_tokens.png"] = merged_tokens.merged_tokens_png(plan, some, result.model)
    return {
        **pictures,
        "pareto.html": interactive.pareto_html(result, trials),
        "report.html": report.report_html(result, trials, figures=pictures, command=config.command),
        "trials.csv": report.trials_csv(trials),
        "front.json": report.front_json(result),
        "config.toml": config.toml,
    }
