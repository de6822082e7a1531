"""A tune whose machines, stores and driver fail while it runs, and which is gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from command_line import Ended, run, start
from processes import alive, descendants, title
from ray_nodes import HEAD, RayNodes
from schedule import Fault
from servers import Postgres, wait_until

BUSY = ("ray::Member.evaluate", "ray::Worker.train")  # as Ray calls processes that work on a trial
WORKERS = ("ray::Member", "ray::Worker")
AWAY_SECONDS = 20.0
FULL_SECONDS = 5.0
NEVER = 280.0


class Tune:
    """One study, driven by the command line; faults come in its middle.

    Attributes:
        injected: what was done to it, in words.
    """

    def __init__(self, folder: Path, storage: str, words: tuple[str, ...]) -> None:
        """Name a study; nothing is started.

        Args:
            folder: that it runs in.
            storage: database URL.
            words: of the command line, behind the verb; the study is ``faulty``.
        """
        self.folder, self.storage, self._words = folder, storage, words
        self.injected: list[str] = []
        self._run = 0
        self._process: subprocess.Popen[str] | None = None
        self._engine = sqlalchemy.create_engine(storage, poolclass=sqlalchemy.pool.NullPool)

    # -- the driver -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self, *more: str) -> Iterator[None]:
        """Begin the study, with more words; whatever is left of its driver is killed in the end."""
        self.begin("tune", *self._words, *more, "--study", "faulty")
        try:
            yield
        finally:
            self.kill()

    def begin(self, *words: str) -> None:
        """Start a driver."""
        self._run += 1
        with self._file("out").open("w") as out, self._file("err").open("w") as err:
            self._process = start(
                *words,
                *("--storage", self.storage, "--json"),
                cwd=self.folder,
                stdout=out,
                stderr=err,
            )

    def kill(self) -> None:
        """End the driver and what it has started, at once."""
        assert self._process is not None
        below = descendants(self._process.pid)
        for pid in alive(below | {self._process.pid}):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def resume(self, *more: str) -> None:
        """Go on with the study in a new driver, with further words of the command line."""
        self.begin("resume", "faulty", *more)

    def end(self) -> Ended:
        """Wait for the end of the driver."""
        assert self._process is not None
        code = self._process.wait(timeout=NEVER)
        return Ended(code, self._file("out").read_text(), self.said())

    def said(self) -> str:
        """What this driver has told."""
        return self._file("err").read_text()

    def shown(self) -> Ended:
        """What ``show`` prints for a person."""
        return run("show", "faulty", "--storage", self.storage, cwd=self.folder)

    def _file(self, kind: str) -> Path:
        return self.folder / f"{kind}-{self._run}.txt"

    # -- its store ------------------------------------------------------------------------------

    def query(self, question: str) -> list[tuple[Any, ...]]:
        """Ask the store; nothing while it has no tables."""
        try:
            with self._engine.connect() as connection:
                return [tuple(row) for row in connection.execute(sqlalchemy.text(question))]
        except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError):
            return []

    def evaluations(self) -> dict[tuple[int, str], str]:
        """What was evaluated, as it is stored; the seconds in it tell one run from another."""
        rows = self.query(
            "select t.number, a.key, a.value_json from trials t join trial_user_attributes a "
            "on a.trial_id = t.trial_id where a.key like 'evaluation:%'"
        )
        return {(number, key): value for number, key, value in rows}

    def numbers(self) -> list[int]:
        """Of all trials that are stored."""
        return sorted(number for (number,) in self.query("select number from trials"))

    def wait_for(self, evaluations: int) -> None:
        """Wait until so many are stored; the driver must not end before."""
        self._wait(lambda: len(self.evaluations()) >= evaluations, f"{evaluations} evaluations")

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        assert self._process is not None
        process = self._process
        wait_until(lambda: process.poll() is not None or done(), what, seconds=NEVER)
        assert process.poll() is None, f"ended before: {what}\n{self.said()}"

    # -- faults ---------------------------------------------------------------------------------

    def inject(self, faults: list[Fault], how: dict[str, Callable[[Fault], None]]) -> None:
        """Let the faults come in their order, each after what the one before has delayed."""
        for fault in faults:
            self.wait_for(fault.after)
            before = self.evaluations()
            how[fault.kind](fault)
            self.injected.append(str(fault))
            print(f"injected: {fault}", flush=True)
            self.wait_for(len(self.evaluations()) + 1)  # it goes on
            assert before.items() <= self.evaluations().items(), "what was stored has changed"

    def kill_driver(self, fault: Fault) -> None:
        """SIGKILL, and another driver."""
        self.kill()
        self.resume()
        # What comes next shall find a search, not a driver that starts its processes.
        self._wait(lambda: "searching" in self.said(), "a search that goes on")

    def kill_worker(self, cluster: RayNodes, fault: Fault) -> None:
        """SIGKILL of a process that works on a trial."""
        before, pid = self._deaths(), self._caught(cluster, fault)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive({pid}), "a killed process does not end")
        self._wait_for_reruns(before)

    def kill_node(self, cluster: RayNodes, fault: Fault) -> None:
        """SIGKILL of a node on which a trial is worked on; another one joins in its place."""
        before, pid = self._deaths(), self._caught(cluster, fault)
        (name,) = (n for n, node in cluster.nodes.items() if pid in descendants(node.pid))
        cluster.kill(name)
        cluster.join(f"{name.partition('-')[0]}-{self._run}{len(self.injected)}")
        self._wait_for_reruns(before)

    def stop_database(self, database: Postgres, fault: Fault) -> None:
        """The database crashes, and is there again after a while."""
        self._absence(lambda: database.stop(signal.SIGQUIT), database.start, AWAY_SECONDS)

    def fill(self, disk: Path, fault: Fault) -> None:
        """No byte fits on the store's disk any more; after a while, there is room again."""
        ballast = disk / "ballast"

        def write() -> None:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass

        self._absence(write, ballast.unlink, FULL_SECONDS)

    def limit_files(self, disk: Path, fault: Fault) -> None:
        """The driver's files must not grow any more; after a while, they may."""
        assert self._process is not None
        pid, size = self._process.pid, (disk / "studies.db").stat().st_size
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)

        def limit(most: int) -> None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, before[1]))

        self._absence(lambda: limit(size), lambda: limit(before[0]), FULL_SECONDS)

    def _absence(self, begin: Callable[[], None], end: Callable[[], None], seconds: float) -> None:
        """Have the store away until the driver has said so, and so long; then until it is back."""
        away, back = ("the study store does not answer", "the study store is back")
        told = {words: self.said().count(words) for words in (away, back)}
        begin()
        self._wait(lambda: self.said().count(away) > told[away], away)
        time.sleep(seconds)
        end()
        self._wait(lambda: self.said().count(back) > told[back], back)

    def noted(self) -> dict[str, dict[str, Any]]:
        """The faults that the study has noted of itself."""
        rows = self.query("select value_json from study_user_attributes where key = 'faults'")
        return json.loads(rows[0][0]) if rows else {}

    def _deaths(self) -> int:
        return sum(self.noted().get(kind, {"count": 0})["count"] for kind in ("worker", "start"))

    def _wait_for_reruns(self, before: int) -> None:
        """Wait until a death is noted and its trial was evaluated: it may die no third time."""
        self._wait(lambda: self._deaths() > before, "a death that is noted")
        hit = re.fullmatch(r"last: trial (\d+) on (\d+) images", self._last_death())
        if hit is not None:
            key = int(hit[1]), f"evaluation:{hit[2]}"
            self._wait(lambda: key in self.evaluations(), "an evaluation that is done again")

    def _last_death(self) -> str:
        return str(self.noted().get("worker", {"detail": ""})["detail"])

    def _caught(self, cluster: RayNodes, fault: Fault) -> int:
        """A process of the cluster in the middle of a trial, stopped there."""
        assert self._process is not None
        look_again = 0.0
        workers: list[int] = []
        while self._process.poll() is None:
            if time.monotonic() > look_again:  # which takes longer than a trial
                nodes = [node for name, node in cluster.nodes.items() if name != HEAD]
                below = sorted(set().union(*(descendants(node.pid) for node in nodes)))
                workers = [pid for pid in below if title(pid).startswith(WORKERS)]
                look_again = time.monotonic() + 2.0
            busy = [pid for pid in workers if title(pid).startswith(BUSY)]
            if busy:
                pid = busy[int(fault.dice * len(busy))]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    if title(pid).startswith(BUSY):
                        return pid
                    os.kill(pid, signal.SIGCONT)
        raise AssertionError(f"ended before {fault}\n{self.said()}")
