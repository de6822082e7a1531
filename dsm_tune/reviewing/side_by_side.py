"""What a bench found, as a table for a spreadsheet and as a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsm_tune.reviewing.points import COLOURS, MARKERS

__all__ = ["bench_csv", "bench_figure"]

Found = Mapping[str, Any]
LATENCY = ("p50", "p90", "p99", "low", "high", "device_p50")
SPEED = ("throughput", "speedup", "speedup_q25", "speedup_q75", "efficiency", "peak_mib")
QUALITY = (
    *("divergence", "divergence_low", "divergence_high"),
    *("agreement", "agreement_low", "agreement_high", "top1"),
)
NAMES = {"tome": "ToMe", "dsm": "DSM", "dense": "dense"}
STYLES = {"plan": "chosen", "run": "chosen", "other": "infeasible"}


def bench_csv(document: Found) -> str:
    """Return one row per candidate and batch size.

    Args:
        document: of ``dsm-tune bench --json``.
    """
    stream = io.StringIO()
    latencies = [f"latency_{name}_ms" for name in LATENCY]
    first = ["name", "kind", "r", "gmacs", "gmacs_counted", "batch_size"]
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow([*first, *latencies, *SPEED, *QUALITY])
    for one in document["candidates"]:
        quality = one["quality"] or {}
        for timing in one["timings"]:
            cells = [*(one[name] for name in first[:-1]), timing["batch_size"]]
            cells += [timing["latency_ms"][name] for name in LATENCY]
            cells += [timing[name] for name in SPEED]
            rows.writerow([*cells, *(quality.get(name) for name in QUALITY)])
    return stream.getvalue()


def bench_figure(document: Found) -> Figure:
    """Draw speed against multiply-adds, and quality against speed where there is one.

    Args:
        document: of ``dsm-tune bench --json``; its first batch size is drawn.
    """
    rows = document["candidates"]
    judged = [one for one in rows if one["quality"]]
    # Divergence has less noise, but only plans of one model have it.
    by_labels = any("divergence" not in one["quality"] for one in judged)
    figure = Figure(figsize=(11.0 if judged else 6.4, 5.0), dpi=150)
    FigureCanvasAgg(figure)
    batch = rows[0]["timings"][0]["batch_size"]
    setting = f"batch {batch} · {document['runtime']} · {document['dtype']} · {document['runs']}"
    figure.suptitle(
        f"{document['model']}: speed{' and quality' if judged else ''}",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    name = document["device"]["name"]
    figure.text(0.01, 0.905, f"{setting} runs in turn · {name}", fontsize=8.5, color="#595959")
    left, *right = figure.subplots(1, 2 if judged else 1, squeeze=False)[0]
    _speed_axes(left, rows)
    for axes in right:
        _quality_axes(axes, judged, by_labels)
    figure.subplots_adjust(top=0.86, bottom=0.12, left=0.09 if judged else 0.13, right=0.98)
    return figure


def _speed_axes(axes: Any, rows: Sequence[Found]) -> None:
    dense = rows[0]["gmacs"]
    costs = sorted({one["gmacs"] for one in rows})
    line = [costs[0] + (costs[-1] - costs[0]) * i / 50 for i in range(51)]
    style = {"color": "#8C8C8C", "linestyle": ":", "linewidth": 1.2}
    axes.plot(line, [dense / cost for cost in line], label="as GMACs would have it", **style)
    _points(axes, rows, lambda one: one["gmacs"], lambda one: one["timings"][0]["speedup"])
    for one in rows:
        timing = one["timings"][0]
        edges = timing["speedup_q25"], timing["speedup_q75"]
        axes.vlines(one["gmacs"], *edges, color=_colour(one), linewidth=1.2)
    axes.set_xlabel("GMACs per image")
    axes.set_ylabel("speed relative to dense (bars: quartiles over runs)")
    _finish(axes)


def _quality_axes(axes: Any, rows: Sequence[Found], by_labels: bool) -> None:
    key = "top1" if by_labels else "divergence"
    rows = [one for one in rows if one["quality"].get(key) is not None]
    scale = 100 if by_labels else 1
    _points(
        axes,
        rows,
        lambda one: one["timings"][0]["throughput"],
        lambda one: scale * one["quality"][key],
    )
    axes.set_xlabel("images per second")
    axes.set_ylabel("top-1 (%)" if by_labels else "divergence from dense")
    _finish(axes)


def _points(axes: Any, rows: Sequence[Found], x: Any, y: Any) -> None:
    """One line for each method that is swept, one mark for each other candidate."""
    style: dict[str, Any] = {}
    for kind in ("dense", "tome", "dsm"):
        some = sorted((one for one in rows if one["kind"] == kind), key=lambda one: one["r"] or 0)
        if some:
            at = [x(one) for one in some], [y(one) for one in some]
            style = {"color": COLOURS[kind], "marker": MARKERS[kind][0], "linewidth": 1.3}
            axes.plot(*at, label=NAMES[kind], **style)
        for one in some:
            if one["r"] is not None:
                _label(axes, f"r={one['r']}", x(one), y(one))
    seen: set[str] = set()
    for one in rows:
        if one["kind"] in STYLES:
            label, mark = ("plan", "*") if one["plan"] else ("other model", "X")
            style = {"color": _colour(one), "marker": mark}
            style = style if label in seen else {**style, "label": label}
            axes.plot([x(one)], [y(one)], linestyle="none", markersize=9, **style)
            seen.add(label)
            _label(axes, one["name"], x(one), y(one))


def _label(axes: Any, text: str, x: float, y: float) -> None:
    text = text.replace("$", r"\$")
    axes.annotate(text, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7.5)


def _colour(one: Found) -> str:
    return COLOURS[STYLES.get(one["kind"], str(one["kind"]))]


def _finish(axes: Any) -> None:
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.13)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
