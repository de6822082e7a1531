"""What the verb draw does: pictures of a plan and of a model's attention on one image."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dsm_tune import methods, schedules
from dsm_tune.config import TuneConfig
from dsm_tune.errors import ConfigError
from dsm_tune.inputs import CURVE_IMAGES, load_inputs, load_model
from dsm_tune.measuring.images import load_image, photograph
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.published import model_name
from dsm_tune.merging.similarity import detect_delay, similarity_curve
from dsm_tune.merging.sinks import attention_sinks
from dsm_tune.methods import Settings
from dsm_tune.plan import MergePlan
from dsm_tune.reviewing import figures
from dsm_tune.reviewing.heatmaps import sinks_on_image
from dsm_tune.reviewing.merged_tokens import legend_words, panels_after, tokens_left
from dsm_tune.reviewing.pictures import Array, Panel, encoded, tokens_on_image
from dsm_tune.reviewing.summary import plan_words
from dsm_tune.token_samples import patch_groups, spread

__all__ = ["WHATS", "Asked", "draw"]

WHATS = ("merged", "windows", "sinks", "curve")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be drawn.

    Attributes:
        what: one of ``WHATS``.
        form: ``png`` or ``svg``.
        image: file of the image; ``None`` for one of the configuration's images.
        has_images: whether the configuration has images, which D is read from.
        index: which of them, in the order of their names.
        blocks: that are shown; empty for a few.
        plan: file of a plan; ``None`` for a published one.
        method: ``tome`` or ``dsm``.
        r: tokens per block; ``None`` for patches / depth.
        settings: of the published plan.
    """

    what: str = "merged"
    form: str = "png"
    image: str | None = None
    has_images: bool = True
    index: int = 0
    blocks: tuple[int, ...] = ()
    plan: str | None = None
    method: str = "dsm"
    r: int | None = None
    settings: Settings = dataclasses.field(default_factory=Settings)


@dataclasses.dataclass(frozen=True)
class _Subject:
    """Model, image, and the images that D is read from (none for a single file)."""

    model: nn.Module
    pixels: Tensor
    name: str
    calibration: Tensor | None


def draw(config: TuneConfig, asked: Asked, say: Callable[[str], None]) -> bytes:
    """Draw one figure.

    Args:
        config: names model and images.
        asked: what is to be drawn, and under which plan.
        say: is told what it shows.

    Returns:
        The content of a file.

    Raises:
        DsmTuneError: if model, image, plan or a block cannot be used.
    """
    if asked.what not in WHATS:
        raise ConfigError(f"WHAT must be one of {', '.join(WHATS)}, but got {asked.what!r:.60}")
    subject = _load(config, asked, say)
    depth = read_geometry(subject.model).depth
    for block in asked.blocks:
        if block >= depth:
            raise ConfigError(f"--blocks must be from 0 to {depth - 1}, but got {block}")
    if asked.what == "curve":
        return _curve(subject, asked.form)
    if asked.what == "sinks":
        return _sinks(subject, asked)
    plan = _plan(subject, asked, say)
    say(f"{subject.name} under {plan_words(plan)}: {tokens_left(plan)} of {plan.tokens[0]} tokens")
    return (_merged if asked.what == "merged" else _windows)(subject, plan, asked)


def _load(config: TuneConfig, asked: Asked, say: Callable[[str], None]) -> _Subject:
    """Load the model and the image; the others too where D is read from them."""
    if asked.image is not None and not asked.has_images:
        model = load_model(config)
        pixels = load_image(asked.image, model)
        return _Subject(model, pixels, os.path.basename(asked.image), None)
    inputs = load_inputs(config)
    for line in inputs.skipped:
        say(f"skipped {line}")
    calibration = inputs.search.pixels[:CURVE_IMAGES]
    if asked.image is not None:
        pixels = load_image(asked.image, inputs.model)
        return _Subject(inputs.model, pixels, os.path.basename(asked.image), calibration)
    parts = inputs.search, inputs.holdout
    named = sorted(
        ((name, part, row) for part in parts for row, name in enumerate(part.names)),
        key=lambda item: item[0],
    )
    if asked.index >= len(named):
        raise ConfigError(f"--index must be from 0 to {len(named) - 1}, but got {asked.index}")
    name, part, row = named[asked.index]
    return _Subject(inputs.model, part.pixels[row : row + 1], name, calibration)


def _plan(subject: _Subject, asked: Asked, say: Callable[[str], None]) -> MergePlan:
    geometry = read_geometry(subject.model)
    if asked.plan is not None:
        return methods.read_plan(asked.plan, geometry)
    delay = schedules.default_delay(geometry)
    if asked.method == "dsm" and asked.settings.delay is None:
        if subject.calibration is None:
            say(f"D = {delay}, depth / 6; --images has a folder to read D from")
        else:
            delay = detect_delay(similarity_curve(subject.model, subject.calibration))
    r = methods.default_r(geometry) if asked.r is None else asked.r
    return methods.published(asked.method, geometry, r, asked.settings, delay)


def _merged(subject: _Subject, plan: MergePlan, asked: Asked) -> bytes:
    """The tokens after some blocks: after those asked for, or after steps spread over depth."""
    groups = _groups(subject, plan)
    acting = [step.block for step in plan.active_steps]
    blocks = asked.blocks or spread(acting)
    panels = [Panel("image"), *panels_after(plan, {block: groups[block] for block in blocks})]
    title = f"{plan.tokens[0]} tokens become {tokens_left(plan)}" if acting else "No token leaves"
    return _tokens(subject, plan, asked, panels, title)


def _windows(subject: _Subject, plan: MergePlan, asked: Asked) -> bytes:
    """What each local block merged, with its windows; then what all blocks did."""
    groups, steps = _groups(subject, plan), plan.active_steps
    local = [step for step in steps if step.window is not None]
    first = steps[0].block if steps else plan.geometry.depth
    panels = [Panel("image" if not first else f"before block {first}: dense")]
    for step in local:
        if not asked.blocks or step.block in asked.blocks:
            side = f"{step.window}×{step.window} windows"
            panels.append(Panel(f"block {step.block}: {side}", groups[step.block], step.window))
    rest = [step.block for step in steps if step.window is None]
    if rest and (not asked.blocks or set(rest) & set(asked.blocks)):
        panels.append(Panel(f"blocks {rest[0]} to {rest[-1]}: global", groups[rest[-1]]))
    title = f"Merging inside windows in {len(local)} blocks, then anywhere"
    return _tokens(subject, plan, asked, panels, title if local else "No block has windows")


def _tokens(
    subject: _Subject, plan: MergePlan, asked: Asked, panels: Sequence[Panel], title: str
) -> bytes:
    gmacs = f"{plan.gmacs:.3g} of {plan.dense().gmacs:.3g} GMACs"
    words = [subject.name, model_name(subject.model), plan_words(plan), gmacs, legend_words(plan)]
    subtitle = " · ".join(words)
    image = photograph(subject.pixels[0], subject.model).numpy()
    return encoded(tokens_on_image(image, panels, title, subtitle), asked.form)


def _groups(subject: _Subject, plan: MergePlan) -> list[Array]:
    """The token of each patch after each block: [rows, columns] each, -1 where pruned."""
    return [one[0] for one in patch_groups(subject.model, plan, subject.pixels)]


def _sinks(subject: _Subject, asked: Asked) -> bytes:
    found = attention_sinks(subject.model, subject.pixels)
    geometry = read_geometry(subject.model)
    figure = sinks_on_image(
        photograph(subject.pixels[0], subject.model).numpy(),
        found.received[0].numpy(),
        found.norms[0].numpy(),
        geometry.grid,
        asked.blocks or spread(range(geometry.depth)),
    )
    return encoded(figure, asked.form)


def _curve(subject: _Subject, form: str) -> bytes:
    images = subject.pixels if subject.calibration is None else subject.calibration
    curve = similarity_curve(subject.model, images)
    how = figures.similarity_curve_png if form == "png" else figures.similarity_curve_svg
    return how(curve, detect_delay(curve))
