"""Takes the writing to MLflow off the search's path: a dead store stops and loses nothing."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dsm_tune.results import Result, Trial, TuneResult
from dsm_tune.reviewing.records import StudyLabels
from dsm_tune.reviewing.stores import redact
from dsm_tune.reviewing.writer import Writer

if TYPE_CHECKING:
    from dsm_tune.reviewing.tracking import StudyRuns

    Runs = Writer | StudyRuns  # the same methods, in another process or in this one

__all__ = ["TrackingQueue"]

PATIENCE = 5  # attempts to open a dead store, while someone waits


class TrackingQueue:
    """Writes in order, beside the search; the results themselves are in the study's storage.

    A thread of its own waits for what writes, which is in another process.

    A write that fails is tried again on a store opened anew: if that opens and the write fails once
    more, the write is dropped; if it does not open, everything waits, with growing pauses. A later
    sync writes what was dropped (also because the queue was full), since writing is idempotent.

    Attributes:
        error: the first failure, in one line, or ``""``.
        dropped: how many writes were given up.
    """

    def __init__(
        self,
        open_runs: Callable[[], Runs],
        warn: Callable[[str], None],
        *,
        end: Callable[[], None] = lambda: None,
        size: int = 4096,
        pauses: tuple[float, float] = (0.5, 30.0),
    ) -> None:
        """Make a queue; nothing is opened before the first write.

        Args:
            open_runs: opens the study's runs; called in the background thread, and after an error.
            warn: is told the first failure, once, in one line; called in the background thread.
            end: called last by :meth:`close`; whoever still writes then must stop.
            size: writes that may wait; more are dropped.
            pauses: seconds between attempts to open a dead store, at first and at most.
        """
        self.error = ""
        self.dropped = 0
        self._open_runs = open_runs
        self._warn = warn
        self._end = end
        self._size = size
        self._pauses = pauses
        self._calls: deque[Callable[[Runs], object]] = deque()
        self._change = threading.Condition()
        self._ends = False
        self._hurry = False
        self._refused = 0  # attempts to open the store, since someone has waited
        self._thread: threading.Thread | None = None
        self._runs: Runs | None = None
        self._lookup: Runs | None = None

    @classmethod
    def for_study(
        cls, tracking_uri: str, experiment: str, labels: StudyLabels, warn: Callable[[str], None]
    ) -> TrackingQueue:
        """Make a queue for a study; its writer starts with the first write, and ends with it."""
        writer = Writer(tracking_uri, experiment, labels)
        return cls(writer.open, warn, end=writer.end)

    @property
    def parent_run_id(self) -> str | None:
        """The study's run; ``None`` until the store has been opened once."""
        return None if self._lookup is None else self._lookup.parent_run_id

    @property
    def pending(self) -> int:
        """How many writes are waiting."""
        return len(self._calls)

    def run_id(self, trial_number: int) -> str | None:
        """Return the run of a trial, or ``None`` while it has none."""
        return None if self._lookup is None else self._lookup.run_id(trial_number)

    def log_trial(self, trial: Trial, result: Result | None = None) -> None:
        """Have ``StudyRuns.log_trial`` called."""
        self.put(lambda runs: runs.log_trial(trial, result))

    def log_progress(
        self, step: int, hypervolume: float | None, best_divergence: float | None, trials_done: int
    ) -> None:
        """Have ``StudyRuns.log_progress`` called."""
        self.put(lambda runs: runs.log_progress(step, hypervolume, best_divergence, trials_done))

    def log_outcome(
        self, result: TuneResult, trials: Sequence[Trial], artifacts: Mapping[str, bytes | str]
    ) -> None:
        """Have ``StudyRuns.log_outcome`` called."""
        self.put(lambda runs: runs.log_outcome(result, trials, artifacts))

    def close_runs(self, status: str) -> None:
        """Have ``StudyRuns.close`` called."""
        self.put(lambda runs: runs.close(status))

    def put(self, call: Callable[[Runs], object]) -> None:
        """Have something written, some time; returns at once and never raises.

        Args:
            call: writes; must be idempotent.
        """
        with self._change:
            if self._ends or len(self._calls) >= self._size:
                self.dropped += 1
                return
            self._calls.append(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def drain(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until all is written; return whether it is.

        A store that does not open, tried again and again, is not waited for.
        """
        with self._change:
            self._hurry, self._refused = True, 0
            self._change.notify_all()
            self._change.wait_for(lambda: not self._calls or self._refused >= PATIENCE, timeout)
            self._hurry = False
            return not self._calls and not self.dropped

    def close(self, timeout: float) -> bool:
        """Drain, take no more writes and end the writer; return whether nothing is missing."""
        deadline = time.monotonic() + timeout
        self.drain(timeout)
        with self._change:
            self._ends = True
            self.dropped += len(self._calls)
            self._calls.clear()
            if self.dropped and not self.error:
                self.error = f"it did not keep up within {timeout:g} s"
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join(max(deadline - time.monotonic(), 0.1))
        self._end()
        return not self.dropped

    def _work(self) -> None:
        tries, pause = 0, self._pauses[0]
        while True:
            with self._change:
                self._change.wait_for(lambda: self._calls or self._ends)
                if self._ends:
                    return
                call = self._calls[0]
            if not self._is_open():
                with self._change:
                    self._refused += 1
                    self._change.notify_all()
                    self._change.wait_for(lambda: self._ends or self._hurry, pause)
                    if self._hurry:  # someone waits: try again soon, but not in a busy loop
                        self._change.wait_for(lambda: self._ends, self._pauses[0])
                tries, pause = 0, min(2 * pause, self._pauses[1])
                continue
            tries, pause = tries + 1, self._pauses[0]
            done = self._attempt(call)
            if done or tries == 2:
                tries = 0
                self._finish(call, done)

    def _is_open(self) -> bool:
        if self._runs is None:
            try:
                self._runs = self._lookup = self._open_runs()
            except Exception as error:  # whatever it is, the search goes on
                self._report(error)
        return self._runs is not None

    def _attempt(self, call: Callable[[Runs], object]) -> bool:
        try:
            call(self._runs)  # type: ignore[arg-type]  # it is open
        except Exception as error:  # whatever it is, the search goes on
            self._runs = None  # what the store holds now is not known: read it again
            self._report(error)
            return False
        return True

    def _finish(self, call: Callable[[Runs], object], done: bool) -> None:
        with self._change:
            if self._calls and self._calls[0] is call:
                self._calls.popleft()
                self.dropped += not done
            self._change.notify_all()

    def _report(self, error: Exception) -> None:
        if self.error:
            return
        self.error = redact(" ".join(str(error).split()))[:300] or type(error).__name__
        self._warn(f"MLflow is not up to date (no result is lost): {self.error}")
