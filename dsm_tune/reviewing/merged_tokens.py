"""The tokens that a plan makes of some images: small enough to be kept in the study, and drawn."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dsm_tune.plan import MergePlan
from dsm_tune.reviewing.pictures import Array, Panel, encoded, tokens_on_images
from dsm_tune.reviewing.summary import plan_words

__all__ = ["Sample", "legend_words", "merged_tokens_png", "panels_after", "tokens_left"]

LONGEST_SIDE = 224  # pixels of an image that is kept
NAME = 28  # letters of an image's name, its last ones
JPEG = {"quality": 88, "subsampling": 0}


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image and what its patches have become.

    Attributes:
        name: of the image.
        image: [H, W, 3] float, 0 to 1.
        groups: by block, [rows, columns] integers, equal for patches that are one token after the
            block, -1 where a patch was pruned.
    """

    name: str
    image: Array
    groups: Mapping[int, Array]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can say it, the image as a small JPEG of whole pixels per patch."""
        rows, columns = next(iter(self.groups.values())).shape
        side = max(1, min(self.image.shape[0] // rows, LONGEST_SIDE // max(rows, columns)))
        picture = Image.fromarray((255 * self.image).round().astype(np.uint8))
        stream = io.BytesIO()
        picture.resize((columns * side, rows * side)).save(stream, "jpeg", **JPEG)
        groups = {str(block): of_block.tolist() for block, of_block in self.groups.items()}
        image = base64.b64encode(stream.getvalue()).decode()
        return {"name": self.name, "image": image, "groups": groups}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Sample:
        """Read what :meth:`to_dict` wrote."""
        stream = io.BytesIO(base64.b64decode(body["image"]))
        groups = {int(block): np.array(of_block) for block, of_block in body["groups"].items()}
        return cls(body["name"], np.asarray(Image.open(stream), dtype=float) / 255, groups)


def merged_tokens_png(plan: MergePlan, samples: Sequence[Sample], model: str) -> bytes:
    """Return the images and, beside each, the tokens after some blocks.

    Args:
        plan: that made the tokens.
        samples: of one grid, after the same blocks.
        model: its name.
    """
    rows = []
    for sample in samples:
        panels = [Panel(_short(sample.name)), *panels_after(plan, sample.groups)]
        rows.append((sample.image, panels))
    title = f"{plan.tokens[0]} tokens become {tokens_left(plan)}: the chosen plan on "
    title += f"{len(samples)} held-out images"
    subtitle = f"{model} · {plan_words(plan)} · {legend_words(plan)}"
    return encoded(tokens_on_images(rows, title, subtitle), "png")


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"…{name[1 - NAME :]}"


def panels_after(plan: MergePlan, groups: Mapping[int, Array]) -> list[Panel]:
    """Return a picture of the tokens after each of some blocks."""
    panels = []
    for block, of_block in groups.items():
        left = plan.geometry.prefix + len(np.unique(of_block[of_block >= 0]))
        panels.append(Panel(f"after block {block}: {left} tokens", of_block))
    return panels


def tokens_left(plan: MergePlan) -> int:
    """Tokens after all steps; a last block for prefix tokens alone lets the others be, unread."""
    return plan.tokens[0] - sum(plan.removed)


def legend_words(plan: MergePlan) -> str:
    """Return how the pictures of a plan are read."""
    how = "patches inside a border are one token, in their mean colour"
    if any(step.kind == "prune" for step in plan.active_steps):
        how += "; dark ones were pruned"
    return how
