"""Another process that drives a study."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

PROGRAM = """
import sys
from dsm_tune.searching.study import Study
with Study.load(sys.argv[1], sys.argv[2]).driven():
    print("driving", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def driving(url: str, name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that drives a study; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, url, name],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "driving\n"
        yield process
    finally:
        process.kill()
        process.communicate()
