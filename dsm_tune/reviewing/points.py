"""What the Pareto figures draw, as plain data, so that the two libraries draw the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dsm_tune.results import Result, Trial, TuneResult
from dsm_tune.reviewing import summary

__all__ = ["BACKGROUND", "COLOURS", "KINDS", "MARKERS", "Point", "Scatter", "faintness", "scatter"]

MOST = 1500  # background points; more are thinned out evenly
CROWD = 200  # more of a kind are drawn smaller and fainter, so that the front stands out
BACKGROUND = ("pruned", "infeasible", "trial")
# Okabe and Ito's palette, told apart by the colour-blind; the marker says the same as the colour.
COLOURS = {
    "pruned": "#A6A6A6",
    "infeasible": "#8C8C8C",
    "trial": "#56B4E9",
    "front": "#0072B2",
    "dense": "#000000",
    "tome": "#D55E00",
    "dsm": "#009E73",
    "chosen": "#882255",
}
MARKERS = {  # of matplotlib and of plotly
    "pruned": ("x", "x-thin-open"),
    "infeasible": ("o", "circle-open"),
    "trial": ("o", "circle"),
    "front": ("o", "circle"),
    "dense": ("s", "square"),
    "tome": ("^", "triangle-up"),
    "dsm": ("D", "diamond"),
    "chosen": ("*", "star"),
}
KINDS = {
    "pruned": "pruned early (few images)",
    "infeasible": "trial over the budget",
    "trial": "trial (search images)",
    "front": "front (held-out images)",
    "dense": "dense model",
    "tome": "ToMe, fitted to the budget",
    "dsm": "DSM, fitted to the budget",
    "chosen": "chosen plan",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One plan in the figure.

    Attributes:
        cost: in the unit of the axis.
        divergence: from the dense model.
        cost_edges, divergence_edges: 95 % interval, or ``None``.
        words: lines that say more: the plan, its figures, its run.
    """

    cost: float
    divergence: float
    cost_edges: tuple[float, float] | None = None
    divergence_edges: tuple[float, float] | None = None
    words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scatter:
    """The figure.

    Attributes:
        title, subtitle: its message, and what it was measured on.
        x_title, y_title: with units.
        budget: where the budget line stands, or ``None``.
        budget_label: what is written at it.
        points: by kind, in the order in which they are drawn.
        top: the largest divergence shown.
        frame: the costs shown, where the dense model costs far more than all else; or ``None``.
    """

    title: str
    subtitle: str
    x_title: str
    y_title: str
    budget: float | None
    budget_label: str
    points: dict[str, list[Point]]
    top: float
    frame: tuple[float, float] | None = None


def scatter(result: TuneResult, trials: Sequence[Trial]) -> Scatter:
    """Return what to draw of a study: divergence against what its budget limits.

    Args:
        result: of the study.
        trials: all of them; duplicates, failures and plans drawn as results are left out.
    """
    budget, in_ms = result.budget, result.budget.ms is not None
    named = {"dense": result.dense, "tome": result.tome, "dsm": result.dsm, "chosen": result.chosen}
    points: dict[str, list[Point]] = {kind: [] for kind in KINDS}
    drawn = {one.plan.digest for one in [*named.values(), *result.front] if one is not None}
    for trial in trials:
        point = _of_trial(trial, in_ms)
        if point is not None and trial.plan is not None and trial.plan.digest not in drawn:
            points[_kind(trial)].append(point)
    points["front"] = _known([_of_result(one, result) for one in result.front])
    for kind, one in named.items():
        points[kind] = _known([_of_result(one, result)]) if one is not None else []
    points = {kind: _thin(some) for kind, some in points.items()}
    top = _top(points)
    held, seen = result.images.get("holdout"), result.images.get("search")
    latency = f"{budget.stat} latency, batch {budget.batch_size} (ms)"
    label = f"{budget.ms:.3g} ms" if budget.ms is not None else f"{budget.gmacs or 0:.3g} GMACs"
    hidden = _hidden(points, top)
    return Scatter(
        title=summary.headline(result),
        subtitle=f"{result.model} on {result.device.get('name', '')} · large marks: {held} "
        f"held-out images, 95 % intervals · small marks: {seen} search images{hidden}",
        x_title=latency if in_ms else "GMACs per image",
        y_title=f"{summary.divergence_name(result, unit=True)}, lower is better",
        budget=budget.ms if in_ms else budget.gmacs,
        budget_label=f"budget {label}",
        points=points,
        top=top,
        frame=_frame(points, budget.ms if in_ms else budget.gmacs),
    )


def faintness(kind: str, count: int) -> tuple[float, float]:
    """Return by what the marks of a kind are scaled, and their opacity.

    Args:
        kind: of ``KINDS``.
        count: how many marks there are.
    """
    if kind not in BACKGROUND:
        return 1.0, 1.0
    return (1.0, 0.75) if count <= CROWD else (0.75, 0.45)


def _kind(trial: Trial) -> str:
    if trial.state == "pruned":
        return "pruned"
    return "trial" if trial.feasible else "infeasible"


def _of_trial(trial: Trial, in_ms: bool) -> Point | None:
    if trial.state not in ("complete", "pruned") or trial.plan is None:
        return None
    cost = trial.predicted_ms if in_ms else trial.plan.gmacs
    if cost is None or trial.divergence is None:
        return None
    words = (
        f"trial {trial.number} · {summary.plan_words(trial.plan)}",
        f"{trial.plan.gmacs:.3g} GMACs, divergence {trial.divergence:.3g} on {trial.images} images",
    )
    return Point(cost, trial.divergence, words=words)


def _of_result(one: Result, result: TuneResult) -> Point | None:
    cost = summary.cost(one, result.budget)
    divergence = 0.0 if one is result.dense and one.divergence is None else one.divergence
    if cost is None or divergence is None:
        return None
    latency, in_ms = one.latency_ms, result.budget.ms is not None
    row = summary.row("", one, result)
    words = (
        f"trial {one.trial} · {summary.plan_words(one.plan)}" if one.trial is not None
        else summary.plan_words(one.plan),
        f"{row.gmacs} GMACs, {row.latency} ms",
        f"divergence {row.divergence}, agreement {row.agreement} %",
        f"within the budget: {row.fits}",
        f"run {one.run_id}" if one.run_id else "",
    )  # fmt: skip
    return Point(
        cost,
        divergence,
        _edges(latency.low, latency.high) if in_ms else None,
        _edges(one.divergence_low, one.divergence_high),
        tuple(filter(None, words)),
    )


def _top(points: dict[str, list[Point]]) -> float:
    """Show all results, and the trials that come near: a few bad ones would hide the rest."""
    results = [point for kind in ("front", "tome", "dsm", "chosen") for point in points[kind]]
    highest = [max(point.divergence, *(point.divergence_edges or ())) if point.divergence_edges
               else point.divergence for point in results]  # fmt: skip
    if not highest or max(highest) <= 0:
        highest = [point.divergence for kind in ("trial", "infeasible") for point in points[kind]]
    return 1.4 * max(highest, default=1.0) or 1.0


def _frame(points: dict[str, list[Point]], budget: float | None) -> tuple[float, float] | None:
    """Give the width to the plans where the dense model costs far more."""
    others = [point.cost for kind, some in points.items() if kind != "dense" for point in some]
    others += [] if budget is None else [budget]
    dense = max((point.cost for point in points["dense"]), default=0.0)
    if not others or dense <= 2 * max(others) - min(others):
        return None
    low, high = min(others), max(others)
    room = 0.08 * (high - low)
    return low - room, high + 2.5 * room


def _hidden(points: dict[str, list[Point]], top: float) -> str:
    count = sum(point.divergence > top for some in points.values() for point in some)
    return f" · {count} of them above the frame" if count else ""


def _thin(points: list[Point]) -> list[Point]:
    step = -(-len(points) // MOST)
    return points[:: max(step, 1)]


def _known(points: Sequence[Point | None]) -> list[Point]:
    return [point for point in points if point is not None]


def _edges(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)
