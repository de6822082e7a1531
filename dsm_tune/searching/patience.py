"""Waiting for a study's store: a database that restarts, a cut network, a disk that is full.

What Optuna and SQLAlchemy raise for these looks like what they raise for a defect; here they part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy
from optuna.exceptions import StorageInternalError

from dsm_tune.errors import StudyError, first_line

__all__ = ["Patience", "is_away"]

STORE_SECONDS = 120.0  # a database restarts, and a person makes room on a disk
PAUSES = 0.25, 5.0  # seconds between attempts, at first and at most
AWAY = (
    sqlalchemy.exc.OperationalError,  # refused, closed, locked, disk full
    sqlalchemy.exc.InterfaceError,
    sqlalchemy.exc.PendingRollbackError,  # what a lost connection has left behind
)
Found = TypeVar("Found")


class Patience:
    """Does something again until the store answers.

    Args:
        say: is told when the store is first found away, and when it is back.
        seconds: that it may be away at a time.
        clock: returns seconds.
        sleep: waits so many seconds.

    Attributes:
        waits: how often the store was away and came back.
        waited: seconds that it was away, in all.
        cause: of the last time, in one line.
    """

    def __init__(
        self,
        say: Callable[[str], None] = lambda _: None,
        *,
        seconds: float = STORE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._say, self._seconds, self._clock, self._sleep = say, seconds, clock, sleep
        self.waits, self.waited, self.cause = 0, 0.0, ""

    def call(self, action: Callable[[], Found]) -> Found:
        """Return what ``action`` does; it may be called again after a part of it was done.

        Raises:
            StudyError: if the store stays away.
        """
        try:
            return action()
        except Exception as error:
            if not is_away(error):
                raise
            return self._wait(action, error)

    def _wait(self, action: Callable[[], Found], error: Exception) -> Found:
        start, pause = self._clock(), PAUSES[0]
        self.cause = _words(error)
        self._say(f"the study store does not answer ({self.cause}); it is waited for")
        while (away := self._clock() - start) < self._seconds:
            self._sleep(pause)
            pause = min(2 * pause, PAUSES[1])
            try:
                found = action()
            except Exception as again:
                if not is_away(again):
                    raise
                error = again
                continue
            away = self._clock() - start
            self.waits, self.waited = self.waits + 1, self.waited + away
            self._say(f"the study store is back after {away:.0f} s")
            return found
        raise StudyError(
            f"the study store must answer, but for {away:.0f} s it has not: {_words(error)}; "
            "what has finished is stored, and `dsm-tune resume` goes on with it"
        ) from error


def is_away(error: BaseException) -> bool:
    """Whether an error says that the store cannot be reached or written now."""
    return isinstance(_cause(error), AWAY)


def _cause(error: BaseException) -> BaseException:
    """What the database's driver raised, if Optuna says so in its own words."""
    return (isinstance(error, StorageInternalError) and error.__cause__) or error


def _words(error: Exception) -> str:
    cause = _cause(error)
    return first_line(getattr(cause, "orig", None) or cause)
