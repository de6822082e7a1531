"""The rim of the command line: every way in which a call can end, as an exit code."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

import click

from dsm_tune.cli import cluster, methods, models, paper, production, stores, studies
from dsm_tune.cli.exits import BAD_INPUT, DEFECT, DONE, INTERRUPTED, end, fail
from dsm_tune.cli.group import verbs
from dsm_tune.errors import DsmTuneError, nearest, shown

__all__ = ["main"]

# in the order in which they are used
ROOMS = studies, cluster, models, methods, paper, production, stores


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
    except click.exceptions.Exit as asked:
        return asked.exit_code
    except click.ClickException as error:
        return fail(_usage_words(error), BAD_INPUT)
    except DsmTuneError as error:
        return fail(str(error), BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        return end("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:  # ours, or of a library that we did not expect
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return fail(
                f"a path must have shorter names, but got {shown(error.filename)}", BAD_INPUT
            )
        is_verbose = any(re.fullmatch(r"--verbose|-[qv]*v[qv]*", word) for word in arguments)
        if is_verbose:
            traceback.print_exc()
        hint = "" if is_verbose else "; run again with -v for the traceback"
        return fail(f"a defect: {type(error).__name__}: {str(error)[:300]}{hint}", DEFECT)


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
