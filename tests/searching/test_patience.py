"""A store that is away for a while is waited for, and every write is made once."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small_search as small
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage

from dsm_tune.errors import StudyError
from dsm_tune.searching.patience import Patience, is_away
from dsm_tune.searching.search import Search
from dsm_tune.searching.study import Record, Study


class Time:
    """Stands still but for what is slept; what is said in it is kept."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: list[str] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def patience(self, seconds: float = 120.0) -> Patience:
        return Patience(self.said.append, seconds=seconds, clock=lambda: self.now, sleep=self.sleep)


def refused() -> sqlalchemy.exc.OperationalError:
    return sqlalchemy.exc.OperationalError(
        "insert", {}, sqlite3.OperationalError("database or disk is full")
    )


def internal(cause: Exception) -> StorageInternalError:
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = cause
    return error


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [times]

    def action() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return "done"

    return action


def test_what_answers_is_not_waited_for() -> None:
    time = Time()
    patience = time.patience()
    assert patience.call(lambda: 3) == 3
    assert (time.now, time.said, patience.waits) == (0.0, [], 0)


@pytest.mark.parametrize("error", [refused(), internal(refused())], ids=["bare", "of Optuna"])
def test_a_store_that_comes_back_costs_its_absence_and_is_told_of_twice(error: Exception) -> None:
    time = Time()
    patience = time.patience()
    assert patience.call(failing(5, error)) == "done"
    assert 0 < time.now < 30
    assert time.said == [
        "the study store does not answer (database or disk is full); it is waited for",
        f"the study store is back after {time.now:.0f} s",
    ]
    assert (patience.waits, patience.waited) == (1, time.now)
    assert patience.cause == "database or disk is full"


def test_a_store_that_stays_away_is_an_error_that_says_how_to_go_on() -> None:
    time = Time()
    with pytest.raises(StudyError) as caught:
        time.patience(30.0).call(failing(1000, refused()))
    assert "for 3" in str(caught.value)
    assert "database or disk is full" in str(caught.value)
    assert str(caught.value).endswith("`dsm-tune resume` goes on with it")
    assert "\n" not in str(caught.value)
    assert 30 <= time.now <= 35


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a defect"),
        internal(sqlalchemy.exc.DataError("insert", {}, Exception("too long"))),
        sqlalchemy.exc.IntegrityError("insert", {}, Exception("twice")),
    ],
    ids=["ours", "data", "integrity"],
)
def test_any_other_error_is_raised_at_once(error: Exception) -> None:
    time = Time()
    assert not is_away(error)
    with pytest.raises(type(error)):
        time.patience().call(failing(1, error))
    assert time.now == 0


@contextmanager
def away_at(write: int, *, after: bool, times: int = 2) -> Iterator[list[int]]:
    """Let a write fail before or after it was made, as often; yields the count of writes."""
    count, left = [0], [times]

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(RDBStorage, name)

        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            fails = count[0] >= write and left[0] > 0
            left[0] -= fails
            if fails and not after:
                raise internal(refused())
            result = original(*arguments, **options)
            if fails:
                raise internal(refused())
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in small.WRITES:
            patch.setattr(RDBStorage, name, watched(name))
        yield count


def opened(folder: Path) -> Search:
    folder.mkdir()
    return small.open_search(f"sqlite:///{folder}/studies.db", trials=8)


@pytest.mark.parametrize("after", [False, True], ids=["unheard", "unconfirmed"])
def test_whichever_write_fails_the_trials_are_those_of_a_store_that_never_did(
    after: bool, tmp_path: Path
) -> None:
    plain = opened(tmp_path / "plain")
    with away_at(10_000, after=after) as writes:
        small.drive(plain)
    assert writes[0] > 30
    for write in range(1, writes[0] + 1, 6):
        search = opened(tmp_path / f"{write}")
        search.study.patience = Time().patience()
        with away_at(write, after=after):
            small.drive(search)
        assert small.story(search) == small.story(plain)
        stored = Study.load(f"sqlite:///{tmp_path}/{write}/studies.db", "small")
        assert stored.records() == search.records()
        assert stored.facts["faults"]["store"]["count"] >= 1


@pytest.mark.parametrize("times", [1, 2])
def test_a_trial_is_added_once_though_nobody_heard_that_it_was(times: int, tmp_path: Path) -> None:
    study = opened(tmp_path / "added").study
    study.patience = Time().patience()
    known = study.records()
    drawn = Record(-1, 7, 3, "", small.space().complete({}), known[0].plan)
    with away_at(1, after=True, times=times):
        added = study.add(drawn, small.space())
    assert study.records() == [*known, added]
    study.close(added.number, "failed", values=None, excess=0.0, why="for a test")
    assert study.records()[-1].state == "failed"


def test_a_file_that_may_not_grow_for_a_while_costs_no_trial(tmp_path: Path) -> None:
    plain = small.drive(opened(tmp_path / "plain"))
    search = opened(tmp_path / "limited")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "limited" / "studies.db").stat().st_size
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    search.study.patience = Patience(sleep=sleep)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        small.drive(search)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(slept) == 3
    assert small.story(search) == small.story(plain)
    stored = Study.load(f"sqlite:///{tmp_path}/limited/studies.db", "small")
    assert stored.records() == search.records()
    assert stored.facts["faults"] == {"store": {"count": 1, "detail": "last: disk I/O error"}}
