"""Writes a study's runs in a process of its own, so that what MLflow computes costs no search.

The process is asked on its standard input and answers on its standard output, one request at a
time, both pickled. It imports MLflow, no torch, and ends when whoever started it does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import IO, Any

from dsm_tune.errors import StudyError
from dsm_tune.results import Result, Trial, TuneResult
from dsm_tune.reviewing.records import StudyLabels
from dsm_tune.reviewing.stores import redact

__all__ = ["Writer", "serve"]

# Not multiprocessing's spawn, which runs the user's own script once more. The modules are those of
# the parent, wherever it has them from; addresses, which may hold passwords, come on the pipe.
CODE = (
    "import sys; sys.path[:] = sys.argv[1:]; from dsm_tune.reviewing import writer; writer.serve()"
)
NICENESS = 5  # once the store is open: where cores are scarce, the search goes first
Request = tuple[str, tuple[Any, ...]]  # name of a method of StudyRuns, or "open", and arguments


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the process says of one request.

    Attributes:
        error: why it could not be done, in one line, or ``""``.
        parent_run_id: the study's run.
        run_ids: runs of trials, by number; those that it has not said yet.
    """

    error: str = ""
    parent_run_id: str = ""
    run_ids: Mapping[int, str] = dataclasses.field(default_factory=dict)


class Writer:
    """The runs of one study, written elsewhere; has the methods of ``StudyRuns`` that write.

    One thread asks; another may end it.
    """

    def __init__(self, tracking_uri: str, experiment: str, labels: StudyLabels) -> None:
        """Name a study; nothing is started.

        Args:
            tracking_uri: absolute, as ``stores.resolve_tracking_uri`` returns it.
            experiment: name of the MLflow experiment.
            labels: what the study is called and known by.
        """
        self._where = tracking_uri, experiment, labels
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        self._parent_run_id = ""
        self._run_ids: dict[int, str] = {}

    def open(self) -> Writer:
        """Open the study's runs, in a new process if there is none; may be called again.

        Raises:
            StudyError: if the store cannot be reached, read or written, or the process died.
        """
        self._start()
        self._ask("open", *self._where)
        return self

    @property
    def parent_run_id(self) -> str:
        """The study's run; ``""`` before it was opened."""
        return self._parent_run_id

    @property
    def process_id(self) -> int | None:
        """Of the process, if there is one."""
        return None if self._process is None else self._process.pid

    def run_id(self, trial_number: int) -> str | None:
        """Return the run of a trial, or ``None`` if it has none."""
        return self._run_ids.get(trial_number)

    def log_trial(self, trial: Trial, result: Result | None = None) -> None:
        """As ``StudyRuns.log_trial``; StudyError where that fails, as for all of these."""
        self._ask("log_trial", trial, result)

    def log_progress(
        self, step: int, hypervolume: float | None, best_divergence: float | None, trials_done: int
    ) -> None:
        """As ``StudyRuns.log_progress``."""
        self._ask("log_progress", step, hypervolume, best_divergence, trials_done)

    def log_outcome(
        self, result: TuneResult, trials: Sequence[Trial], artifacts: Mapping[str, bytes | str]
    ) -> None:
        """As ``StudyRuns.log_outcome``."""
        self._ask("log_outcome", result, trials, artifacts)

    def close(self, status: str) -> None:
        """As ``StudyRuns.close``; the process goes on."""
        self._ask("close", status)

    def end(self) -> None:
        """End the process at once and for all; what it was doing is done again by a later sync."""
        with self._lock:
            self._ended = True
            self._discard()

    def _start(self) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._discard()
            if self._ended:
                raise StudyError("the process that writes to MLflow has been ended")
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", CODE, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # its errors are answers
                start_new_session=True,  # Ctrl-C in a terminal is not meant for it
            )

    def _ask(self, method: str, *arguments: Any) -> None:
        process = self._process
        assert process is not None, "not opened"
        assert process.stdin is not None
        assert process.stdout is not None
        request = pickle.dumps((method, arguments))
        try:
            process.stdin.write(request)
            process.stdin.flush()
            answer: Answer = pickle.load(process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            process.kill()
            raise StudyError(
                f"the process that writes to MLflow ended early ({process.wait()})"
            ) from None
        if answer.error:
            raise StudyError(answer.error)
        self._parent_run_id = answer.parent_run_id
        self._run_ids |= answer.run_ids

    def _discard(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # it may hold what could not be sent any more
                if stream is not None:
                    stream.close()
        self._process = None


def serve() -> None:
    """Do what standard input asks until it ends: the main function of the process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    requests: SimpleQueue[Request] = SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, requests), daemon=True).start()
    runs, told = None, set[int]()
    while True:
        method, arguments = requests.get()
        try:
            if method == "open":
                from dsm_tune.reviewing.tracking import StudyRuns  # MLflow takes seconds

                opened = StudyRuns.open(*arguments)
                if runs is None and hasattr(os, "nice"):
                    os.nice(NICENESS)
                runs, told = opened, set()
            else:
                getattr(runs, method)(*arguments)
            assert runs is not None
            new = {number: run for number, run in runs.run_ids.items() if number not in told}
            told |= new.keys()
            answer = Answer("", runs.parent_run_id, new)
        except Exception as error:  # whatever it is, whoever asked decides
            answer = Answer(redact(" ".join(str(error).split())) or type(error).__name__)
        pickle.dump(answer, answers)
        answers.flush()


def _read(stream: IO[bytes], requests: SimpleQueue[Request]) -> None:
    """Pass requests on; end the process where they end, also in the middle of a write.

    The pipe ends when the parent does, however it does. All that is written may be written again.
    """
    while True:
        try:
            requests.put(pickle.load(stream))
        except BaseException:
            os._exit(0)
