"""Verbs of methods on images: draw."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from dsm_tune.cli import options
from dsm_tune.cli.exits import DONE
from dsm_tune.cli.group import verbs
from dsm_tune.cli.options import Number, Text, Whole, option, with_options
from dsm_tune.cli.outputs import any_budget, check_writable, listening, write_whole
from dsm_tune.config import DEMO_MODEL
from dsm_tune.errors import ConfigError

__all__ = ["draw"]

SETTINGS = (
    option("--delay", type=Whole(), metavar="D", help="Of DSM. [read from the images]"),
    option("--window", type=Whole(), metavar="W", help="Of DSM's first windows. [half the grid]"),
    option("--local-blocks", type=Whole(), metavar="T", help="Of DSM, with windows. [3]"),
    option("--inflection", type=Number(), metavar="-1…1", help="Of ToMe's r over depth. [0]"),
)


def picture_form(file: str, name: str) -> str:
    """The kind of picture that a file name asks for: ``png`` or ``svg``."""
    form = Path(file).suffix.lower().removeprefix(".")
    if form not in ("png", "svg"):
        raise ConfigError(f"{name} must end in .png or .svg, but got {file!r:.80}")
    check_writable(file, name)
    return form


@verbs.command()
@click.argument("what", required=False, type=Text(), default="merged")
@with_options(
    (
        option("-o", "--output", metavar="FILE", required=True, help="Picture: .png or .svg."),
        option("--image", metavar="FILE", help="The image. [one of --images]"),
        option("--index", type=Whole(), metavar="N", help="Which of --images, by name. [0]"),
        option("--blocks", metavar="N,N,…", help="That are shown. [a few, over depth]"),
        option("--plan", metavar="FILE", help="A plan's JSON. [--method]"),
        option("--method", metavar="dsm|tome", help="Without --plan. [dsm]"),
        option("--r", "rate", type=Whole(), metavar="N", help="Tokens per block. [patches/depth]"),
    ),
    SETTINGS,
    options.MODEL,
    options.IMAGES,
    options.SEED,
    options.LEVEL,
)
def draw(what: str, output: str, **values: Any) -> int:
    """Draw WHAT on an image: merged, windows, sinks or curve.

    \b
    merged   the tokens that a plan makes of the patches [what is meant without WHAT]
    windows  the windows in which each block merges
    sinks    attention that tokens of the dense model receive, and their norms
    curve    the similarity curve and the delay D
    """
    form = picture_form(output, "--output")
    with listening(values) as terminal:
        from dsm_tune.drawing import Asked
        from dsm_tune.drawing import draw as draw_one

        own = ("image", "index", "plan", "method")
        given = {name: values.pop(name) for name in own}
        index = given["index"]
        if index is not None and (index < 0 or given["image"] is not None):
            raise ConfigError(f"--index must be >= 0 and without --image, but got {index}")
        has_images = values["images"] is not None or values["model"] in (None, DEMO_MODEL)
        asked = Asked(
            what,
            form,
            blocks=_blocks(values.pop("blocks")),
            r=_rate(values.pop("rate")),
            settings=settings_of(values),
            has_images=has_images,
            **{name: value for name, value in given.items() if value is not None},
        )
        if not has_images and asked.image is not None:
            values["images"] = os.curdir  # a configuration has images; the picture needs none
        write_whole(output, draw_one(any_budget(values), asked, terminal.say))
    return DONE


def settings_of(values: dict[str, Any]) -> Any:
    """Take the settings of published plans out of the values of a command."""
    from dsm_tune.methods import Settings

    names = ("delay", "window", "local_blocks", "inflection")
    given = {name: values.pop(name) for name in names}
    return Settings(**{name: value for name, value in given.items() if value is not None})


def _blocks(text: str | None) -> tuple[int, ...]:
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 5 for word in words):
        raise ConfigError(f"--blocks must be integers >= 0 between commas, but got {text!r:.60}")
    return tuple(sorted({int(word) for word in words}))


def _rate(rate: int | None) -> int | None:
    if rate is not None and rate < 1:
        raise ConfigError(f"--r must be an integer >= 1, but got {rate}")
    return rate
