"""The paper's figures as files: of what was measured, and of an image."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from dsm_tune import drawing
from dsm_tune.config import DEMO_MODEL, TuneConfig
from dsm_tune.methods import Settings
from dsm_tune.paper.subjects import Asked
from dsm_tune.reviewing.curves import curves_apart, curves_together
from dsm_tune.reviewing.pictures import encoded
from dsm_tune.reviewing.sweeps import sweep_figure

__all__ = ["picture_of"]

Document = Mapping[str, Any]
ON_IMAGES = {"sinks": "sinks", "more_sinks": "sinks", "merged": "merged", "windows": "windows"}


def picture_of(
    item: Document, document: Document, asked: Asked, form: str, say: Callable[[str], None]
) -> bytes | None:
    """Draw a figure of the paper.

    Args:
        item: of the document of :func:`~dsm_tune.paper.redo.redo`.
        document: the whole.
        asked: what it was made for.
        form: ``png`` or ``svg``.
        say: is told what an image shows.

    Returns:
        The content of a file; ``None`` for a table, and where something is missing.
    """
    kind = item["picture"]
    if kind is None or item["needs"] is not None:
        return None
    if kind in ON_IMAGES:
        return _on_image(kind, document, asked, form, say)
    title = item["title"].partition(". ")[2]
    if kind == "together":
        figure = curves_together(item["curves"], title)
    elif kind == "apart":
        figure = curves_apart(item["curves"], title)
    else:
        figure = sweep_figure(item["sections"], kind, title)
    return encoded(figure, form)


def _on_image(
    kind: str, document: Document, asked: Asked, form: str, say: Callable[[str], None]
) -> bytes:
    """Draw the first model with weights on the first of its held-out images."""
    facts = next(one for one in document["models"] if one["weights"] == "given")
    given = next(one for one in asked.models if one.label == facts["model"])
    is_demo = given.name == DEMO_MODEL and asked.values.get("images") is None
    values = {**asked.values, "budget_gflops": "100%", "model": given.name}
    values["checkpoint"] = given.file
    if given.name == DEMO_MODEL:
        values["pretrained"] = False
    folder = values.get("images")
    wanted = drawing.Asked(
        ON_IMAGES[kind],
        form,
        image=None if is_demo else os.path.join(str(folder), facts["image"]),
        has_images=is_demo,
        blocks=_nine(facts["depth"]) if kind == "more_sinks" else (),
        settings=Settings(delay=facts["delay"]) if kind in ("merged", "windows") else Settings(),
    )
    return drawing.draw(TuneConfig(**values), wanted, say)


def _nine(depth: int) -> tuple[int, ...]:
    """Nine blocks over depth, which with the image fill two rows; a few of fewer."""
    return tuple(round(number * (depth - 1) / 8) for number in range(9)) if depth > 8 else ()
