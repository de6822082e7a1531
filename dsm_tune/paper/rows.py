"""Rows of the paper's items on a model, with all that needs no measurement."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from dsm_tune import schedules
from dsm_tune.paper.plans import geometry_of, gmacs_of_other, plan_of
from dsm_tune.paper.printed import Item, Printed, Row, at
from dsm_tune.plan import Geometry, MergePlan

__all__ = ["Document", "Line", "document_of", "own_lines", "papers_line", "papers_lines", "related"]

Document = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Line:
    """A row on one model: its plan, or none for a model without tokens."""

    row: Row
    model: str
    plan: MergePlan | None
    dense: MergePlan | None
    delay: int


def papers_lines(item: Item, rates: Sequence[int]) -> list[Line]:
    """Return the rows of an item on the paper's models, with the paper's D.

    Args:
        item: a table.
        rates: r of what is swept.
    """
    return [papers_line(row) for row in _with_rates(item, rates)]


def papers_line(row: Row) -> Line:
    """A row on the paper's model, with the paper's D."""
    if row.recipe.kind == "other":
        return Line(row, row.model, None, None, 0)
    geometry = geometry_of(row.model)
    return _line(row, row.model, geometry, schedules.default_delay(geometry))


def own_lines(
    item: Item, rates: Sequence[int], name: str, geometry: Geometry, delay: int
) -> list[Line]:
    """Return the rows of an item on a given model; models without tokens stay what they are.

    Args:
        item: a table or figure.
        rates: r of what is swept.
        name: of the model.
        geometry: of the model.
        delay: its D.
    """
    lines: dict[object, Line] = {}
    several = len({row.model for row in item.rows if row.recipe.kind != "other"}) > 1
    for row in _with_rates(item, rates):
        if row.recipe.kind == "other":
            lines.setdefault(row.label, papers_line(row))
            continue
        if several:  # what is printed is of models of several sizes, of which this is none
            row = dataclasses.replace(row, printed=Printed())
        lines.setdefault(row.recipe, _line(row, name, geometry, delay))
    return list(lines.values())


def _line(row: Row, name: str, geometry: Geometry, delay: int) -> Line:
    plan = plan_of(row.recipe, geometry, delay)
    return Line(row, name, plan, plan.dense(), delay)


def _with_rates(item: Item, rates: Sequence[int]) -> list[Row]:
    """The rows of an item, and one for each r that is asked for of each recipe that is swept."""
    rows = list(item.rows)
    there = {(row.recipe, row.model) for row in rows}
    model = rows[0].model if rows else ""
    for recipe in item.swept:
        for r in rates:
            one = at(recipe, r=r)
            if (one, model) not in there:
                rows.append(Row("ToMe" if not recipe.delayed else "DSM", one, model))
    if item.swept:
        rows.sort(key=lambda row: (row.label != "dense", row.label != "ToMe", row.recipe.r or 0))
    return rows


def document_of(one: Line, *, is_own: bool = False) -> Document:
    """A row but for what is measured; ``deviation`` is from print, of the paper's models alone."""
    recipe, printed = one.row.recipe, one.row.printed
    if one.plan is None or one.dense is None:
        gmacs, r, removed = gmacs_of_other(one.model), None, None
        dense = None
    else:
        gmacs, dense = one.plan.gmacs, one.dense.gmacs
        r = max((step.r for step in one.plan.steps), default=None)
        removed = sum(one.plan.removed)
    in_print = None if printed.gmacs is None else float(printed.gmacs)
    return {
        "label": one.row.label,
        "model": one.model,
        "kind": recipe.kind,
        "r": r,
        "r_is_fitted": recipe.share is not None,
        "delay": one.delay if recipe.delayed and one.plan is not None else 0,
        "local_blocks": recipe.local,
        "removed": removed,
        "gmacs": gmacs,
        "share": None if dense is None else gmacs / dense,
        "printed": {
            "gmacs": printed.gmacs,
            "top1": printed.top1,
            "where": printed.where or None,
        },
        "deviation": None if in_print is None or is_own else gmacs / in_print - 1,
        "plan": None if one.plan is None else json.loads(one.plan.to_json()),
    }


def related(rows: list[Document]) -> list[Document]:
    """With what is printed relative to the printed dense model, which other models can be held to.

    Print is of one model wherever its dense row says both; of several, each has its own.
    """
    dense: Document = {}
    for row in rows:
        printed = row["printed"]
        if row["kind"] == "dense":
            dense = printed
        gmacs, top1 = printed["gmacs"], printed["top1"]
        has_gmacs = gmacs is not None and dense.get("gmacs") is not None
        has_top1 = top1 is not None and dense.get("top1") is not None
        printed["share"] = float(gmacs) / float(dense["gmacs"]) if has_gmacs else None
        printed["top1_change"] = top1 - dense["top1"] if has_top1 else None
    return rows
