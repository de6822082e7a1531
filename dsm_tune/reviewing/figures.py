"""The figures as PNG, drawn by matplotlib without a window and without global state."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsm_tune.results import Result, Trial, TuneResult
from dsm_tune.reviewing import points, summary
from dsm_tune.reviewing.points import COLOURS, KINDS, MARKERS, Point

__all__ = [
    "importance_png",
    "pareto_png",
    "prediction_png",
    "similarity_curve_png",
    "similarity_curve_svg",
    "tokens_png",
]

DPI = 150
INCHES = (8.0, 5.0)  # 1200 × 750 pixels
GREY = "#595959"
MOST_BARS = 14  # parameters shown
SIZES = {"pruned": 4, "infeasible": 4, "trial": 4, "front": 7, "dense": 8, "tome": 9, "dsm": 8}


def pareto_png(result: TuneResult, trials: Sequence[Trial]) -> bytes:
    """Return divergence against cost: references, front, chosen plan, budget and trials.

    Args:
        result: of the study.
        trials: all of them.
    """
    drawing = points.scatter(result, trials)
    figure, axes = _page(drawing.title, drawing.subtitle, drawing.x_title, drawing.y_title)
    front = drawing.points["front"]
    axes.plot(
        [point.cost for point in front],
        [point.divergence for point in front],
        color=COLOURS["front"],
        linewidth=1.2,
        zorder=3,
    )
    if drawing.budget is not None:
        style = {"color": GREY, "linestyle": "--", "linewidth": 1.2}
        axes.axvline(drawing.budget, label=drawing.budget_label, **style)
    for order, (kind, some) in enumerate(drawing.points.items()):
        if some:
            _marks(axes, kind, some, order)
    axes.set_ylim(-0.05 * drawing.top, drawing.top)
    axes.margins(x=0.06)
    _leave_dense_outside(axes, drawing)
    _legend(axes)
    return _png(figure)


def similarity_curve_png(curve: Sequence[float], delay: int, title: str = "") -> bytes:
    """Return the similarity of the tokens per block, and the delay D read from it.

    Args:
        curve: one number per block.
        delay: D, the first block that merges.
        title: what the figure says; by default that merging begins at D.
    """
    return _png(_similarity_curve(curve, delay, title))


def similarity_curve_svg(curve: Sequence[float], delay: int, title: str = "") -> bytes:
    """Return the same figure as :func:`similarity_curve_png`, to be scaled."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dsm_tune"}):  # the same bytes on every run
        _similarity_curve(curve, delay, title).savefig(
            stream, format="svg", metadata={"Date": None}
        )
    return stream.getvalue()


def _similarity_curve(curve: Sequence[float], delay: int, title: str) -> Figure:
    message = f"Tokens grow alike from block {delay} on: merging begins there (D = {delay})"
    if not summary.shows_transition(curve):
        message = f"No block from which tokens grow alike: D = {delay} is depth / 6"
    figure, axes = _page(title or message, "", "block", "mean cosine similarity of tokens")
    blocks = range(len(curve))
    if delay > 0:
        axes.axvspan(-0.5, delay - 0.5, color="#E9E9E9", zorder=0, label="blocks left dense")
    axes.plot(blocks, curve, "o-", color=COLOURS["front"], label="similarity\nafter attention")
    if 0 <= delay < len(curve):
        axes.plot(
            [delay],
            [curve[delay]],
            MARKERS["chosen"][0],
            color=COLOURS["chosen"],
            markersize=15,
            label=f"D = {delay}",
        )
    axes.set_xlim(-0.5, len(curve) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return figure


def tokens_png(result: TuneResult) -> bytes:
    """Return how many tokens enter each block, for the references and the plans of the front."""
    figure, axes = _page(
        "Where the plans of the front let tokens go",
        f"{result.model} · thin lines: the front, the lighter the cheaper",
        "block",
        "tokens that enter the block",
    )
    shades = matplotlib.colormaps["Blues"]
    schedules = list({one.plan.tokens: one for one in result.front}.values())  # each drawn once
    label = f"front, {len(result.front)} plans"
    if len(schedules) < len(result.front):
        label += f"\nof {len(schedules)} schedules"
    for i, one in enumerate(schedules):
        shade = shades(0.35 + 0.6 * i / max(len(schedules) - 1, 1))
        _tokens(axes, one, shade, None if i else label, 1.0)
    named = [
        ("dense", "dense", result.dense, 1.5, ":"),
        ("ToMe", "tome", result.tome, 2.0, "--"),
        ("DSM", "dsm", result.dsm, 2.0, "-."),
        ("chosen", "chosen", result.chosen, 2.5, "-"),
    ]
    for name, kind, named_one, width, style in named:
        if named_one is not None:
            label = f"{name}, {named_one.gmacs:.3g} GMACs"
            _tokens(axes, named_one, COLOURS[kind], label, width, style)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return _png(figure)


def importance_png(importance: Mapping[str, float]) -> bytes:
    """Return how much each parameter of the space decided.

    Args:
        importance: shares, by parameter.
    """
    order = sorted(importance.items(), key=lambda pair: pair[1])[-MOST_BARS:]
    name, share = order[-1]
    figure, axes = _page(
        f"What decided most: {name} ({share:.0%})",
        "how much each parameter decided that a trial was among the best quarter (PED-ANOVA)",
        "share",
        "",
    )
    axes.set_position((0.24, *axes.get_position().bounds[1:2], 0.7, axes.get_position().height))
    axes.barh([name for name, _ in order], [value for _, value in order], color=COLOURS["front"])
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0)
    return _png(figure)


def prediction_png(result: TuneResult) -> bytes | None:
    """Return the latencies that were measured against those predicted; ``None`` without both."""
    named: list[tuple[str, Result | None]]
    named = [("dense", result.dense), ("tome", result.tome), ("dsm", result.dsm)]
    named += [("front", one) for one in result.front] + [("chosen", result.chosen)]
    known = [
        (kind, one.latency_ms.predicted, value, one.latency_ms)
        for kind, one in named
        if one is not None and one.latency_ms.predicted is not None
        and (value := getattr(one.latency_ms, result.budget.stat)) is not None
    ]  # fmt: skip
    if len(known) < 2:
        return None
    worst = max(abs(measured / predicted - 1) for _, predicted, measured, _ in known)
    figure, axes = _page(
        f"What was timed differs by {worst:.0%} at most from what was predicted",
        f"{result.model} on {result.device.get('name', '')} · 95 % intervals",
        "predicted latency (ms)",
        f"{result.budget.stat} latency, measured (ms)",
    )
    costs = [cost for _, *both, _ in known for cost in both]
    low, high = 0.93 * min(costs), 1.05 * max(costs)
    axes.plot([low, high], [low, high], "--", color=GREY, linewidth=1.2, label="as predicted")
    for kind, predicted, measured, latency in known:
        if latency.low is not None and latency.high is not None:
            axes.vlines(predicted, latency.low, latency.high, color=COLOURS[kind], linewidth=1.4)
        _, labels = axes.get_legend_handles_labels()
        axes.plot(
            [predicted],
            [measured],
            MARKERS[kind][0],
            color=COLOURS[kind],
            markersize=SIZES.get(kind, 17),
            markeredgecolor="white",
            label=None if KINDS[kind] in labels else KINDS[kind],
        )
    axes.set_xlim(low, high)
    _legend(axes)
    return _png(figure)


def _tokens(
    axes: Any, one: Result, colour: Any, label: str | None, width: float, style: str = "-"
) -> None:
    counts = one.plan.tokens[:-1]  # the last value leaves the last block and enters none
    axes.plot(range(len(counts)), counts, style, color=colour, linewidth=width, label=label)


def _leave_dense_outside(axes: Any, drawing: points.Scatter) -> None:
    """Give the width to the plans where the dense model costs far more; an arrow points at it."""
    if drawing.frame is None:
        return
    axes.set_xlim(drawing.frame)
    axes.annotate(
        f"dense model at {drawing.points['dense'][0].cost:.3g} →",
        (0.995, 0.015),
        xycoords="axes fraction",
        ha="right",
        va="bottom",
        fontsize=9,
        color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )


def _marks(axes: Any, kind: str, some: list[Point], order: int) -> None:
    strong = kind not in points.BACKGROUND
    scale, opacity = points.faintness(kind, len(some))
    label = KINDS[kind]
    if strong and len(some) == 1:
        label += f"\n  {some[0].divergence:.3g} at {some[0].cost:.3g}"
    hollow = kind == "infeasible"
    axes.plot(
        [point.cost for point in some],
        [point.divergence for point in some],
        linestyle="none",
        marker=MARKERS[kind][0],
        markersize=scale * SIZES.get(kind, 17),
        markerfacecolor="none" if hollow else COLOURS[kind],
        markeredgecolor=COLOURS[kind] if kind in ("pruned", "infeasible") else "white",
        markeredgewidth=0.9 if kind in ("pruned", "infeasible") else 0.7,
        alpha=opacity,
        label=label,
        zorder=4 + order,
    )
    for point in some:
        if point.divergence_edges is not None:
            axes.vlines(point.cost, *point.divergence_edges, color=COLOURS[kind], linewidth=1.4)
        if point.cost_edges is not None:
            axes.hlines(point.divergence, *point.cost_edges, color=COLOURS[kind], linewidth=1.4)


def _page(title: str, subtitle: str, x_title: str, y_title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=INCHES, dpi=DPI)
    FigureCanvasAgg(figure)
    top = 0.975
    heading = textwrap.wrap(_plain(title), 68)[:2]
    figure.text(0.015, top, "\n".join(heading), va="top", fontsize=12, fontweight="bold")
    top -= 0.045 * len(heading) + 0.01
    small = textwrap.wrap(_plain(subtitle), 110)[:2]
    figure.text(0.015, top, "\n".join(small), va="top", fontsize=8.5, color=GREY)
    top -= 0.033 * len(small) + 0.025
    axes = figure.add_axes((0.09, 0.11, 0.61, top - 0.11))
    axes.set_xlabel(_plain(x_title), fontsize=11)
    axes.set_ylabel(_plain(y_title), fontsize=11)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Any) -> None:
    """Beside the axes, where it covers nothing; what is drawn last matters most, so comes first."""
    handles, labels = axes.get_legend_handles_labels()
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "borderaxespad": 0}
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9, labelspacing=0.8, **where)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib reads formulas between dollars


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
