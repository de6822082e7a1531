"""Merged tokens and windows on an image, drawn by matplotlib."""

from __future__ import annotations

import dataclasses
import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

__all__ = ["Array", "Panel", "encoded", "page", "tokens_on_image", "tokens_on_images"]

Array = np.ndarray[Any, Any]
Segments = list[tuple[tuple[float, float], tuple[float, float]]]

DPI = 150
PANEL_INCHES = 2.5  # longer side of one picture
MOST_COLUMNS = 5
INSET = 0.09  # of a patch, from its edge to the border of its group
HUES = 18  # colours of borders
DARK = (0.13, 0.13, 0.13)  # of what was pruned, and under borders


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of a row.

    Attributes:
        title: below which it stands.
        groups: [rows, columns] integers, equal for patches of one token, -1 where a patch was
            pruned; ``None`` for the image as it is.
        window: side of the windows in patches, or ``None``.
    """

    title: str
    groups: Array | None = None
    window: int | None = None


def tokens_on_image(image: Array, panels: Sequence[Panel], title: str, subtitle: str) -> Figure:
    """Draw the tokens that patches have become, side by side.

    Patches of one token are filled with their mean colour and have a border of one colour, wherever
    they lie; a patch that is a token of its own shows the image; pruned ones are dark.

    Args:
        image: [H, W, 3] float, 0 to 1; H and W are multiples of the sides of ``groups``.
        panels: one picture each.
        title, subtitle: above them.
    """
    figure, axes = page(len(panels), image.shape[0] / image.shape[1], title, subtitle)
    for one, panel in zip(axes, panels, strict=True):
        _draw_panel(one, image, panel)
    return figure


def tokens_on_images(
    rows: Sequence[tuple[Array, Sequence[Panel]]], title: str, subtitle: str
) -> Figure:
    """Draw several images as :func:`tokens_on_image` draws one, below one another.

    Args:
        rows: an image and its pictures each; all images of one shape, all rows of one length.
        title, subtitle: above them.
    """
    image, panels = rows[0]
    aspect, count = image.shape[0] / image.shape[1], len(rows) * len(panels)
    figure, axes = page(count, aspect, title, subtitle, columns=len(panels))
    drawn = [(image, panel) for image, panels in rows for panel in panels]
    for one, (image, panel) in zip(axes, drawn, strict=True):
        _draw_panel(one, image, panel)
    return figure


def page(
    count: int,
    aspect: float,
    title: str,
    subtitle: str,
    *,
    below: float = 0.0,
    columns: int | None = None,
) -> tuple[Figure, list[Any]]:
    """Return a figure with ``count`` frames for pictures, in rows.

    Args:
        count: of frames.
        aspect: height over width of a picture.
        title, subtitle: above them.
        below: inches left free at the bottom.
        columns: frames in a row; ``None`` for at most five, the rows as even as can be.
    """
    columns = columns or math.ceil(count / math.ceil(count / MOST_COLUMNS))
    rows = math.ceil(count / columns)
    width, height = PANEL_INCHES * min(1, 1 / aspect), PANEL_INCHES * min(1, aspect)
    side = max(columns * (width + 0.1) + 0.1, 5.2)
    heading = textwrap.wrap(_plain(title), int(side * 11))[:2]
    small = textwrap.wrap(_plain(subtitle), int(side * 15))[:3]
    top = 0.08 + 0.21 * len(heading) + 0.155 * len(small)
    total = top + rows * (height + 0.32) + 0.05 + below
    figure = Figure(figsize=(side, total), dpi=DPI)
    FigureCanvasAgg(figure)
    at: dict[str, Any] = {"va": "top", "linespacing": 1.2}
    x = 0.1 / side
    figure.text(x, 1 - 0.1 / total, "\n".join(heading), fontsize=12, fontweight="bold", **at)
    under = 0.14 + 0.21 * len(heading)
    figure.text(x, 1 - under / total, "\n".join(small), fontsize=8.5, color="#595959", **at)
    axes = []
    for number in range(count):
        row, column = divmod(number, columns)
        left = 0.1 + column * (width + 0.1)
        bottom = total - top - (row + 1) * (height + 0.32)
        frame = figure.add_axes((left / side, bottom / total, width / side, height / total))
        frame.set_axis_off()
        axes.append(frame)
    return figure, axes


def encoded(figure: Figure, form: str) -> bytes:
    """Return a figure as ``png`` or ``svg``; the same bytes on every run."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dsm_tune"}):
        figure.savefig(stream, format=form, metadata={"Date": None} if form == "svg" else None)
    return stream.getvalue()


def _draw_panel(axes: Any, image: Array, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=9, pad=4)
    axes.imshow(image, extent=(0, image.shape[1], image.shape[0], 0), interpolation="bilinear")
    if panel.groups is not None:
        _draw_groups(axes, image, panel.groups)
        if panel.window is not None:
            _draw_windows(axes, image, panel.groups.shape, panel.window)
    axes.set_xlim(0, image.shape[1])
    axes.set_ylim(image.shape[0], 0)


def _draw_groups(axes: Any, image: Array, groups: Array) -> None:
    rows, columns = groups.shape
    high, wide = image.shape[0] / rows, image.shape[1] / columns
    axes.imshow(
        _fill(image, groups),
        extent=(0, image.shape[1], image.shape[0], 0),
        interpolation="nearest",
    )
    width = max(0.7, 0.075 * 72 * PANEL_INCHES / max(rows, columns))
    lines, colours = [], []
    for group, hue in _hues(groups).items():
        for (x0, y0), (x1, y1) in _outline(groups == group):
            lines.append([(x0 * wide, y0 * high), (x1 * wide, y1 * high)])
            colours.append(hsv_to_rgb((hue, 0.85, 1.0)))
    # A dark line under the bright one: it is seen on any fill.
    for shade, thick in ([DARK], 1.9 * width), (colours, width):
        axes.add_collection(
            LineCollection(lines, colors=shade, linewidths=thick, capstyle="projecting")
        )


def _hues(groups: Array) -> dict[int, float]:
    """A hue for each token of several patches, far from those of the tokens beside it."""
    counts = dict(
        zip(*(part.tolist() for part in np.unique(groups, return_counts=True)), strict=True)
    )
    merged = [group for group, count in counts.items() if group >= 0 and count > 1]
    beside: dict[int, set[int]] = {group: set() for group in merged}
    padded = np.pad(groups, 1, constant_values=-1)
    rows, columns = groups.shape
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        other = padded[1 + down : 1 + down + rows, 1 + right : 1 + right + columns]
        for one, two in zip(groups.ravel().tolist(), other.ravel().tolist(), strict=True):
            if one != two and one in beside and two in beside:
                beside[one].add(two)
                beside[two].add(one)
    hues: dict[int, float] = {}
    used = [0] * HUES
    for group in sorted(merged, key=lambda g: -counts[g]):
        taken = [hues[other] for other in beside[group] if other in hues]
        worth = []
        for index, times in enumerate(used):
            near = min((_apart(index / HUES, one) for one in taken), default=0.5)
            worth.append(min(near, 0.2) - 0.02 * times)
        best = worth.index(max(worth))
        hues[group] = best / HUES
        used[best] += 1
    return hues


def _apart(one: float, two: float) -> float:
    """Distance of two hues on their circle, 0 to 0.5."""
    return abs((one - two + 0.5) % 1 - 0.5)


def _fill(image: Array, groups: Array) -> Array:
    """[rows, columns, 4]: mean colour of each merged token, dark where pruned, else clear."""
    rows, columns = groups.shape
    patches = image.reshape(rows, image.shape[0] // rows, columns, image.shape[1] // columns, 3)
    means = patches.mean(axis=(1, 3))
    filled = np.zeros((rows, columns, 4))
    for group in np.unique(groups):
        member = groups == group
        if group < 0:
            filled[member] = (*DARK, 1.0)
        elif member.sum() > 1:
            filled[member] = (*means[member].mean(axis=0), 1.0)
    return filled


def _outline(member: Array) -> Segments:
    """Borders of a set of patches, a little inside of them, in patches; each side turned up once.

    An end of a side is drawn back at an outer corner of the set and drawn on at an inner one, so
    that the sides meet.
    """
    found: Segments = []
    for turns in range(4):
        turned = np.pad(np.rot90(member, turns), 1)
        rows, columns = turned.shape[0] - 2, turned.shape[1] - 2
        for row, column in np.argwhere(turned[1:-1, 1:-1] & ~turned[:-2, 1:-1]).tolist():
            here, above = turned[row + 1], turned[row]
            ends = []
            for side, sign in ((column, 1), (column + 2, -1)):
                shift = INSET if not here[side] else -INSET if above[side] else 0.0
                ends.append(column + (sign < 0) + sign * shift)
            start, end = ((x, row + INSET) for x in ends)
            found.append((_back(start, turns, rows, columns), _back(end, turns, rows, columns)))
    return found


def _back(point: tuple[float, float], turns: int, rows: int, columns: int) -> tuple[float, float]:
    """Undo quarter turns of :func:`numpy.rot90` on a point (x, y) of a turned grid."""
    x, y = point
    for _ in range(turns):
        x, y = rows - y, x
        rows, columns = columns, rows
    return x, y


def _draw_windows(axes: Any, image: Array, grid: tuple[int, ...], window: int) -> None:
    high, wide = image.shape[0] / grid[0], image.shape[1] / grid[1]
    across = [row * high for row in range(window, grid[0], window)]
    down = [column * wide for column in range(window, grid[1], window)]
    for colour, width in (("black", 3.0), ("white", 1.6)):
        for y in across:
            axes.axhline(y, color=colour, linewidth=width)
        for x in down:
            axes.axvline(x, color=colour, linewidth=width)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib reads formulas between dollars
