"""How the command ends: exit codes, and the one line that says why."""

from __future__ import annotations

import contextlib
import sys

__all__ = [
    "BAD_INPUT",
    "DEFECT",
    "DONE",
    "INFEASIBLE",
    "INTERRUPTED",
    "UNVERIFIED",
    "end",
    "fail",
]

DONE, DEFECT, BAD_INPUT, INFEASIBLE, UNVERIFIED, INTERRUPTED = 0, 1, 2, 3, 4, 130


def fail(text: str, code: int) -> int:
    """Say that something was refused or broke, and return the code."""
    return end(f"error: {text}", code)


def end(text: str, code: int) -> int:
    """Say how it ended in one line on stderr, and return the code."""
    from dsm_tune.cli.terminal import printable

    with contextlib.suppress(OSError):
        print(f"dsm-tune: {printable(text)}", file=sys.stderr, flush=True)
    return code
