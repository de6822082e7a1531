"""Verbs of stores and of this installation: sync, doctor, ui."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsm_tune.cli import options
from dsm_tune.cli.exits import BAD_INPUT, DONE
from dsm_tune.cli.group import verbs
from dsm_tune.cli.options import option, with_options

__all__ = ["doctor", "sync", "ui"]


@verbs.command()
@click.argument("study", type=options.Text())
@with_options(options.STORES, (options.OUTPUT[0],))
def sync(study: str, as_json: bool | None, **where: str | None) -> int:
    """Write to MLflow what it lacks of a study.

    Runs, metrics, tags, figures and report, from the study's storage alone: after a tracking server
    was down, or for another one. Twice is the same as once.
    """
    import dataclasses

    from dsm_tune.cli.terminal import emit, to_json
    from dsm_tune.sync import sync as sync_study

    done = sync_study(study, **where)
    if as_json:
        emit(to_json(dataclasses.asdict(done)))
    else:
        runs = f"{done.trials} trials have their runs in {done.tracking_uri}"
        emit(f"{runs}; {done.written} runs lacked something, files: {', '.join(done.files)}")
    return DONE


@verbs.command()
@with_options(options.STORES, (options.RAY,), (options.OUTPUT[0],))
def doctor(as_json: bool | None, **where: str | None) -> int:
    """Check versions, devices, stores and cluster."""
    import dataclasses

    from dsm_tune.cli.terminal import emit, to_json
    from dsm_tune.diagnosis import diagnose

    checks = list(diagnose(where["storage"], where["tracking_uri"], where["ray_address"]))
    failed = [check.name for check in checks if check.status == "failed"]
    if as_json:
        emit(to_json({"ok": not failed, "checks": [dataclasses.asdict(c) for c in checks]}))
    else:
        lines = [f"{check.status:8} {check.name:15} {check.detail}" for check in checks]
        emit("\n".join([*lines, f"failed: {', '.join(failed)}" if failed else "all is well"]))
    return BAD_INPUT if failed else DONE


@verbs.command()
@click.argument("study", required=False, type=options.Text())
@with_options(
    options.STORES,
    (
        option("--host", default="127.0.0.1", help="To listen on. [127.0.0.1: this machine only]"),
        option("--port", type=options.Whole(), metavar="N", default=5000, help="[5000]"),
    ),
    (options.LEVEL[0],),
)
def ui(study: str | None, storage: str | None, tracking_uri: str | None, **values: Any) -> int:
    """Serve the MLflow UI on a study's store.

    On the store of STUDY, or on --tracking-uri; for this machine only, unless --host says more.
    """
    from dsm_tune.config import absolute_storage
    from dsm_tune.mlflow_ui import serve
    from dsm_tune.reviewing.stores import resolve_tracking_uri

    run_id = ""
    if study is not None:
        from dsm_tune.answer import load_study

        found = load_study(absolute_storage(storage, Path.cwd()), study).facts
        if tracking_uri in (None, found.get("tracking_uri")):
            tracking_uri, run_id = found.get("tracking_uri"), found.get("parent_run_id", "")
    uri = resolve_tracking_uri(tracking_uri, Path.cwd())
    is_verbose = bool(values["verbose"])
    serve(uri, values["host"], values["port"], verbose=is_verbose, say=click.echo, run_id=run_id)
    return DONE
