"""Verbs of a study: tune, resume, show."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsm_tune.cli import options
from dsm_tune.cli.exits import DONE, INFEASIBLE, INTERRUPTED, end
from dsm_tune.cli.group import verbs
from dsm_tune.cli.options import gather, with_options
from dsm_tune.cli.outputs import listening

if TYPE_CHECKING:
    from dsm_tune.cli.terminal import Terminal
    from dsm_tune.config import TuneConfig
    from dsm_tune.results import TuneResult

__all__ = ["resume", "show", "tune", "write"]


@verbs.command()
@with_options(options.TUNE)
@click.pass_context
def tune(ctx: click.Context, /, **values: Any) -> int:
    """Find the plans that meet a budget, closest to dense (the default)."""
    given = gather(ctx.command, values)
    config = given.config().absolute(Path.cwd())
    if given.values.get("dry_run"):
        return _look(config, given.values)

    def work(terminal: Terminal) -> TuneResult:
        from dsm_tune import tuning

        return tuning.tune(config, listener=terminal)

    return _search(work, given.values, config.study_name, config.storage)


@verbs.command()
@click.argument("study", type=options.Text())
@with_options(options.BUDGETS, options.RESUMED, options.OUTPUT)
def resume(study: str, **values: Any) -> int:
    """Go on after a crash or Ctrl-C, with more --trials, or with another budget.

    Nothing that has finished is done again.
    """
    from dsm_tune.config import absolute_storage

    changes = {k: v for k, v in values.items() if k not in ("as_json", "verbose", "quiet")}
    storage = absolute_storage(changes.pop("storage"), Path.cwd())

    def work(terminal: Terminal) -> TuneResult:
        from dsm_tune import tuning

        return tuning.resume(study, storage=storage, listener=terminal, **changes)

    return _search(work, values, study, storage)


@verbs.command()
@click.argument("study", type=options.Text())
@with_options(options.BUDGETS, (options.STORAGE,), options.OUTPUT)
def show(study: str, storage: str | None, **values: Any) -> int:
    """Show a study's answer, also while it runs.

    With a budget, picks anew from what was found, without a new search. Writes nothing.
    """
    from dsm_tune.answer import show as show_study

    budgets = {name: values[name] for name in ("budget_ms", "budget_gflops")}
    result = show_study(study, storage=storage, **budgets)
    write(result, values, storage, front=True)
    decided = result.status in ("done", "infeasible") or not result.budget.satisfiable
    return INFEASIBLE if result.chosen is None and decided else DONE


def _search(
    work: Callable[[Terminal], TuneResult], values: Any, study: str, storage: str | None
) -> int:
    """Run or continue a study, print its answer, return the exit code."""
    try:
        with listening(values) as terminal:
            result = work(terminal)
    except KeyboardInterrupt:
        return _interrupted(study, storage)
    write(result, values, storage, front=False)
    if result.status == "interrupted":
        return _interrupted(study, storage)
    return DONE if result.chosen is not None else INFEASIBLE


def _look(config: TuneConfig, values: Any) -> int:
    """Say what a study would find before its search, return the exit code."""
    from dsm_tune import tuning
    from dsm_tune.cli.terminal import emit, to_json, write_survey

    with listening(values) as terminal:
        found = tuning.dry_run(config, listener=terminal)
    document = found.to_dict(config)
    if values.get("as_json"):
        emit(to_json(document))
    else:
        write_survey(document)
    return DONE if found.is_satisfiable else INFEASIBLE


def _interrupted(study: str, storage: str | None) -> int:
    from dsm_tune.searching.store import study_names

    if storage is not None and study not in study_names(storage):
        return end("interrupted before anything was stored", INTERRUPTED)
    return end(f"interrupted, saved; go on with: {_command('resume', study, storage)}", INTERRUPTED)


def _command(verb: str, study: str, storage: str | None) -> str:
    """What to type in this folder, without a store that is found by itself."""
    from dsm_tune.config import absolute_storage
    from dsm_tune.reviewing.stores import redact

    words = ["dsm-tune", verb, shlex.quote(study)]
    url = absolute_storage(storage, Path.cwd())
    if url != absolute_storage(None, Path.cwd()):
        words.append(f"--storage {shlex.quote(redact(url))}")
    return " ".join(words)


def write(result: TuneResult, values: Any, storage: str | None, *, front: bool) -> None:
    """Print a study's answer: the one JSON document, or words, a table and what to type next."""
    from dsm_tune.cli.terminal import emit, to_json, write_result
    from dsm_tune.reviewing.stores import redact

    if values.get("as_json"):
        emit(to_json({**result.to_dict(), "tracking_uri": redact(result.tracking_uri)}))
        return
    show, resumed = (_command(verb, result.study, storage) for verb in ("show", "resume"))
    trials = sum(result.trials[state] for state in ("complete", "pruned", "failed"))
    commands = [] if front else [f"{show}    # the whole front"]
    if result.status == "done":
        commands.append(f"{resumed} --trials {2 * trials}    # search on")
    page = _command("ui", result.study, storage)
    commands.append(f"{page}    # figures, report, every trial")
    if result.chosen is not None and not front:  # `show` may have picked by another budget
        commands.append(f"{_command('export', result.study, storage)} -o out/    # for production")
    write_result(result, commands, front=front)
