"""Verbs of methods, side by side and on an image: bench, draw."""

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

__all__ = ["bench", "draw"]

FEWEST_RUNS, MOST_RUNS = 3, 1_000_000
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
@with_options(
    (
        option("--r", "rates", metavar="N,N,…", help="Tokens per block, ToMe's and DSM's. [one]"),
        option("--plan", "plans", metavar="FILE", multiple=True, help="A plan's JSON; repeatable."),
        option("--run", "trials", metavar="ID", multiple=True, help="MLflow run of a trial, too."),
        option(
            "--compare",
            "others",
            metavar="NAME[=FILE]",
            multiple=True,
            help="Another timm model, and its checkpoint; repeatable.",
        ),
        option("--batch-size", metavar="N,N,…", help="Images per timed forward. [32]"),
        option("--runs", type=Whole(), metavar="N", help="Timed forwards of each. [50]"),
        option("--csv", metavar="FILE", help="Write the table."),
        option("--plot", metavar="FILE", help="Draw it: .png or .svg."),
    ),
    SETTINGS,
    options.MODEL,
    options.IMAGES,
    options.DEVICE[1:],  # all but --batch-size, of which a bench takes several
    options.SEED,
    (options.STORAGE,),
    options.OUTPUT,
)
def bench(as_json: bool | None, csv: str | None, plot: str | None, **values: Any) -> int:
    """Compare dense, ToMe, DSM, plans and other models.

    All are timed in turn, so that a machine that slows down slows all of them. Efficiency is
    the speed-up over the ratio of GMACs. Without trained weights: speed and GMACs alone.
    """
    form = None if plot is None else picture_form(plot, "--plot")
    if csv is not None:
        check_writable(csv, "--csv")
    with listening(values) as terminal:
        from dsm_tune.bench import bench as measure
        from dsm_tune.reviewing.pictures import encoded
        from dsm_tune.reviewing.side_by_side import bench_csv, bench_figure

        config, asked = _asked(values)
        found = measure(config, asked, terminal.say)
        if csv is not None:
            write_whole(csv, bench_csv(found).encode())
        if plot is not None and form is not None:
            write_whole(plot, encoded(bench_figure(found), form))
    from dsm_tune.cli.tables import write_bench
    from dsm_tune.cli.terminal import emit, to_json

    emit(to_json(found)) if as_json else write_bench(found)
    return DONE


def _asked(values: dict[str, Any]) -> tuple[Any, Any]:
    """A configuration, and what is compared under it."""
    from dsm_tune.candidates import Asked
    from dsm_tune.methods import read_rates

    runs = values.pop("runs")
    if runs is not None and not FEWEST_RUNS <= runs <= MOST_RUNS:
        raise ConfigError(f"--runs must be from {FEWEST_RUNS} to {MOST_RUNS}, but got {runs}")
    rates, sizes = values.pop("rates"), values.pop("batch_size")
    asked = Asked(
        rates=() if rates is None else read_rates(rates, "--r"),
        settings=settings_of(values),
        plans=values.pop("plans"),
        trials=values.pop("trials"),
        others=values.pop("others"),
        batch_sizes=(32,) if sizes is None else read_rates(sizes, "--batch-size"),
        runs=50 if runs is None else runs,
        has_images=values["images"] is not None or values["model"] in (None, DEMO_MODEL),
    )
    if not asked.has_images:
        values["images"] = os.curdir  # a configuration has images; speed and GMACs need none
    return any_budget(values), asked


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
    merged   the tokens that a plan makes of the patches [what is meant if none]
    windows  the windows in which each block merges
    sinks    attention that tokens of the dense model receive, and their norms
    curve    the similarity curve and the delay D
    """
    form = picture_form(output, "--output")
    _check_effect(what, values)
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


def _check_effect(what: str, values: dict[str, Any]) -> None:
    """Refuse an option that what is drawn does not depend on."""
    of_dsm, of_tome = ("delay", "window", "local_blocks"), ("inflection",)
    methods = ("method", "rate", *of_dsm, *of_tome)
    method = values["method"] or "dsm"
    rules = [
        (what == "curve", "the similarity curve", ("blocks",)),
        (what in ("sinks", "curve"), "the dense model", ("plan", *methods)),
        (values["plan"] is not None, "a --plan, which says it all", methods),
        (method == "tome", "ToMe", of_dsm),
        (method == "dsm", "DSM", of_tome),
    ]
    for holds, where, names in rules:
        for name in names:
            if holds and values[name] is not None:
                shown = {"rate": "r"}.get(name, name).replace("_", "-")
                raise ConfigError(f"--{shown} must not be given: it changes nothing of {where}")


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
