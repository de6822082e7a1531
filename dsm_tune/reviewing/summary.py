"""The answer in words and the table of the four models, for report, note and terminal alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dsm_tune.plan import MergePlan
from dsm_tune.results import BudgetReport, Fault, Result, TuneResult

__all__ = [
    "Row",
    "answer",
    "budget_words",
    "cost",
    "cost_words",
    "delay_words",
    "divergence_name",
    "duration_words",
    "fault_words",
    "headings",
    "headline",
    "interval",
    "plan_words",
    "row",
    "rows",
    "shows_transition",
    "wilson",
]

UNKNOWN = "–"
Z = 1.96  # of a 95 % interval
FAULT_WORDS = {  # by kind: of one, of several
    "worker": (
        "1 evaluation was started again: its worker had died",
        "{} evaluations were started again: their workers had died",
    ),
    "call": (
        "1 call beside the trials was made again: its process had died",
        "{} calls beside the trials were made again: their processes had died",
    ),
    "start": (
        "1 worker died before its first job",
        "{} workers died before their first job",
    ),
    "store": ("the study store was away once", "the study store was away {} times"),
    "driver": (
        "1 run ended without a word and was resumed",
        "{} runs ended without a word and were resumed",
    ),
    "clock": ("the clock jumped once", "the clock jumped {} times"),
    "tracking": (
        "MLflow failed; `dsm-tune sync` writes what it lacks",
        "MLflow failed in {} runs; `dsm-tune sync` writes what it lacks",
    ),
    "trial": ("1 trial failed", "{} trials failed"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table, formatted; ``–`` stands for what is not known.

    Attributes:
        name: dense, ToMe, DSM, chosen, or the run name of a point of the front.
        gmacs: per image.
        latency: of the study's statistic in ms, with its interval.
        speed: how many times faster than the dense model, measured.
        divergence: on held-out images, with its interval.
        agreement: with the dense model in %, with its interval.
        top1: in %.
        fits: ``yes`` or ``no``.
    """

    name: str
    gmacs: str
    latency: str
    speed: str
    divergence: str
    agreement: str
    top1: str
    fits: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The fields in the order of :func:`headings`."""
        return dataclasses.astuple(self)


def headings(result: TuneResult) -> tuple[str, ...]:
    """Return the headings of the columns of :class:`Row`, with their units."""
    latency = f"{result.budget.stat} latency (ms)"
    quality = (divergence_name(result, unit=True), "agreement (%)", "top-1 (%)")
    return ("", "GMACs", latency, "speed-up", *quality, "within budget")


def rows(result: TuneResult) -> list[Row]:
    """Return the table: dense, ToMe, DSM and, if there is one, the chosen plan."""
    named = [("dense", result.dense), ("ToMe", result.tome), ("DSM", result.dsm)]
    if result.chosen is not None:
        name = "chosen" if result.chosen.plan.active_steps else "chosen (dense)"
        named.append((name, result.chosen))
    return [row(name, one, result) for name, one in named]


def row(name: str, one: Result, result: TuneResult) -> Row:
    """Return the line of one result of a study."""
    latency, images = one.latency_ms, int(result.images.get("holdout") or 0)
    agreement = UNKNOWN
    if one.agreement is not None:
        agreement = f"{100 * one.agreement:.1f}"
        if images and one is not result.dense:
            low, high = wilson(one.agreement, images)
            agreement += f" [{100 * low:.1f}, {100 * high:.1f}]"
    ratio = latency.ratio_to_dense
    return Row(
        name=name,
        gmacs=f"{one.gmacs:.3g}",
        latency=interval(_latency(one, result.budget), latency.low, latency.high),
        speed=f"{1 / ratio:.2f}×" if ratio else UNKNOWN,
        divergence=interval(one.divergence, one.divergence_low, one.divergence_high),
        agreement=agreement,
        top1=UNKNOWN if one.top1 is None else f"{100 * one.top1:.1f}",
        fits="yes" if one.feasible else "no",
    )


def answer(result: TuneResult) -> str:
    """Return what was found, in one or two sentences of plain text."""
    budget, chosen = budget_words(result.budget), result.chosen
    early = "So far: " if result.status in ("running", "interrupted") else ""
    dense = _costs(result.dense, result)
    if result.budget.dense_fits:
        return (
            f"The dense model already meets the budget of {budget}: it takes {dense}. "
            "It is the choice; the front shows what merging would save beyond that."
        )
    if chosen is not None:
        gains = f"{_costs(chosen, result)} instead of {dense}{_gains(chosen, result)}"
        quality = _quality(chosen, result) + _against(chosen, result)
        return f"{early}A merged plan meets the budget of {budget}: {gains}. {quality}."
    if result.status == "running" and result.budget.satisfiable:
        done = result.trials.get("complete", 0)
        return f"So far no plan is chosen for the budget of {budget}: {done} trials are complete."
    closest = _fastest(result)
    if result.budget.satisfiable:
        return (
            f"{early}None of the {result.trials.get('complete', 0)} plans that were tried meets "
            f"the budget of {budget}: {_missed(result, closest)}."
        )
    return (
        f"{early}Nothing meets the budget of {budget}: the fastest that is known takes {closest}, "
        f"the dense model takes {dense}. Nothing is chosen; raise the budget, or "
        "choose a smaller model, smaller images or a faster runtime."
    )


def headline(result: TuneResult) -> str:
    """Return the message of the study in a dozen words, as the title of a figure."""
    budget, chosen = budget_words(result.budget, short=True), result.chosen
    if result.budget.dense_fits:
        return f"The dense model already meets the budget of {budget}"
    if chosen is None:
        if result.status == "running":
            return f"The search for a plan within {budget} is running"
        return f"Nothing meets the budget of {budget}"
    parts: list[str] = []
    for name, other in (("DSM", result.dsm), ("ToMe", result.tome)):
        if chosen.divergence is not None and other.divergence:
            what = "that of" if parts else f"the {divergence_name(result)} of"
            parts.append(f"{chosen.divergence / other.divergence:.2f}× {what} {name}")
    against = f" at {' and '.join(parts)}" if parts else ""
    return f"The chosen plan meets {budget}{against}"


def budget_words(budget: BudgetReport, *, short: bool = False) -> str:
    """Return the budget as text, such as ``5 ms (p50, batch 1) and 0.71 GMACs``."""
    parts = []
    if budget.ms is not None:
        how = "" if short else f" ({budget.stat}, batch {budget.batch_size})"
        parts.append(f"{budget.ms:.3g} ms{how}")
    if budget.gmacs is not None:
        parts.append(f"{budget.gmacs:.3g} GMACs")
    return " and ".join(parts) or "none"


def shows_transition(curve: Sequence[float]) -> bool:
    """Whether there is a block from which tokens grow alike; else D is a convention."""
    from dsm_tune.merging.similarity import find_transition  # imports torch, which texts need not

    return find_transition(curve) is not None


def cost_words(gmacs: float | None, ms: float | None) -> str:
    """Return predicted costs as text, such as ``0.71 GMACs, 4.6 ms``; what is not known is left."""
    parts = [] if gmacs is None else [f"{gmacs:.3g} GMACs"]
    return ", ".join(parts if ms is None else [*parts, f"{ms:.3g} ms"])


def delay_words(curve: Sequence[float], delay: int) -> str:
    """Return D and where it comes from; the curve may show no block where tokens converge."""
    if not shows_transition(curve):
        return f"D = {delay}, which is depth / 6: the similarity curve shows no transition"
    return f"D = {delay}, from the similarity curve"


def duration_words(seconds: float) -> str:
    """Return a duration as text, such as ``40 s``, ``3 min`` or ``1.5 h``."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def fault_words(fault: Fault) -> str:
    """Return what went wrong as text, such as ``2 trials failed (trial 7: MemoryError)``."""
    one, several = FAULT_WORDS[fault.kind]
    words = one if fault.count == 1 else several.format(fault.count)
    return f"{words} ({fault.detail})" if fault.detail else words


def plan_words(plan: MergePlan) -> str:
    """Return a plan in a few words, such as ``D=1 r=13–18 w=7–9 kv λ=0.3``."""
    steps = plan.active_steps
    if not steps:
        return "dense" if plan.last_block == "all" else "dense, last=prefix"
    counts = [step.r for step in steps]
    windows = [step.window for step in steps if step.window is not None]
    words = [f"D={steps[0].block}", f"r={_range(counts)}"]
    words += [f"w={_range(windows)}"] if windows else []
    for kind in ("prune", "fuse"):
        count = sum(step.kind == kind for step in steps)
        words += [f"{kind}×{count}"] if count else []
    words += [plan.matching.feature] if plan.matching.feature != "k" else []
    words += [f"λ={plan.matching.salience:.2g}"] if plan.matching.salience else []
    words += ["last=prefix"] if plan.last_block == "prefix" else []
    return " ".join(words)


def cost(one: Result, budget: BudgetReport) -> float | None:
    """Return what the budget limits: latency in ms where it names one, else GMACs."""
    return one.gmacs if budget.ms is None else _latency(one, budget)


def divergence_name(result: TuneResult, *, unit: bool = False) -> str:
    """Return what the distance from the dense model is called; models without a head differ."""
    if not result.dense.plan.geometry.classes:
        return "1 − cosine"
    return "divergence (nats)" if unit else "divergence"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """Return ``value [low, high]`` with three significant digits, or what is known of it."""
    if value is None:
        return UNKNOWN
    if low is None or high is None or low == high == value:
        return _number(value)
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share seen among ``count`` images (Wilson's score interval)."""
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _number(value: float) -> str:
    """Three significant digits, trailing zeros kept: 3.90, 0.0381, 120."""
    return f"{value:#.3g}".rstrip(".") if value else "0"


def _short(value: float) -> str:
    """Three decimals, or three significant digits where these would show nothing."""
    return f"{value:.3f}" if value >= 0.01 else _number(value)


def _latency(one: Result, budget: BudgetReport) -> float | None:
    measured = getattr(one.latency_ms, budget.stat, None)
    return measured if measured is not None else one.latency_ms.predicted


def _costs(one: Result, result: TuneResult) -> str:
    """Cost in the budget's own units: ``4.1 ms [4.0, 4.2]``, ``0.708 GMACs``."""
    parts = []
    latency = one.latency_ms
    if result.budget.ms is not None and (value := _latency(one, result.budget)) is not None:
        number, _, edges = interval(value, latency.low, latency.high).partition(" ")
        parts.append(f"{number} ms {edges}".rstrip())
    if result.budget.gmacs is not None or not parts:
        parts.append(f"{one.gmacs:.3g} GMACs")
    return " and ".join(parts)


def _gains(chosen: Result, result: TuneResult) -> str:
    parts = []
    if ratio := chosen.latency_ms.ratio_to_dense:
        parts.append(f"{1 / ratio:.2f}× as fast as the dense model")
    if chosen.gmacs and result.dense.gmacs:
        parts.append(f"with {100 * chosen.gmacs / result.dense.gmacs:.0f} % of its multiply-adds")
    return f", {' '.join(parts)}" if parts else ""


def _quality(chosen: Result, result: TuneResult) -> str:
    images = int(result.images.get("holdout") or 0)
    on = f"on {images} held-out images" if images else "on the held-out images"
    if chosen.top1 is not None and result.dense.top1 is not None:
        change = chosen.top1 - result.dense.top1
        verb, points = "drops" if change < 0 else "rises", f"{abs(100 * change):.1f} points"
        verb = "changes" if points == "0.0 points" else verb
        return f"Top-1 {verb} by {points}{_margin(change, chosen, images)} {on}"
    if chosen.agreement is None:
        return f"Its quality {on} is not known yet"
    text = f"It keeps the dense model's class for {100 * chosen.agreement:.1f} %"
    if images:
        low, high = wilson(chosen.agreement, images)
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{text} {on}"


def _margin(change: float, chosen: Result, images: int) -> str:
    """Half the 95 % interval of a paired difference, in points.

    Correctness differs only where the class does: the disagreement bounds the variance.
    """
    if chosen.agreement is None or not images:
        return ""
    disagreement = 1 - wilson(chosen.agreement, images)[0]
    return f" ± {100 * Z * math.sqrt(max(disagreement - change**2, 0.0) / images):.1f}"


def _against(chosen: Result, result: TuneResult) -> str:
    if chosen.divergence is None:
        return ""
    others, overlaps = [], []
    for name, other in (("DSM", result.dsm), ("ToMe", result.tome)):
        if other.divergence is None:
            continue
        others.append(f"{_short(other.divergence)} for {name}")
        if _overlap(chosen, other):
            overlaps.append(name)
    text = f"; its {divergence_name(result, unit=True)} is {_short(chosen.divergence)}"
    text += f", against {' and '.join(others)} at the same budget" if others else ""
    return text + (f" (intervals overlap with {' and '.join(overlaps)})" if overlaps else "")


def _overlap(one: Result, other: Result) -> bool:
    edges = (one.divergence_low, one.divergence_high, other.divergence_low, other.divergence_high)
    if any(edge is None for edge in edges):
        return False
    low, high, other_low, other_high = (edge or 0.0 for edge in edges)
    return low <= other_high and other_low <= high


def _fastest(result: TuneResult) -> str:
    if result.budget.ms is not None and result.budget.fastest_ms is not None:
        return f"{result.budget.fastest_ms:.3g} ms"
    if result.budget.ms is None and result.budget.fastest_gmacs is not None:
        return f"{result.budget.fastest_gmacs:.3g} GMACs"
    known = [result.dense, result.tome, result.dsm, *result.front]
    return _costs(min(known, key=lambda one: one.gmacs), result)


def _missed(result: TuneResult, closest: str) -> str:
    """Why no plan meets a budget that can be met, as far as is known."""
    known = [(_latency(one, result.budget), one) for one in (result.dense, result.tome, result.dsm)]
    timed = [(ms, one) for ms, one in known if ms is not None and one.latency_ms.p50 is not None]
    if result.budget.ms is None or not timed:
        return f"{closest} can be reached, search with that budget"
    ms, one = min(timed, key=lambda pair: pair[0])
    predicted = one.latency_ms.predicted
    name = {id(result.dense): "the dense model", id(result.tome): "ToMe"}.get(id(one), "DSM")
    taken = f"timed alone, {name} took {_costs(one, result)}"
    if predicted is None or ms < 1.1 * predicted:
        return f"{taken}; the device profile says that {closest} can be reached"
    return (
        f"{taken}, {ms / predicted:.1f}× what the device profile had said; "
        "this machine was slower or busier then, try again when it is idle"
    )


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}–{high}"
