"""Quality over a setting that is swept, for one or several models, drawn by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsm_tune.reviewing.curves import HUES

__all__ = ["sweep_figure"]

Section = Mapping[str, Any]

DPI = 150
GREY = "#595959"
METHODS = {"ToMe": ("^", "--"), "DSM": ("D", "-")}
X_TITLES = {
    "cost": "GMACs per image, of the dense model's (%)",
    "r": "r, tokens that leave per block",
    "t": "T, blocks that merge inside windows",
}


def sweep_figure(sections: Sequence[Section], over: str, title: str) -> Figure:
    """Draw divergence and, of labelled images, top-1, each with intervals; speed where measured.

    Args:
        sections: of the document of ``dsm-tune paper --json``, one per model, with quality.
        over: ``cost``, ``r`` or ``t``.
        title: above.
    """
    rows = [row for section in sections for row in section["rows"]]
    frames = ["divergence"]
    frames += ["top1"] if any(row["quality"]["top1"] is not None for row in rows) else ["agreement"]
    frames += ["speed"] if any(row["timing"] for row in rows) else []
    wide, high = 4.4 * len(frames) + 0.2, 5.0 + 0.18 * len(sections)
    figure = Figure(figsize=(wide, high), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.text(0.1 / wide, 1 - 0.1 / high, title, va="top", fontsize=12, fontweight="bold")
    images = sorted({section["images"] for section in sections})
    words = " / ".join(map(str, images))
    bars = "95 % intervals" + (", of speed quartiles over runs" if "speed" in frames else "")
    figure.text(
        0.1 / wide,
        1 - 0.37 / high,
        f"on {words} held-out images · bars: {bars}",
        va="top",
        fontsize=8.5,
        color=GREY,
    )
    axes = figure.subplots(1, len(frames), squeeze=False)[0]
    for frame, what in zip(axes, frames, strict=True):
        if what == "speed":
            _as_gmacs(frame, rows)
        for number, section in enumerate(sections):
            _lines(frame, section, over, what, HUES[number % len(HUES)])
        frame.set_xlabel(X_TITLES[over], fontsize=9.5)
        _finish(frame, what, over)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.06 / wide, 0.02),
        frameon=False,
        fontsize=8.5,
        ncols=2 if any(" ToMe" in label for label in labels) else 1,
    )
    below = 0.62 + 0.2 * len(sections)
    figure.subplots_adjust(
        top=1 - 0.86 / high,
        bottom=(below + 0.1) / high,
        left=0.68 / wide,
        right=1 - 0.12 / wide,
        wspace=0.26,
    )
    return figure


def _lines(axes: Any, section: Section, over: str, what: str, colour: str) -> None:
    """One line for each method, from the dense model on where that is a point of the sweep."""
    name = textwrap.shorten(section["model"], 60, placeholder="…").replace("$", r"\$")
    for method, (marker, line) in METHODS.items():
        rows = [row for row in section["rows"] if row["label"].startswith(method)]
        if not rows:
            continue
        if over != "t":
            rows = [row for row in section["rows"] if row["kind"] == "dense"] + rows
        points = [(_x(row, over), *_y(row, what)) for row in rows]
        points = sorted(point for point in points if point[1] is not None)
        xs, ys, lows, highs = ([point[i] for point in points] for i in range(4))
        style: dict[str, Any] = {"color": colour, "linestyle": line, "linewidth": 1.4}
        filled = {} if method == "DSM" else {"markerfacecolor": "white"}
        axes.plot(xs, ys, marker=marker, markersize=5, label=f"{name}, {method}", **style, **filled)
        axes.vlines(xs, lows, highs, color=colour, linewidth=1.0, alpha=0.7)


def _as_gmacs(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """The speed that the share of GMACs would give, dotted."""
    least = min(row["share"] for row in rows)
    shares = [least + (1 - least) * step / 50 for step in range(51)]
    xs, ys = [100 * share for share in shares], [1 / share for share in shares]
    axes.plot(xs, ys, color="#8C8C8C", linestyle=":", linewidth=1.2)
    axes.text(xs[0], ys[0], "as GMACs would have it ", fontsize=8, color=GREY, ha="right")


def _x(row: Mapping[str, Any], over: str) -> float:
    if over == "t":
        return float(row["local_blocks"])
    return 100 * row["share"] if over == "cost" else float(row["r"] or 0)


def _y(row: Mapping[str, Any], what: str) -> list[Any]:
    """Value, lower and upper end."""
    if what == "speed":
        return [(row["timing"] or {}).get(f"speedup{end}") for end in ("", "_q25", "_q75")]
    name = "top1_change" if what == "top1" else what
    scale = 100 if what == "agreement" else 1
    ends = [row["quality"][f"{name}{end}"] for end in ("", "_low", "_high")]
    return [None if value is None else scale * value for value in ends]


def _finish(axes: Any, what: str, over: str) -> None:
    titles = {
        "divergence": "divergence from dense (nats)",
        "top1": "top-1, change from dense (points)",
        "agreement": "agreement with dense (%)",
        "speed": "speed relative to dense",
    }
    axes.set_title(titles[what], fontsize=10, loc="left")
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    if over != "cost":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.invert_xaxis()
    if what == "divergence":
        axes.set_ylim(bottom=0)
