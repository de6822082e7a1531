"""The public names, what importing them costs, and the rules that the sources keep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dsm_tune

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "DeviceProfile",
    "DsmTuneError",
    "MergePlan",
    "TuneConfig",
    "TuneResult",
    "detect_delay",
    "dsm_plan",
    "load_bundle",
    "merged",
    "similarity_curve",
    "tome_plan",
    "tune",
]


def python(code: str) -> str:
    """Run code in a fresh process; return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_public_names_are_these_in_order() -> None:
    assert dsm_tune.__all__ == NAMES == sorted(NAMES)
    assert dir(dsm_tune) == NAMES


def test_every_public_name_has_a_home_and_a_docstring() -> None:
    for name in NAMES:
        found = getattr(dsm_tune, name)
        assert found.__name__ == name
        assert found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dsm_tune' has no attribute 'tuna'"):
        dsm_tune.tuna  # noqa: B018


HEAVY = ("torch", "timm", "ray", "mlflow", "optuna", "numpy", "matplotlib", "plotly", "sklearn")


@pytest.mark.parametrize(
    "code",
    [
        "import dsm_tune",
        "from dsm_tune import DeviceProfile, DsmTuneError, MergePlan, TuneConfig, TuneResult",
    ],
)
def test_importing_the_package_and_its_data_brings_no_library(code: str) -> None:
    loaded = python(f"{code}\nimport sys\nprint(*sys.modules)").split()
    assert not set(loaded) & set(HEAVY)


def test_the_tensor_half_needs_neither_search_nor_tracking() -> None:
    code = (
        "import sys\n"
        "for name in 'ray optuna mlflow matplotlib plotly click rich numba'.split():\n"
        "    sys.modules[name] = None\n"  # as if it were not installed
        "import dsm_tune\n"
        "from dsm_tune import merged, dsm_plan, tome_plan, similarity_curve, detect_delay\n"
        "import dsm_tune.measuring.evaluate, dsm_tune.measuring.latency, dsm_tune.measuring.macs\n"
        "print('fine')\n"
    )
    assert python(code) == "fine\n"


def run(*command: str) -> None:
    """Run a tool of the environment that the tests run in."""
    tool = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [str(tool), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_run_one_way() -> None:
    run("lint-imports")


def test_the_sources_keep_the_lint_rules() -> None:
    run("ruff", "check", ".")


def test_the_sources_are_formatted() -> None:
    run("ruff", "format", "--check", ".")


def test_the_types_hold() -> None:
    run("mypy", "--strict")
