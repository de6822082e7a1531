"""What the verb paper does: rows of the paper's tables and figures, computed and measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsm_tune import schedules
from dsm_tune.bench import top1_of
from dsm_tune.candidates import Candidate
from dsm_tune.merging.loading import create_model
from dsm_tune.paper.printed import ITEMS, PAPER, Item, Row
from dsm_tune.paper.rows import Document, Line, document_of, own_lines, papers_lines, related
from dsm_tune.paper.speed import setting_of, times_of
from dsm_tune.paper.subjects import (
    Asked,
    Given,
    Subject,
    architecture,
    is_other,
    load_subject,
)

__all__ = ["redo"]

Say = Callable[[str], None]
CURVES = ("together", "apart")  # pictures of similarity curves


def redo(asked: Asked, say: Say) -> Document:
    """Compute and measure what was asked for.

    Args:
        asked: tables, figures, models and images.
        say: is told what happens.

    Returns:
        What ``dsm-tune paper --json`` prints, without the files of figures.

    Raises:
        DsmTuneError: if a model, weights, images or an option cannot be used.
    """
    items = [item for item in ITEMS if item.name in asked.items]
    own: dict[str, list[Document]] = {item.name: [] for item in items}
    known: dict[tuple[str, Row], Document] = {}  # what the weights given say of the paper's rows
    facts, curves = [], []
    others = {architecture(one.name): one for one in asked.models if is_other(one)}
    for given in asked.models:
        if is_other(given):
            continue
        say(f"{given.name}: {'given weights' if given.has_weights else 'random weights'}")
        subject = load_subject(given, asked.values, asked.count, say)
        facts.append(subject.facts())
        if subject.curve is not None:
            weights = "given" if given.has_weights else "random"
            curves.append({"model": given.label, "weights": weights, **subject.curve})
        for item in items:
            _know(known, item, subject, others, asked)
            if _has_section(item, subject, asked):
                say(f"{item.title}: {given.name}")
                own[item.name].append(_section(item, subject, others, asked, say))
    found = []
    for item in items:
        sections = _papers(item, known, asked, say) + own[item.name]
        of_curves = curves if item.picture in CURVES else []
        found.append(
            {
                "name": item.name,
                "title": item.title,
                "picture": item.picture or None,
                "sections": sections,
                "curves": of_curves,
                "needs": _needs(item, bool(sections or of_curves), facts),
                "file": None,
                "notes": list(item.notes),
            }
        )
    return {
        "paper": PAPER,
        "images": asked.values.get("images"),
        "models": facts,
        "speed": setting_of(asked) if asked.has_speed else None,
        "items": found,
    }


def _needs(item: Item, has_data: bool, facts: Sequence[Document]) -> str | None:
    """What a figure lacks altogether."""
    if not item.picture or has_data:
        return None
    given = [one for one in facts if one["weights"] == "given"]
    if item.picture == "r" and given:
        return "two trainings of one model"
    ready = [one for one in (facts if item.picture in CURVES else given) if one["image"]]
    if ready and not item.rows:
        return None
    if given:
        return "images"
    return "weights" if any(one["image"] for one in facts) else "weights and images"


def _has_section(item: Item, subject: Subject, asked: Asked) -> bool:
    """Whether an item has rows of a given model besides the paper's."""
    if not item.rows:
        return False
    if not item.picture:
        return (asked.has_speed and item.is_timed) or not _is_papers(item, subject)
    name = architecture(subject.given.name)
    trained = [architecture(one.name) for one in asked.models if one.has_weights]
    return subject.needs is None and (item.picture != "r" or trained.count(name) > 1)


def _is_papers(item: Item, subject: Subject) -> bool:
    """Whether the paper's own rows already say all of a model."""
    models = {row.model for row in item.rows}
    is_there = architecture(subject.given.name) in models and subject.is_papers
    return is_there and subject.delay == schedules.default_delay(subject.geometry)


def _papers(
    item: Item, known: dict[tuple[str, Row], Document], asked: Asked, say: Say
) -> list[Document]:
    """The section of the paper's models; none in a figure, which is drawn of models given."""
    if item.picture or not item.rows:
        return []
    lines = papers_lines(item, asked.rates)
    unknown: Document = {"quality": None, "needs": "weights", "timing": None}
    rows = [document_of(one) | known.get((item.name, one.row), unknown) for one in lines]
    if asked.has_speed and item.is_timed and not asked.models:
        model = create_model(lines[0].model)
        timings = times_of(lines, model, asked.config, asked, say)
        for row, timing in zip(rows, timings, strict=True):
            row["timing"] = timing
    return [{"model": "", "of": "paper", "images": None, "rows": related(rows)}]


def _know(
    known: dict[tuple[str, Row], Document],
    item: Item,
    subject: Subject,
    others: dict[str, Given],
    asked: Asked,
) -> None:
    """Judge the rows of the paper's tables that are of a given model."""
    if item.picture or not item.rows:
        return
    lines = papers_lines(item, asked.rates)
    name = architecture(subject.given.name)
    mine = [one for one in lines if one.model == name and subject.is_papers]
    mine += [one for one in lines if one.plan is None and one.model in others]
    for one in mine:
        if known.get((item.name, one.row), {}).get("quality") is None:
            known[item.name, one.row] = _judged(one, subject, others)


def _section(
    item: Item, subject: Subject, others: dict[str, Given], asked: Asked, say: Say
) -> Document:
    """The rows of an item on a given model, with the D that its curve shows."""
    name, geometry = subject.given.name, subject.geometry
    lines = own_lines(item, asked.rates, name, geometry, subject.delay)
    rows = [
        document_of(one, is_own=one.plan is not None) | _judged(one, subject, others)
        for one in lines
    ]
    if asked.has_speed and item.is_timed:
        timings = times_of(lines, subject.model, subject.config, asked, say)
        for found, timing in zip(rows, timings, strict=True):
            found["timing"] = timing
    images = subject.facts()["images"]
    return {
        "model": subject.given.label,
        "of": "given",
        "images": images,
        "rows": related(rows),
    }


def _judged(one: Line, subject: Subject, others: dict[str, Given]) -> Document:
    """Quality of a row, or what it needs."""
    empty: Document = {"quality": None, "needs": subject.needs, "timing": None}
    if one.plan is not None:
        quality = subject.quality(one.plan)
        needs = subject.needs
        if quality is not None and quality["top1"] is None:
            needs = "labels"
        return {**empty, "quality": quality, "needs": needs}
    given = others.get(one.model)
    if given is None or not given.has_weights or subject.needs:
        return {**empty, "needs": "weights" if given is None else subject.needs or "weights"}
    model = create_model(
        given.name, checkpoint=given.file, pretrained=given.has_weights and not given.file
    )
    candidate = Candidate(given.name, "other", other=model)
    quality = top1_of(candidate, subject.images, subject.config)
    return {**empty, "quality": quality, "needs": None if quality else "labels"}
