"""Verbs of a model on a device: curve, profile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dsm_tune.cli import options
from dsm_tune.cli.exits import DONE
from dsm_tune.cli.group import verbs
from dsm_tune.cli.options import option, with_options
from dsm_tune.cli.outputs import any_budget, check_writable, listening, write_whole
from dsm_tune.errors import ConfigError

__all__ = ["curve", "profile"]


@verbs.command()
@with_options(
    options.MODEL,
    options.IMAGES,
    options.SEED,
    (option("--plot", metavar="FILE", help="Draw it: .png or .svg."),),
    options.OUTPUT,
)
def curve(plot: str | None, as_json: bool | None, **values: Any) -> int:
    """Show the similarity curve and the delay D.

    And how stable D is: how often each delay is found when the images are drawn again.
    """
    if plot is not None:
        if Path(plot).suffix.lower() not in (".png", ".svg"):
            raise ConfigError(f"--plot must end in .png or .svg, but got {plot!r:.80}")
        check_writable(plot, "--plot")
    with listening(values) as terminal:
        from dsm_tune.curve import draw, measure

        measured = measure(any_budget(values), terminal.say)
        if plot is not None:
            write_whole(plot, draw(measured, Path(plot).suffix.lower().removeprefix(".")))
    from dsm_tune.cli.terminal import emit, to_json, write_curve

    emit(to_json(measured)) if as_json else write_curve(measured)
    return DONE


@verbs.command()
@with_options(
    (option("-o", "--output", metavar="FILE", required=True, help="Where to write it."),),
    options.MODEL,
    options.DEVICE,
    options.LEVEL,
)
def profile(output: str, **values: Any) -> int:
    """Time the parts of a model on this device.

    The file is for --device-profile: a tune elsewhere can then predict this device.
    """
    check_writable(output, "--output")
    with listening(values) as terminal:
        from dsm_tune.target import measure_device

        # A profile depends on no image and no budget, but a configuration has both.
        measured = measure_device(any_budget({**values, "images": os.curdir}), terminal.say)
        write_whole(output, measured.to_json().encode())
    from dsm_tune.cli.terminal import emit

    emit(
        f"{output}: {measured.device['name']}, batch size {measured.batch_size}, "
        f"{measured.dtype}; predictions are off by {measured.error:.0%} at most"
    )
    return DONE
