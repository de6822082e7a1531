"""The plans that a verb is asked for: ToMe's and DSM's by their settings, a file's, a run's."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from dsm_tune import schedules
from dsm_tune.answer import load_study
from dsm_tune.errors import ConfigError, PlanError, StudyError
from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.searching.store import study_names
from dsm_tune.searching.study import Study

__all__ = [
    "Settings",
    "default_r",
    "plan_of_run",
    "published",
    "read_plan",
    "read_rates",
    "trials_of_run",
]

METHODS = ("tome", "dsm")
MOST_RATES = 100
LARGEST_PLAN = 16 << 20  # bytes
LEAST_DIGITS = 8  # of a run id that stands for it


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ToMe's and DSM's plans are made of, besides r.

    Attributes:
        delay: D of DSM; ``None`` for the one that is found.
        window: side of its first windows in tokens; ``None`` for half the grid, rounded up.
        local_blocks: T, its blocks that merge inside windows.
        inflection: of ToMe's schedule, from -1 to 1.
    """

    delay: int | None = None
    window: int | None = None
    local_blocks: int = 3
    inflection: float = 0.0


def default_r(geometry: Geometry) -> int:
    """Tokens per block that leave ToMe few at the end: 16 of 196 in 12 blocks, 8 in 24."""
    return max(geometry.patches // geometry.depth, 1)


def read_rates(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers of which each is >= 1, between commas; a repeated one counts once.

    Raises:
        ConfigError: for anything else.
    """
    words = [word.strip() for word in text.split(",")]
    numbers = [int(word) for word in words if word.isascii() and word.isdigit() and len(word) < 8]
    if len(numbers) != len(words) or 0 in numbers or len(words) > MOST_RATES:
        raise ConfigError(
            f"{option} must be integers >= 1 between commas, such as 4,8,16, but got {text!r:.60}"
        )
    return tuple(dict.fromkeys(numbers))


def published(
    method: str, geometry: Geometry, r: int, settings: Settings, found_delay: int
) -> MergePlan:
    """Return ToMe's or DSM's plan.

    Args:
        method: ``tome`` or ``dsm``.
        geometry: of the model.
        r: tokens per block.
        settings: the rest.
        found_delay: D where the settings leave it open.

    Raises:
        ConfigError: for another method.
        PlanError: for a setting that is out of range.
    """
    if method not in METHODS:
        raise ConfigError(f"--method must be one of {', '.join(METHODS)}, but got {method!r:.60}")
    if method == "tome":
        return schedules.tome(geometry, r, inflection=settings.inflection)
    return schedules.dsm(
        geometry,
        r,
        delay=found_delay if settings.delay is None else settings.delay,
        window=settings.window,
        local_blocks=settings.local_blocks,
    )


def read_plan(file: str, geometry: Geometry) -> MergePlan:
    """Read the plan of a file, for a model of one geometry.

    Raises:
        ConfigError: if the file cannot be read.
        PlanError: if it is no plan, or one for another geometry.
    """
    try:
        status = os.stat(file)
        is_file = stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST_PLAN
        text = Path(file).read_text(encoding="utf-8") if is_file else None
    except OSError as error:
        raise ConfigError(f"--plan must be a readable file, but {file}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"--plan must be JSON in UTF-8, but {file} is not") from None
    if text is None:
        raise ConfigError(
            f"--plan must be a regular file of at most {LARGEST_PLAN} bytes, but {file} is not"
        )
    try:
        plan = MergePlan.from_json(text)
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from None
    return _fitting(plan, geometry, file)


def plan_of_run(run: str, storage: str, geometry: Geometry) -> MergePlan:
    """Return the plan of a trial, found by its MLflow run.

    Args:
        run: its id, or eight or more of the first digits.
        storage: database URL of the studies.
        geometry: of the model.

    Raises:
        StudyError: if no trial has that run, or several.
        PlanError: if the plan is for another geometry.
    """
    found = trials_of_run(run, storage)
    if len(found) != 1:
        what = "none" if not found else "several"
        raise StudyError(
            f"--run must be the MLflow run of one trial in {storage}, but {run!r:.60} names "
            f"{what}; `dsm-tune show STUDY --json` lists run ids"
        )
    study, number = found[0]
    plan = next(record.plan for record in study.records() if record.number == number)
    return _fitting(plan, geometry, f"run {run}")


def trials_of_run(run: str, storage: str) -> list[tuple[Study, int]]:
    """Find trials by their MLflow run: the studies and numbers of those whose id begins so.

    Args:
        run: its id, or eight or more of the first digits.
        storage: database URL of the studies.
    """
    found: list[tuple[Study, int]] = []
    for name in study_names(storage) if len(run) >= LEAST_DIGITS else ():
        try:
            study = load_study(storage, name)
        except StudyError:  # of another program in the same database
            continue
        ids = study.facts.get("run_ids", {})
        found += [(study, int(n)) for n, one in ids.items() if one.startswith(run)]
    return found


def _fitting(plan: MergePlan, geometry: Geometry, where: str) -> MergePlan:
    if plan.geometry == geometry:
        return plan
    names: Sequence[str] = [field.name for field in dataclasses.fields(Geometry)]
    name = next(n for n in names if getattr(plan.geometry, n) != getattr(geometry, n))
    raise PlanError(
        f"{where}: a plan must be for the geometry of the model, but its {name} is "
        f"{getattr(plan.geometry, name)!r} and the model's {getattr(geometry, name)!r}"
    )
