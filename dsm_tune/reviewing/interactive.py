"""The Pareto figure to point at and zoom, drawn by plotly into one file that loads nothing."""

from __future__ import annotations

import base64
import functools
import gzip
import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io
import plotly.offline

from dsm_tune.results import Trial, TuneResult
from dsm_tune.reviewing import points
from dsm_tune.reviewing.points import COLOURS, KINDS, MARKERS, Point, Scatter

__all__ = ["pareto_html"]

SIZES = {"pruned": 6, "infeasible": 6, "trial": 6, "front": 9, "dense": 12, "tome": 13, "dsm": 12}
STYLE = """
html, body { height: 100%; margin: 0; }
body { display: flex; flex-direction: column; box-sizing: border-box; padding: 14px 16px 6px;
  font: 13px/1.45 system-ui, 'Helvetica Neue', Arial, sans-serif; color: #595959; }
h1 { font-size: 17px; line-height: 1.25; margin: 0 0 3px; color: #1b1b1b; text-wrap: balance; }
p { margin: 0; }
#figure { flex: 1; min-height: 340px; }
"""
# plotly is 4.8 MB, a third of that when packed; every browser since 2023 unpacks it.
DRAW = """
const drawing = JSON.parse(document.getElementById('drawing').textContent);
const packed = document.getElementById('plotly').textContent;
const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
new Response(stream).text().then((source) => {
  const script = document.createElement('script');
  script.textContent = source;
  document.head.append(script);
  const settings = { displaylogo: false, responsive: true };
  return Plotly.newPlot('figure', drawing.data, drawing.layout, settings);
}).catch((error) => {
  document.getElementById('figure').textContent =
    `This browser cannot draw the figure (${error}); pareto.png shows the same.`;
});
"""


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
            drawing.budget, line={"dash": "dash", "color": "#595959", "width": 1.5}, layer="below"
        )
        figure.add_annotation(
            x=drawing.budget,
            y=1,
            yref="paper",
            yanchor="bottom",
            text=html.escape(drawing.budget_label),
            showarrow=False,
        )
    figure.update_layout(_layout(drawing))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(drawing.title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(drawing.title)}</h1><p>{html.escape(drawing.subtitle)}"
        f"{html.escape(_outside(drawing))}</p><div id='figure'></div>\n"
        f"<script type='application/json' id='drawing'>{_json(figure)}</script>\n"
        f"<script type='text/plain' id='plotly'>{_packed_plotly()}</script>\n"
        f"<script>{DRAW}</script></body></html>\n"
    )


def _json(figure: Any) -> str:
    """The figure as JSON that no name in it can end."""
    text: str = plotly.io.to_json(figure)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@functools.cache
def _packed_plotly() -> str:
    """The library, the same bytes on every run."""
    source: str = plotly.offline.get_plotlyjs()
    return base64.b64encode(gzip.compress(source.encode(), mtime=0)).decode()


def _outside(drawing: Scatter) -> str:
    frame = drawing.frame
    dense = drawing.points["dense"]
    if frame is None or not dense:
        return ""
    return f" · the dense model is at {dense[0].cost:.3g}, right of the frame (double-click: all)"


def _trace(kind: str, some: list[Point]) -> Any:
    colour = COLOURS[kind]
    scale, opacity = points.faintness(kind, len(some))
    return go.Scatter(
        x=[point.cost for point in some],
        y=[point.divergence for point in some],
        error_x=_error([(point.cost, point.cost_edges) for point in some], colour),
        error_y=_error([(point.divergence, point.divergence_edges) for point in some], colour),
        mode="lines+markers" if kind == "front" else "markers",
        line={"color": colour, "width": 1.5},
        marker={
            "symbol": MARKERS[kind][1],
            "size": scale * SIZES.get(kind, 19),
            "color": colour,
            "opacity": opacity,
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
    grid = {"gridcolor": "#E5E5E5", "zeroline": False, "linecolor": "#8C8C8C", "ticks": "outside"}
    return {
        "xaxis": {
            **grid,
            "title": {"text": html.escape(drawing.x_title)},
            **({} if drawing.frame is None else {"range": drawing.frame}),
        },
        "yaxis": {
            **grid,
            "title": {"text": html.escape(drawing.y_title)},
            "range": [-0.05 * drawing.top, drawing.top],
        },
        "template": "none",
        "plot_bgcolor": "white",
        "hoverlabel": {"align": "left"},
        "legend": {
            "orientation": "h", "x": 0, "y": -0.16, "yref": "paper", "yanchor": "top",
            "traceorder": "reversed",
        },
        "margin": {"t": 56, "l": 76, "r": 16, "b": 60},
    }  # fmt: skip
