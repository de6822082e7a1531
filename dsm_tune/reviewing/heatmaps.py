"""Attention received and token norms, on the image and over depth, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dsm_tune.reviewing.pictures import Array, page
from dsm_tune.reviewing.points import COLOURS

__all__ = ["sinks_on_image"]

BELOW = 3.0  # inches for the two curves
LEAST = 2.0  # equal shares that make a sink
MARGIN = 0.62  # inches beside a curve


def sinks_on_image(
    image: Array, received: Array, norms: Array, grid: tuple[int, int], blocks: Sequence[int]
) -> Figure:
    """Draw where attention goes: per patch in some blocks, and over all blocks.

    Args:
        image: [H, W, 3] float, 0 to 1.
        received: [depth, N], attention that tokens receive, 1 on average; patch tokens last.
        norms: [depth, N], L2 norms of the tokens.
        grid: rows and columns of patches; what stands before these are prefix tokens, the class
            token first.
        blocks: to be shown on the image.
    """
    prefix = received.shape[1] - grid[0] * grid[1]
    ratio = norms / np.median(norms[:, prefix:], axis=1, keepdims=True)
    most, where = received.max(axis=1), int(received.max(axis=1).argmax())
    names = ["the class token", *(f"prefix token {i}" for i in range(1, prefix))]
    token = int(received[where].argmax())
    name = names[token] if token < prefix else "a patch"
    aspect = image.shape[0] / image.shape[1]
    title = f"Attention sinks: {name} receives {most[where]:.0f}× its share in block {where}"
    if most[where] < LEAST:
        title = f"No attention sink: no token receives more than {most[where]:.3g}× its share"
    figure, axes = page(
        2 * (len(blocks) + 1),
        aspect,
        title,
        "Above: attention that patches receive, mean over heads and queries; 1 is an equal share. "
        "Below: L2 norm of the tokens that leave the block, relative to the median patch.",
        below=BELOW,
    )
    side = len(blocks) + 1
    axes[0].imshow(image)
    axes[0].set_title("image", fontsize=9, pad=4)
    for row, (values, label) in enumerate(
        [(received, "attention received"), (ratio, "token norm / median")]
    ):
        frames = axes[row * side : (row + 1) * side]
        scale = _scale(values[list(blocks), prefix:])
        for frame, block in zip(frames[1:], blocks, strict=True):
            _heat(frame, image, values[block, prefix:].reshape(grid), scale)
            largest = values[block, prefix:].max()
            frame.set_title(f"block {block} (patches up to {largest:.3g}×)", fontsize=8, pad=4)
        # One frame of the first column holds the image, the other both bars.
        _bar(figure, axes[side], scale, label, 0.66 - 0.42 * row)
    _curves(figure, received, "attention received, × equal share", prefix, 0)
    _curves(figure, norms, "L2 norm of tokens", prefix, 1)
    return figure


def _scale(values: Array) -> LogNorm:
    return LogNorm(
        max(float(np.quantile(values, 0.02)), 1e-3), max(float(values.max()), 1e-3) * 1.001
    )


def _heat(axes: Any, image: Array, values: Array, scale: LogNorm) -> None:
    """Colour the patches, with the image in grey under them."""
    high, wide = image.shape[:2]
    grey = image.mean(axis=2)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, wide, high, 0))
    axes.imshow(
        np.maximum(values, scale.vmin or 0),
        norm=scale,
        cmap="inferno",
        alpha=0.72,
        extent=(0, wide, high, 0),
        interpolation="nearest",
    )


def _bar(figure: Figure, frame: Any, scale: LogNorm, label: str, bottom: float) -> None:
    """A colour bar in an empty frame."""
    where = frame.inset_axes((0.04, bottom, 0.9, 0.07))
    bar = figure.colorbar(
        ScalarMappable(scale, "inferno"), cax=where, orientation="horizontal", ticklocation="top"
    )
    low, high = scale.vmin or 1.0, scale.vmax or 1.0
    ends = [low, (low * high) ** 0.5, high]
    bar.ax.xaxis.set_major_locator(FixedLocator(ends))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    bar.ax.tick_params(labelsize=8, length=2, pad=1)
    first, _, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    bar.set_label(label, fontsize=8.5, labelpad=2)


def _curves(figure: Figure, values: Array, label: str, prefix: int, column: int) -> None:
    """Prefix tokens, and the spread of patches, over depth."""
    wide, high = figure.get_size_inches()
    width = (wide - 0.3 - 2 * MARGIN) / 2
    left = MARGIN + column * (width + MARGIN + 0.12)
    axes = figure.add_axes((left / wide, 0.5 / high, width / wide, (BELOW - 0.7) / high))
    depth, patches = range(len(values)), values[:, prefix:]
    low, middle, high_share = np.quantile(patches, (0.05, 0.5, 0.95), axis=1)
    axes.fill_between(depth, low, high_share, color="#BFD8EA", label="90 % of patches", linewidth=0)
    axes.plot(depth, middle, color=COLOURS["front"], label="median patch", linewidth=1.5)
    axes.plot(
        depth, patches.max(axis=1), "o-", color=COLOURS["tome"], label="largest patch", ms=3.5
    )
    for index in range(min(prefix, 1)):
        axes.plot(depth, values[:, index], "s-", color="black", label="class token", ms=3.5)
    if prefix > 1:
        rest = values[:, 1:prefix].max(axis=1)
        label_rest = "largest other prefix token"
        axes.plot(depth, rest, "^-", color=COLOURS["chosen"], label=label_rest, ms=3.5)
    if values.max() > 8 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("block", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not column:  # it has the more room
        axes.legend(frameon=False, fontsize=7.5, loc="best")
