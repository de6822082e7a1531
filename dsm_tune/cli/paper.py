"""The verb paper: the DSM paper's tables and figures, print beside what is measured here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from dsm_tune.cli import options
from dsm_tune.cli.exits import DONE
from dsm_tune.cli.group import verbs
from dsm_tune.cli.options import Text, Whole, option, with_options
from dsm_tune.cli.outputs import any_budget, check_writable, listening, write_whole
from dsm_tune.errors import ConfigError, nearest
from dsm_tune.paper.printed import NAMES

__all__ = ["paper"]

FEWEST_RUNS, MOST_RUNS = 3, 1_000_000
FORMS = ("png", "svg")


@verbs.command()
@click.argument("items", nargs=-1, type=Text(), metavar="[ITEM]…")
@with_options(
    (
        option(
            "--model",
            "models",
            metavar="NAME[=FILE]",
            multiple=True,
            help="A timm model, and its weights; repeatable. [none: GMACs beside print]",
        ),
        option("--checkpoint", metavar="FILE", help="Weights of the only --model."),
        option("--pretrained/--no-pretrained", is_flag=True, help="Download timm's own weights."),
        option("--images", metavar="DIR", help="Images to judge on, searched recursively."),
        option("--count", type=Whole(), metavar="N", help="Of held-out images judged. [256]"),
        option("--r", "rates", metavar="N,N,…", help="Tokens per block, of sweeps. [4,8,12,16]"),
        option("--speed", "has_speed", is_flag=True, help="Time tables 2 and 6 and figure 4, too."),
        option("--batch-size", type=Whole(), metavar="N", help="Images per timed forward. [32]"),
        option("--runs", type=Whole(), metavar="N", help="Timed forwards of each. [50]"),
        option("-o", "--output", metavar="DIR", help="Where figures are written."),
        option("--format", "form", metavar="png|svg", help="Of figures. [png]"),
    ),
    options.DEVICE[1:],  # all but --batch-size, whose default is another here
    options.SEED,
    options.OUTPUT,
)
def paper(items: tuple[str, ...], as_json: bool | None, **values: Any) -> int:
    """Redo tables and figures of the DSM paper, beside what it prints.

    \b
    table1   delay, windows and both      figure1   attention sinks
    table2   DSM over r                   figure2   similarity curves, in one
    table4   pruning by five features     figure4   ToMe and DSM over r
    table5   merging by five features     figure5   two trainings of one model
    table6   convolutional models         figure6   DSM over T
    table7   Tiny to Huge                 figure7   merged tokens on an image
    figure8  similarity curves, each      figure9   sinks, more blocks
    figure10 windows on an image

    All if none is named. GMACs need no weights. With weights and images, every table is
    judged on your model too; what is missing is said where it is missing.
    """
    output, form = values.pop("output"), values.pop("form")
    _check_output(output, form)
    with listening(values) as terminal:
        from dsm_tune.paper.pictures import picture_of
        from dsm_tune.paper.redo import redo

        asked = _asked(items or NAMES, values)
        document = redo(asked, terminal.say)
        written: dict[str, bytes] = {}
        for item in document["items"] if output is not None else ():
            content = picture_of(item, document, asked, form or "png", terminal.say)
            if content is not None:
                item["file"] = os.path.join(output, f"{item['name']}.{form or 'png'}")
                written[item["file"]] = content
        for file, content in written.items():
            Path(output).mkdir(parents=True, exist_ok=True)
            write_whole(file, content)
    from dsm_tune.cli.paper_tables import write_paper
    from dsm_tune.cli.terminal import emit, to_json

    emit(to_json(document)) if as_json else write_paper(document)
    return DONE


def _check_output(output: str | None, form: str | None) -> None:
    """Refuse now where figures could not be written in the end."""
    if form is not None and (form not in FORMS or output is None):
        raise ConfigError(f"--format must be one of {', '.join(FORMS)}, with -o, but got {form!r}")
    if output is None:
        return
    place = Path(output)
    while not place.exists() and place != place.parent:
        place = place.parent
    check_writable(os.path.join(place, ".dsm_tune"), "--output")


def _asked(items: tuple[str, ...], values: dict[str, Any]) -> Any:
    """What the options ask for, checked."""
    from dsm_tune.methods import read_rates
    from dsm_tune.paper.subjects import Asked, read_given

    for name in items:
        if name not in NAMES:
            raise ConfigError(
                f"ITEM must be one of {', '.join(NAMES)}, but got {name!r:.60}"
                f"{nearest(name[:60], NAMES)}"
            )
    numbers = {name: values.pop(name) for name in ("count", "batch_size", "runs")}
    for name, low in (("count", 1), ("batch_size", 1), ("runs", FEWEST_RUNS)):
        number = numbers[name]
        if number is not None and not low <= number <= MOST_RUNS:
            option_name = name.replace("_", "-")
            raise ConfigError(
                f"--{option_name} must be from {low} to {MOST_RUNS}, but got {number}"
            )
    has_speed = bool(values.pop("has_speed"))
    for name, value in (*numbers.items(), ("runtime", values["runtime"])):
        if value is not None and name != "count" and not has_speed:
            raise ConfigError(f"--{name.replace('_', '-')} must be given with --speed alone")
    models = values.pop("models")
    given = {"images": values["images"], "count": numbers["count"]}
    given["pretrained"] = values["pretrained"] or None
    for name, value in given.items() if not models else ():
        if value is not None:
            raise ConfigError(f"--{name} must be given with a --model: it changes nothing else")
    checkpoint, pretrained = values.pop("checkpoint"), bool(values["pretrained"])
    rates = values.pop("rates")
    shared = any_budget({"images": os.curdir, **_told(values)})  # checked, paths made absolute
    kept = {name: getattr(shared, name) for name in _told(values)}
    changed: dict[str, Any] = {} if rates is None else {"rates": read_rates(rates, "--r")}
    changed |= {name: number for name, number in numbers.items() if number is not None}
    named = tuple(read_given(models, checkpoint, pretrained))
    return Asked(items, named, kept, has_speed=has_speed, **changed)


def _told(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None and k not in ("quiet", "verbose")}
