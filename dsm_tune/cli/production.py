"""Verbs of production: export, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsm_tune.cli import options
from dsm_tune.cli.exits import DONE, UNVERIFIED
from dsm_tune.cli.group import verbs
from dsm_tune.cli.options import option, with_options
from dsm_tune.cli.outputs import any_budget, listening
from dsm_tune.errors import ConfigError

__all__ = ["export", "verify"]

KINDS = ("bundle", "onnx", "pt2", "mlflow")
PLANNED = ("model", "model_kwargs", "img_size", "checkpoint", "pretrained", "dtype")


@verbs.command()
@click.argument("study_or_run", required=False, type=options.Text())
@with_options(
    (
        option("--to", "kind", metavar="|".join(KINDS), default="bundle", help="[bundle]"),
        option("-o", "--output", metavar="DIR", required=True, help="Folder to write."),
        option("--plan", metavar="FILE", help="A plan of your own, instead of a study's."),
        option("--probes", metavar="DIR", help="Store four of these images, not synthetic ones."),
        option("--register", metavar="NAME", help="Make it this MLflow model's champion."),
    ),
    options.MODEL,
    (options.DTYPE, *options.STORES),
    options.OUTPUT,
)
def export(study_or_run: str | None, kind: str, output: str, **values: Any) -> int:
    """Write a study's choice for production.

    The choice of a study, the plan of a run, or --plan with --model and --checkpoint. What is
    written is compared with the eager merged model before it takes its place.
    """
    if kind not in KINDS:
        raise ConfigError(f"--to must be one of {', '.join(KINDS)}, but got {kind!r:.40}")
    plan = values.pop("plan")
    if (study_or_run is None) == (plan is None):
        raise ConfigError("a study, a run or --plan must be given, and only one of them")
    given = [name for name in PLANNED if values[name] is not None]
    if plan is None and given:
        name = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{name} goes with --plan; a study knows its own")
    with listening(values) as terminal:
        from dsm_tune import production, sources

        if study_or_run is not None:
            source = sources.of_study(study_or_run, values["storage"])
        else:
            known = {name: values[name] for name in (*PLANNED, "quiet", "verbose")}
            images = {} if known["model"] is None else {"images": str(Path.cwd())}
            source = sources.of_plan(plan, any_budget({**known, **images}))
            if known["model"] and not known["checkpoint"] and not known["pretrained"]:
                terminal.say("warning: neither --checkpoint nor --pretrained: random weights")
        done = production.export(
            source,
            kind,
            output,
            probes=values["probes"],
            register=values["register"],
            tracking_uri=values["tracking_uri"],
            say=terminal.say,
        )
    from dsm_tune.cli.terminal import emit, to_json

    if values["as_json"]:
        emit(to_json(done.to_dict()))
        return DONE
    checked = [f"  {name}: {proof}" for name, proof in done.proofs.items()]
    lines = [f"{done.folder}: {done.gmacs:.3g} GMACs per image; as the eager model:", *checked]
    if done.registered is not None:
        lines.append(f"registered: models:/{done.registered}@champion, version {done.version}")
    if kind == "mlflow":
        lines.append(f"serve it: mlflow models serve --env-manager local -m {output}")
    else:
        lines.append(f"check it where it is served: dsm-tune verify {output}")
    emit("\n".join(lines))
    return DONE


@verbs.command()
@click.argument("folder", type=options.Text())
@with_options(
    options.IMAGES,
    (options.DEVICE_NAME, options.THREADS),
    options.OUTPUT,
)
def verify(folder: str, images: str | None, device: str | None, **values: Any) -> int:
    """Check an exported bundle on this machine.

    Every file, the stored outputs, latency and budget, and with --images the quality. The exit
    code is 4 if anything fails.
    """
    with listening(values) as terminal:
        from dsm_tune.verification import verify as check

        verdict = check(
            folder, images=images, device=device, threads=values["threads"], say=terminal.say
        )
    from dsm_tune.cli.terminal import emit, to_json

    if values["as_json"]:
        emit(to_json(verdict.to_dict()))
    else:
        lines = [f"{one.status:8} {one.name:13} {one.detail}" for one in verdict.findings]
        emit("\n".join([*lines, "it holds" if verdict.holds else "it does not hold"]))
    return DONE if verdict.holds else UNVERIFIED
