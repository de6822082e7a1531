"""The Pareto figure to point at and zoom, drawn by plotly into one file that loads nothing."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from dsm_tune.results import Trial, TuneResult
from dsm_tune.reviewing import points
from dsm_tune.reviewing.points import COLOURS, KINDS, MARKERS, Point, Scatter

__all__ = ["pareto_html"]

SIZES = {"pruned": 6, "infeasible": 6, "trial": 6, "front": 9, "dense": 12, "tome": 13, "dsm": 12}


def pareto_html(result: TuneResult, trials: Sequence[Trial]) -> str:
    """Return a page with divergence against cost; pointing at a mark shows its plan and its run.

    Args:
        result: of the study.
        trials: all of them.
    """
    drawing = points.scatter(result, trials)
    figure = go.Figure([_trace(kind, some) for kind, some in drawing.points.items() if some])
    if drawing.budget is not None:
        figure.add_vline(
            drawing.budget,
            line={"dash": "dash", "color": "#595959", "width": 1.5},
            annotation={"text": drawing.budget_label, "textangle": -90, "xanchor": "left"},
            annotation_position="top right",
        )
    figure.update_layout(_layout(drawing))
    page: str = figure.to_html(
        include_plotlyjs=True, full_html=True, config={"displaylogo": False, "responsive": True}
    )
    return page.replace("<head>", f"<head><title>{html.escape(drawing.title)}</title>", 1)


def _trace(kind: str, some: list[Point]) -> Any:
    colour = COLOURS[kind]
    return go.Scatter(
        x=[point.cost for point in some],
        y=[point.divergence for point in some],
        error_x=_error([(point.cost, point.cost_edges) for point in some], colour),
        error_y=_error([(point.divergence, point.divergence_edges) for point in some], colour),
        mode="lines+markers" if kind == "front" else "markers",
        line={"color": colour, "width": 1.5},
        marker={
            "symbol": MARKERS[kind][1],
            "size": SIZES.get(kind, 19),
            "color": colour,
            "opacity": 0.75 if kind in ("pruned", "infeasible", "trial") else 1.0,
            "line": {"width": 1, "color": colour if kind in ("pruned", "infeasible") else "white"},
        },
        name=KINDS[kind],
        text=["<br>".join(html.escape(line) for line in point.words) for point in some],
        hovertemplate=f"<b>{KINDS[kind]}</b><br>%{{text}}<extra></extra>",
    )


def _error(values: list[tuple[float, tuple[float, float] | None]], colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [edges[1] - value if edges else 0.0 for value, edges in values],
        "arrayminus": [value - edges[0] if edges else 0.0 for value, edges in values],
        "color": colour,
        "thickness": 1.4,
        "width": 4,
        "visible": any(edges for _, edges in values),
    }


def _layout(drawing: Scatter) -> dict[str, Any]:
    small = "<br>".join(map(html.escape, textwrap.wrap(drawing.subtitle, 130)))
    grid = {"gridcolor": "#E5E5E5", "zeroline": False, "linecolor": "#8C8C8C"}
    return {
        "title": {
            "text": f"<b>{html.escape(drawing.title)}</b><br>"
            f"<span style='font-size:12px;color:#595959'>{small}</span>",
            "x": 0.01,
            "xanchor": "left",
        },
        "xaxis": {**grid, "title": {"text": html.escape(drawing.x_title)}},
        "yaxis": {
            **grid,
            "title": {"text": html.escape(drawing.y_title)},
            "range": [-0.05 * drawing.top, drawing.top],
        },
        "plot_bgcolor": "white",
        "hoverlabel": {"align": "left"},
        "legend": {"x": 1.02, "y": 1, "traceorder": "reversed"},
        "margin": {"t": 100},
        "height": 640,
    }
