"""The command line: verbs, exit codes, and errors of one line.

Commands import what they need when they are called, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dsm_tune import options
from dsm_tune.errors import ConfigError, DsmTuneError, nearest
from dsm_tune.options import gather, option, with_options

if TYPE_CHECKING:
    from dsm_tune.config import TuneConfig
    from dsm_tune.results import TuneResult
    from dsm_tune.terminal import Terminal

__all__ = ["main"]

DONE, DEFECT, BAD_INPUT, INFEASIBLE, INTERRUPTED = 0, 1, 2, 3, 130
EXAMPLES = """\b
The first verb is meant where none is given:
  dsm-tune --budget-ms 5              the embedded demo model and its images
  dsm-tune --budget-gflops 60%        60 % of the dense model's multiply-adds
  dsm-tune --model deit_small_patch16_224 --checkpoint deit.safetensors \\
           --images photos --budget-gflops 2.7
`dsm-tune tune --help` lists the options. Exit codes: 0 done, 1 a defect,
2 bad input, 3 nothing meets the budget, 130 interrupted and saved."""


class Verbs(click.Group):
    """Takes the first verb, tune, where the first word is none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``tune`` in front of options."""
        first = args[0] if args else ""
        if first and not first.startswith("-") and first not in self.commands:
            raise ConfigError(
                f"{first[:60]!r} is no verb{nearest(first, self.commands)}; "
                f"accepted are {', '.join(self.commands)} and the options of tune"
            )
        if first not in self.commands and first not in ("--help", "-h", "--version"):
            args = ["tune", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used."""
        return list(self.commands)


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from dsm_tune.diagnosis import version

        click.echo(f"dsm-tune {version()}")
        ctx.exit()


@click.group(cls=Verbs, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def verbs() -> None:
    """Tunes training-free token merging of Vision Transformers to a budget."""


# -- verbs ----------------------------------------------------------------------------------------


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
    _write(result, values, storage, front=True)
    decided = result.status in ("done", "infeasible") or not result.budget.satisfiable
    return INFEASIBLE if result.chosen is None and decided else DONE


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
        _check_writable(plot, "--plot")
    with _terminal(values) as terminal:
        from dsm_tune.curve import draw, measure

        measured = measure(_any_budget(values), terminal.say)
        if plot is not None:
            _write_whole(plot, draw(measured, Path(plot).suffix.lower().removeprefix(".")))
    from dsm_tune.terminal import emit, to_json, write_curve

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
    _check_writable(output, "--output")
    with _terminal(values) as terminal:
        from dsm_tune.target import measure_device

        # A profile depends on no image and no budget, but a configuration has both.
        measured = measure_device(_any_budget({**values, "images": os.curdir}), terminal.say)
        _write_whole(output, measured.to_json().encode())
    from dsm_tune.terminal import emit

    emit(
        f"{output}: {measured.device['name']}, batch size {measured.batch_size}, "
        f"{measured.dtype}; predictions are off by {measured.error:.0%} at most"
    )
    return DONE


@verbs.command()
@with_options(options.STORES, (options.RAY,), (options.OUTPUT[0],))
def doctor(as_json: bool | None, **where: str | None) -> int:
    """Check versions, devices, stores and cluster."""
    import dataclasses

    from dsm_tune.diagnosis import diagnose
    from dsm_tune.terminal import emit, to_json

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

    if study is not None:
        from dsm_tune.answer import load_study

        found = load_study(absolute_storage(storage, Path.cwd()), study).facts
        tracking_uri = tracking_uri or found.get("tracking_uri")
    uri = resolve_tracking_uri(tracking_uri, Path.cwd())
    is_verbose = bool(values["verbose"])
    serve(uri, values["host"], values["port"], verbose=is_verbose, say=click.echo)
    return DONE


# -- what verbs share -----------------------------------------------------------------------------


def _search(
    work: Callable[[Terminal], TuneResult], values: Any, study: str, storage: str | None
) -> int:
    """Run or continue a study, print its answer, return the exit code."""
    try:
        with _terminal(values) as terminal:
            result = work(terminal)
    except KeyboardInterrupt:
        return _interrupted(study, storage)
    _write(result, values, storage, front=False)
    if result.status == "interrupted":
        return _interrupted(study, storage)
    return DONE if result.chosen is not None else INFEASIBLE


def _look(config: TuneConfig, values: Any) -> int:
    """Say what a study would find before its search, return the exit code."""
    from dsm_tune import tuning
    from dsm_tune.terminal import emit, to_json, write_survey

    with _terminal(values) as terminal:
        found = tuning.dry_run(config, listener=terminal)
    document = found.to_dict(config)
    if values.get("as_json"):
        emit(to_json(document))
    else:
        write_survey(document)
    return DONE if found.is_satisfiable else INFEASIBLE


def _interrupted(study: str, storage: str | None) -> int:
    from dsm_tune.searching.study import study_names

    if storage is not None and study not in study_names(storage):
        return _end("interrupted before anything was stored", INTERRUPTED)
    return _end(
        f"interrupted, saved; go on with: {_command('resume', study, storage)}", INTERRUPTED
    )


def _command(verb: str, study: str, storage: str | None) -> str:
    """What to type in this folder, without a store that is found by itself."""
    from dsm_tune.config import absolute_storage
    from dsm_tune.reviewing.stores import redact

    words = ["dsm-tune", verb, shlex.quote(study)]
    url = absolute_storage(storage, Path.cwd())
    if url != absolute_storage(None, Path.cwd()):
        words.append(f"--storage {shlex.quote(redact(url))}")
    return " ".join(words)


def _write(result: TuneResult, values: Any, storage: str | None, *, front: bool) -> None:
    from dsm_tune.terminal import emit, to_json, write_result

    if values.get("as_json"):
        emit(to_json(result.to_dict()))
        return
    show, resumed = (_command(verb, result.study, storage) for verb in ("show", "resume"))
    trials = sum(result.trials[state] for state in ("complete", "pruned", "failed"))
    commands = [] if front else [f"{show}    # the whole front"]
    if result.status == "done":
        commands.append(f"{resumed} --trials {2 * trials}    # search on")
    page = _command("ui", result.study, storage)
    write_result(result, [*commands, f"{page}    # figures, report, every trial"], front=front)


@contextlib.contextmanager
def _terminal(values: Any) -> Iterator[Terminal]:
    """What is told goes to stderr; nothing but the result reaches stdout."""
    from dsm_tune.terminal import Terminal

    quiet, verbose = bool(values.get("quiet")), bool(values.get("verbose"))
    terminal = Terminal(sys.stderr, quiet=quiet, verbose=verbose)
    with terminal, contextlib.redirect_stdout(sys.stderr):
        yield terminal


def _any_budget(values: Any) -> TuneConfig:
    """A configuration for what needs no budget."""
    known = {k: v for k, v in values.items() if v is not None and k not in ("quiet", "verbose")}
    return options.Given({**known, "budget_gflops": "100%"}).config().absolute(Path.cwd())


def _check_writable(file: str, name: str) -> None:
    """Refuse now what could not be written in the end."""
    try:
        if Path(file).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=Path(file).parent):  # nameless where the system can
            pass
    except OSError as error:
        raise ConfigError(
            f"{name} must be a file that can be written, but {file}: {error.strerror}"
        ) from None


def _write_whole(file: str, content: bytes) -> None:
    """Write a file whole or not at all."""
    path = Path(file)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


# -- the rim --------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal knows every sign
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # of libraries, about themselves
            with verbs.make_context("dsm-tune", arguments) as ctx:
                return int(verbs.invoke(ctx) or DONE)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        return _fail(_usage_words(error), BAD_INPUT)
    except DsmTuneError as error:
        return _fail(str(error), BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        return _end("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:  # ours, or of a library that we did not expect
        is_verbose = any(re.fullmatch(r"--verbose|-[qv]*v[qv]*", word) for word in arguments)
        if is_verbose:
            traceback.print_exc()
        hint = "" if is_verbose else "; run again with -v for the traceback"
        return _fail(f"a defect: {type(error).__name__}: {str(error)[:300]}{hint}", DEFECT)


def _usage_words(error: click.ClickException) -> str:
    """Click's message as one of ours: the option, what is wrong, what is accepted."""
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        known = [name for param in error.ctx.command.params for name in param.opts]
        verb = error.ctx.command_path
        return (
            f"there is no option {error.option_name}{nearest(error.option_name, known)}; "
            f"`{verb} --help` lists them"
        )
    if isinstance(error, click.MissingParameter) and error.param is not None:
        name = error.param.opts[-1] if isinstance(error.param, click.Option) else error.param.name
        return f"{name if str(name).startswith('-') else str(name).upper()} must be given"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"{error.param.opts[0]} {error.message}"
    text = re.sub(r"^Option '(-[\w-]+)'", r"\1", error.format_message()).rstrip(".")
    if text.startswith("Got unexpected extra argument"):
        return f"{text[0].lower()}{text[1:]}; a verb stands first, values follow their options"
    return text


def _fail(text: str, code: int) -> int:
    return _end(f"error: {text}", code)


def _end(text: str, code: int) -> int:
    from dsm_tune.terminal import printable

    with contextlib.suppress(OSError):
        print(f"dsm-tune: {printable(text)}", file=sys.stderr, flush=True)
    return code
