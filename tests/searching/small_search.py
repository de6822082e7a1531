"""A search that takes milliseconds: a toy model, a made-up evaluation, and an engine in process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from evaluations import IMAGES, Evaluate, evaluate
from optuna.storages import RDBStorage

from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.searching.budget import Cost, Limits
from dsm_tune.searching.planner import Planner
from dsm_tune.searching.search import Job, Progress, Search
from dsm_tune.searching.space import FORMAT, Space, parse_space
from dsm_tune.searching.study import Study

GEOMETRY = Geometry((6, 6), 1, 5, 32, 2, 64, 4, 10, "token")
DELAY, SHARE = 1, 0.75
SPACE = f"""
format = "{FORMAT}"
[delay]
offset = [-1, 1]
[windows]
local_blocks = [0, 3]
[reduction]
slope = [-1.0, 1.0]
cost_share = [0.8, 1.0]
[matching]
feature = ["k", "v", "x"]
[search]
sampler = "random"
generation = 4
[fidelity]
image_share = 0.25
keep_share = 0.5
[[enqueue]]
offset = -1
feature = "v"
"""


def space(text: str = SPACE, **changes: Any) -> Space:
    found = parse_space(text.encode(), "small", "small.toml").bind(GEOMETRY, DELAY)
    return dataclasses.replace(found, **changes)


def planner(of: Space | None = None, share: float = SHARE) -> Planner:
    limits = Limits(gmacs=share * MergePlan("toy", GEOMETRY).gmacs)
    return Planner(
        of or space(), GEOMETRY, DELAY, limits, limits, lambda plan: Cost(plan.gmacs), "toy"
    )


def open_search(url: str, *, trials: int = 14, seed: int = 0, **options: Any) -> Search:
    """The search of the study of this storage: a new one, or one continued."""
    of = options.pop("planner", None) or planner()
    on_progress: Callable[[Progress], None] = options.pop("on_progress", lambda _: None)
    file = Path(url.removeprefix("sqlite:///"))
    if file.exists():
        study = Study.load(url, "small")
    else:
        file.write_bytes(_empty_store())
        study = Study.create(url, "small", {"made": "for a test"})
    return Search(
        study, of, images=IMAGES, trials=trials, seed=seed, on_progress=on_progress, **options
    )


@cache
def _empty_store() -> bytes:
    """A database with Optuna's tables, which take it a while to make."""
    with TemporaryDirectory() as folder:
        RDBStorage(f"sqlite:///{folder}/empty.db")
        return Path(folder, "empty.db").read_bytes()


def drive(
    search: Search,
    evaluate: Evaluate = evaluate,
    *,
    workers: int = 1,
    pick: Callable[[int], int] = lambda count: 0,
) -> Search:
    """Run all jobs, ``workers`` at a time; ``pick(count)`` says which of the running ends next."""
    running: list[Job] = []
    for _ in range(10_000):
        while len(running) < workers and (job := search.next()) is not None:
            running.append(job)
        if not running:
            assert search.finished
            return search
        job = running.pop(pick(len(running)))
        search.report(job, evaluate(job.plan, job.images))
    raise AssertionError("the search does not end")


def story(search: Search) -> list[tuple[Any, ...]]:
    """All of a search's trials but for what no two runs share: durations."""
    return [
        (
            record.number,
            record.generation,
            record.slot,
            record.label,
            record.params,
            record.plan.digest,
            record.state,
            record.why,
            record.redrawn,
            sorted(
                dataclasses.astuple(dataclasses.replace(e, seconds=0.0))
                for e in record.evaluations.values()
            ),
        )
        for record in search.records()
    ]


def front(search: Search) -> list[tuple[int, tuple[float, float]]]:
    return [(record.number, search.objectives(record)) for record in search.front()]


class Crash(BaseException):
    """The process ends here: nothing may catch it."""


WRITES = (
    "create_new_trial",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_state_values",
)


@contextmanager
def crash_at(write: int, *, after: bool) -> Iterator[list[int]]:
    """Crash before or after the given write to a storage; yields the count of writes so far."""
    count = [0]

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(RDBStorage, name)

        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            here = count[0] == write
            if here and not after:
                raise Crash
            result = original(*arguments, **options)
            if here:
                raise Crash
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(RDBStorage, name, watched(name))
        yield count
