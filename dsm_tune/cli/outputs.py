"""What verbs share: what is told meanwhile, a configuration, files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsm_tune.cli import options
from dsm_tune.errors import ConfigError

if TYPE_CHECKING:
    from dsm_tune.cli.terminal import Terminal
    from dsm_tune.config import TuneConfig

__all__ = ["any_budget", "check_writable", "listening", "write_whole"]


@contextlib.contextmanager
def listening(values: Any) -> Iterator[Terminal]:
    """What is told goes to stderr; nothing but the result reaches stdout."""
    from dsm_tune.cli.terminal import Terminal

    quiet, verbose = bool(values.get("quiet")), bool(values.get("verbose"))
    terminal = Terminal(sys.stderr, quiet=quiet, verbose=verbose)
    with terminal, contextlib.redirect_stdout(sys.stderr):
        yield terminal


def any_budget(values: Any) -> TuneConfig:
    """A configuration for what needs no budget."""
    known = {k: v for k, v in values.items() if v is not None and k not in ("quiet", "verbose")}
    return options.Given({**known, "budget_gflops": "100%"}).config().absolute(Path.cwd())


def check_writable(file: str, name: str) -> None:
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


def write_whole(file: str, content: bytes) -> None:
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
