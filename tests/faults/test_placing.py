"""Trials run wherever there is room, also on a node that joins; plans are timed on one node."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import environment
from ray_nodes import ray_cluster
from servers import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = ("left", "right", "third")


@contextlib.contextmanager
def placing(address: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    program = Path(__file__).with_name("placing.py")
    with (folder / "err.txt").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, program, address, *NAMES],
            cwd=folder,
            env=environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str]) -> Any:
    """Where things ran, since it was last asked."""
    assert process.stdout is not None
    assert process.stdin is not None
    line = process.stdout.readline()
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(line)


def test_a_crew_follows_the_nodes_and_what_is_timed_stays_on_one_of_them(tmp_path: Path) -> None:
    with (
        ray_cluster("left", "right", with_dashboard=False) as nodes,
        placing(nodes.address, tmp_path) as process,
    ):

        def wait_for_crew(*names: str) -> None:  # a node takes a while to be known
            wait_until(
                lambda: {(name,) for name in names} == {*map(tuple, ask(process)["crew"])},
                f"the crew does not come to {names}",
            )

        wait_for_crew("left", "right")
        timed = {name for (name,) in ask(process)["timed"]}
        assert len(timed) == 1
        (other,) = {"left", "right"} - timed
        nodes.kill(other)
        nodes.join("third")
        wait_for_crew("third", *timed)
        assert {name for (name,) in ask(process)["timed"]} == timed
