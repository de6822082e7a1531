"""``--help`` and ``--version`` answer at once, and the options are those that TuneConfig has."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from command_line import REPOSITORY, Ended, environment

from dsm_tune.cli.group import verbs
from dsm_tune.config import TuneConfig

HEAVY = ("torch", "timm", "ray", "mlflow", "optuna", "sklearn", "matplotlib", "plotly", "numpy")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["tune", "--help"]])
def test_help_imports_nothing_heavy_and_takes_half_a_second(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom dsm_tune.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert end.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    seconds = []
    for _ in range(4):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment(),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(time.monotonic() - start)
        assert done.stderr.strip() == "[]"
    assert min(seconds) < 0.5


def test_help_fits_eighty_columns_and_names_every_verb(call: Callable[..., Ended]) -> None:
    for arguments in (
        ["--help"],
        *([verb, "--help"] for verb in ("tune", "submit", "bench", "draw", "paper", "ui")),
    ):
        ended = call(*arguments)
        assert ended.code == 0
        assert max(map(len, ended.out.splitlines())) <= 80
    names = "tune resume show submit curve profile bench draw paper export verify sync doctor ui"
    for verb in names.split():
        assert f"  {verb} " in call("--help").out


def test_tune_has_every_option_of_the_configuration() -> None:
    options = {param.name for param in verbs.commands["tune"].params}
    assert {field.name for field in dataclasses.fields(TuneConfig)} <= options


def test_submit_has_every_option_of_tune_but_the_dry_run() -> None:
    of_tune, of_submit = (
        {param.name for param in verbs.commands[verb].params} for verb in ("tune", "submit")
    )
    assert of_tune - of_submit == {"dry_run"}
    assert of_submit - of_tune == {"driver_resource"}
