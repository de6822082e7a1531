"""Similarity curves of several models, in one frame or side by side, drawn by matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsm_tune.reviewing.points import COLOURS

__all__ = ["HUES", "curves_apart", "curves_together"]

Curve = Mapping[str, Any]

DPI = 150
COLUMNS = 4
GREY = "#595959"
# Okabe and Ito's palette without yellow, which is too pale for a line.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
STYLES = ("-", "--", ":", "-.")
LEAST = 0.02  # height of a small frame: a flat curve is to look flat
RANDOM = "random weights: its D means nothing"


def curves_together(curves: Sequence[Curve], title: str) -> Figure:
    """Draw curves over relative depth in one frame, each with its D.

    Args:
        curves: one or more, each with ``model``, ``weights`` (``given`` or ``random``),
            ``similarity_curve``, ``delay``, ``transition``, ``stability`` and ``images``.
        title: above them.
    """
    figure = Figure(figsize=(9.5, 5.0), dpi=DPI)
    FigureCanvasAgg(figure)
    _head(figure, title, _images_words(curves), 0.975)
    axes = figure.add_axes((0.075, 0.11, 0.52, 0.76))
    for number, one in enumerate(curves):
        values = one["similarity_curve"]
        depth = [block / max(len(values) - 1, 1) for block in range(len(values))]
        style: dict[str, Any] = {
            "color": HUES[number % len(HUES)],
            "linestyle": STYLES[number // len(HUES) % len(STYLES)],
            "linewidth": 1.6,
        }
        is_random = one["weights"] == "random"
        if is_random:
            style.update(linewidth=1.0, alpha=0.6)
        label = textwrap.fill(one["model"], 44) + "\n  " + _delay_words(one)
        axes.plot(depth, values, marker="o", markersize=3, label=_plain(label), **style)
        if not is_random:
            place = one["delay"]
            axes.plot(depth[place], values[place], "*", color=style["color"], markersize=14)
    axes.set_xlabel("depth: block / last block", fontsize=10)
    axes.set_ylabel("mean cosine similarity of tokens", fontsize=10)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.02, 1.02),
        frameon=False,
        fontsize=8,
        labelspacing=0.8,
        borderaxespad=0,
    )
    _grid(axes)
    return figure


def curves_apart(curves: Sequence[Curve], title: str) -> Figure:
    """Draw one small frame per model, block by block, with the blocks before D in grey.

    Args:
        curves: as of :func:`curves_together`.
        title: above them.
    """
    columns = min(COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    wide, high = max(2.9 * columns + 0.5, 6.4), 2.45 * rows + 1.0
    figure = Figure(figsize=(wide, high), dpi=DPI)
    FigureCanvasAgg(figure)
    _head(figure, title, _images_words(curves), 1 - 0.1 / high)
    frames = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(frames.flat):
        if number < len(curves):
            _one(axes, curves[number])
        else:
            axes.set_axis_off()
    for row in frames:
        row[0].set_ylabel("similarity", fontsize=9)
    figure.subplots_adjust(
        top=1 - 1.05 / high,
        bottom=0.5 / high,
        left=0.62 / wide,
        right=1 - 0.12 / wide,
        hspace=0.62,
        wspace=0.26,
    )
    return figure


def _one(axes: Any, one: Curve) -> None:
    values, delay = one["similarity_curve"], one["delay"]
    is_random = one["weights"] == "random"
    colour = "#8C8C8C" if is_random else COLOURS["front"]
    axes.plot(range(len(values)), values, "o-", color=colour, markersize=3, linewidth=1.3)
    if not is_random:
        if delay > 0:
            axes.axvspan(-0.5, delay - 0.5, color="#E9E9E9", zorder=0)
        axes.plot([delay], [values[delay]], "*", color=COLOURS["chosen"], markersize=13)
    name = "\n".join(textwrap.wrap(_plain(one["model"]), 34)[:3])
    axes.set_title(f"{name}\n{_delay_words(one)}", fontsize=7.5, loc="left")
    axes.set_xlim(-0.5, len(values) - 0.5)
    middle = (min(values) + max(values)) / 2
    if max(values) - min(values) < LEAST:
        axes.set_ylim(middle - LEAST / 2, middle + LEAST / 2)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("block", fontsize=8, labelpad=1)
    axes.tick_params(labelsize=7.5)
    _grid(axes)


def _delay_words(one: Curve) -> str:
    """D and how often resamples find it, or why there is none."""
    if one["weights"] == "random":
        return RANDOM
    delay = one["delay"]
    if not one["transition"]:
        return f"D = {delay}, depth / 6: no transition"
    share = one["stability"].get(str(delay), 0.0)
    return f"D = {delay}, in {share:.0%} of resamples"


def _images_words(curves: Sequence[Curve]) -> str:
    counts = {one["images"] for one in curves}
    words = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    stars = "" if all(one["weights"] == "random" for one in curves) else " · star: the delay D"
    return f"after the attention of each block, mean over {words} images{stars}"


def _head(figure: Figure, title: str, subtitle: str, top: float) -> None:
    at: dict[str, Any] = {"va": "top", "x": 0.015 if figure.get_figwidth() > 8 else 0.02}
    high = figure.get_figheight()
    figure.text(y=top, s=_plain(title), fontsize=12, fontweight="bold", **at)
    figure.text(y=top - 0.26 / high, s=_plain(subtitle), fontsize=8.5, color=GREY, **at)


def _grid(axes: Any) -> None:
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib reads formulas between dollars
