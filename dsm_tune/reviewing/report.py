"""The report: one page that says what MLflow says and loads nothing; and the tables as files."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsm_tune.results import Trial, TuneResult
from dsm_tune.reviewing import summary
from dsm_tune.reviewing.stores import redact

__all__ = ["front_json", "report_html", "trials_csv"]

CAPTIONS = {
    "pareto.png": "Quality against what the budget limits; pareto.html is the same to point at.",
    "similarity_curve.png": "How alike the tokens of an image are after each block's attention.",
    "tokens.png": "How many tokens enter each block.",
    "importance.png": "How much each parameter of the search decided (PED-ANOVA over all trials).",
    "prediction.png": "What the device profile said of the plans that were timed in the end.",
    "merged_tokens.png": "What the chosen plan makes of images that the search never saw.",
}
STYLE = """
:root { color-scheme: light; }
body { font: 17px/1.55 Charter, Georgia, 'Times New Roman', serif; color: #1b1b1b;
  background: #fff; max-width: 62rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
.about { color: #595959; margin: 0 0 1.6rem; }
.answer { font-size: 1.15rem; border-left: 4px solid #0072B2; padding: .1rem 0 .1rem 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font: 14px/1.4 system-ui, 'Helvetica Neue', Arial, sans-serif;
  font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .45rem .8rem .45rem 0; text-align: right; border-bottom: 1px solid #e5e5e5;
  white-space: nowrap; }
th { font-weight: 600; color: #595959; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, td.words, th.words { text-align: left; }
tr.chosen td { font-weight: 650; background: #f2f7fb; }
figure { margin: 1.2rem 0 2rem; } img { max-width: 100%; height: auto; }
figcaption, small { color: #595959; font-size: .88rem; }
code, pre { font: 13.5px/1.5 ui-monospace, 'DejaVu Sans Mono', Menlo, monospace; }
pre { background: #f6f6f4; padding: .9rem 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def report_html(
    result: TuneResult,
    trials: Sequence[Trial],
    *,
    figures: Mapping[str, bytes] | None = None,
    command: str = "",
) -> str:
    """Return the report as one self-contained page.

    Args:
        result: of the study.
        trials: all of them.
        figures: PNG by file name.
        command: what repeats the study.
    """
    device = result.device.get("name", "")
    about = f"{result.model} · {device} · budget {summary.budget_words(result.budget)}"
    parts = [
        f"<h1>{_safe(summary.headline(result))}</h1>",
        f"<p class='about'>{_safe(about)} · study {_safe(result.study)}</p>",
        f"<p class='answer'>{_safe(summary.answer(result))}</p>",
        _references(result),
        *(_figure(name, data) for name, data in (figures or {}).items()),
        _front(result),
        _study(result, trials),
        "<h2>Repeat it</h2>"
        f"<pre>{_safe(redact(command))}</pre><p><small>The same as a file: "
        "<code>dsm-tune --config config.toml</code>.</small></p>"
        if command
        else "",
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_safe(result.study)} · dsm-tune</title><style>{STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def trials_csv(trials: Sequence[Trial]) -> str:
    """Return one line per trial, its drawn parameters in columns of their own."""
    names = sorted({name for trial in trials for name in trial.params})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    known = _columns(Trial(0, 0, "", "", {}, None))
    writer.writerow([*known, *(f"params.{name}" for name in names)])
    for trial in trials:
        values = [*_columns(trial).values(), *(trial.params.get(name) for name in names)]
        writer.writerow([_cell(value) for value in values])
    return stream.getvalue()


def front_json(result: TuneResult) -> str:
    """Return the front as a list of RESULT, plans included, as in the ``--json`` document."""
    return json.dumps([one.to_dict() for one in result.front], indent=1) + "\n"


def _references(result: TuneResult) -> str:
    rows = summary.rows(result)
    table = _table(summary.headings(result), [row.cells for row in rows], mark=3)
    return (
        f"<h2>What tuning bought</h2>{table}<p><small>Quality on {result.images.get('holdout')} "
        "held-out images that the search never saw; brackets are 95 % intervals. ToMe and DSM are "
        "the published schedules, fitted to the same budget.</small></p>"
    )


def _front(result: TuneResult) -> str:
    if not result.front:
        return "<h2>The front</h2><p>No plan meets the budget, so that the front is empty.</p>"
    cells = [
        (*summary.row(_name(one.trial), one, result).cells[:-1], summary.plan_words(one.plan))
        for one in result.front
    ]
    chosen = None if result.chosen is None else result.chosen.plan.digest
    digests = [one.plan.digest for one in result.front]
    mark = digests.index(chosen) if chosen in digests else -1
    headings = ("trial", *summary.headings(result)[1:-1], "plan")
    return (
        f"<h2>The front: {len(cells)} plans within the budget</h2>"
        f"{_table(headings, cells, mark=mark, words=len(headings) - 1)}<p><small>Cheapest first; "
        "none is both cheaper and better than another. In <code>plan</code>, D is the first block "
        "that merges, r the tokens that leave per block, w the windows. The plans themselves: "
        "<code>front.json</code>.</small></p>"
    )


def _study(result: TuneResult, trials: Sequence[Trial]) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in result.trials.items())
    search, holdout = result.images.get("search"), result.images.get("holdout")
    spent = sum(trial.seconds for trial in trials)
    pairs = [
        ("trials", counts),
        ("images", f"{search} to search, {holdout} held out"),
        ("delay", summary.delay_words(result.similarity_curve, result.delay)),
        ("time", f"{result.seconds:.0f} s; evaluation of the trials {spent:.0f} s"),
        ("device", f"{result.device.get('name', '')} ({result.device.get('fingerprint', '')})"),
        ("MLflow", f"{redact(result.tracking_uri)}, run {result.parent_run_id}"),
    ]
    lines = "".join(
        f"<tr><td>{_safe(key)}</td><td class=words>{_safe(value)}</td></tr>" for key, value in pairs
    )
    failed = [trial for trial in trials if trial.state == "failed"]
    causes = "".join(f"<li>trial {t.number}: {_safe(redact(t.why))}</li>" for t in failed[:20])
    more = f"<p><small>Failed:</small></p><ul>{causes}</ul>" if failed else ""
    return f"<h2>The study</h2><div class='wide'><table>{lines}</table></div>{more}"


def _table(
    headings: Iterable[str], lines: Sequence[Iterable[str]], *, mark: int, words: int = -1
) -> str:
    def cells(tag: str, values: Iterable[str]) -> str:
        return "".join(
            f"<{tag}{' class=words' if i == words else ''}>{_safe(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    body = "".join(
        f"<tr{' class=chosen' if i == mark else ''}>{cells('td', line)}</tr>"
        for i, line in enumerate(lines)
    )
    head = f"<thead><tr>{cells('th', headings)}</tr></thead>"
    return f"<div class='wide'><table>{head}<tbody>{body}</tbody></table></div>"


def _figure(name: str, data: bytes) -> str:
    caption = _safe(CAPTIONS.get(name, name))
    source = base64.b64encode(data).decode()
    return (
        f"<figure><img alt='{caption}' src='data:image/png;base64,{source}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _columns(trial: Trial) -> dict[str, Any]:
    plan = trial.plan
    return {
        "number": trial.number,
        "generation": trial.generation,
        "label": trial.label,
        "state": trial.state,
        "why": trial.why,
        "feasible": trial.feasible,
        "pareto": trial.pareto,
        "images": trial.images,
        "divergence": trial.divergence,
        "agreement": trial.agreement,
        "top1": trial.top1,
        "gmacs": None if plan is None else plan.gmacs,
        "latency_predicted_ms": trial.predicted_ms,
        "evaluation_seconds": trial.seconds,
        "plan_digest": None if plan is None else plan.digest,
        "plan": None if plan is None else plan.to_json(),
    }


def _cell(value: object) -> object:
    """Text without secrets, which a spreadsheet does not take for a formula."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return value
    return redact(f"'{value}" if value.startswith(("=", "+", "-", "@")) else value)


def _name(trial: int | None) -> str:
    return summary.UNKNOWN if trial is None else str(trial)


def _safe(text: object) -> str:
    return html.escape(str(text))
