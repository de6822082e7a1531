"""What MLflow costs the driver per trial: the calls themselves, and the time that a search loses.

Run ``python tests/benchmarks/logging_overhead.py``; exits with 1 above the bar. Evaluations are
pauses, as they happen in other processes. The same search runs twice, without and with the writing,
in turn, some trials each, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reviewing"))

import stored_study as stored

from dsm_tune.answer import Answer
from dsm_tune.config import TuneConfig
from dsm_tune.reviewing.outcome import artifacts, open_queue
from dsm_tune.searching.importance import parameter_importance
from dsm_tune.searching.search import Progress, Search

BAR_MS = 10.0


class Timed:
    """A search, run some trials at a time."""

    def __init__(
        self, folder: Path, name: str, trials: int, on_progress: Callable[[Progress], None]
    ) -> None:
        self.ended = 0

        def count(progress: Progress) -> None:
            self.ended += 1
            on_progress(progress)

        url = f"sqlite:///{folder}/{name}.db"
        self.search: Search = stored.search(url, name, trials=trials, on_progress=count)

    def run(self, trials: int, pause: float) -> float:
        """Run until this many more have ended; return ms per trial, less the pauses."""
        first, paused, start = self.ended, 0.0, time.perf_counter()
        while self.ended < first + trials and (job := self.search.next()) is not None:
            before = time.perf_counter()
            time.sleep(pause)
            paused += time.perf_counter() - before
            self.search.report(job, stored.evaluate(job.plan, job.images))
        return 1e3 * (time.perf_counter() - start - paused) / max(self.ended - first, 1)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--block", type=int, default=25, help="trials of one search at a time")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of an evaluation")
    options = parser.parse_args()
    calls: list[float] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        config = TuneConfig(model=stored.MODEL, images="/photographs", budget_gflops="57%")
        alone = Timed(folder, "alone", options.trials, lambda _: None)

        def on_progress(progress: Progress) -> None:
            start = time.perf_counter()
            queue.log_trial(answer.trial(progress.record))
            queue.log_progress(
                progress.done, progress.hypervolume, progress.best_divergence, progress.done
            )
            calls.append(1e3 * (time.perf_counter() - start))

        logged = Timed(folder, "logged", options.trials, on_progress)
        study = logged.search.study
        answer = Answer.of(study)
        uri = f"sqlite:///{folder}/mlflow.db"
        queue = open_queue("logged", study.facts, uri, config, print)
        queue.put(lambda runs: None)
        start = time.perf_counter()
        queue.drain(timeout=120)
        opening = time.perf_counter() - start
        lost, behind, busy = [], 0.0, 0.0
        while not logged.search.finished:
            plain = alone.run(options.block, options.pause)
            before = time.process_time()
            lost.append(logged.run(options.block, options.pause) - plain)
            start = time.perf_counter()
            queue.drain(timeout=600)
            behind = max(behind, time.perf_counter() - start)
            busy += time.process_time() - before
        stored.confirm(study)
        start = time.perf_counter()
        answer = Answer.of(study)
        result = answer.result()
        trials = answer.trials(result.front)
        files = artifacts(result, trials, config, parameter_importance(study))
        drawing = time.perf_counter() - start
        queue.log_outcome(result, trials, files)
        queue.close(timeout=600)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    low, middle, high = statistics.quantiles(lost, n=4)
    print(
        f"{len(calls)} trials; per trial on the driver's path: {statistics.mean(calls):.2f} ms in "
        f"the calls (p95 {sorted(calls)[int(0.95 * len(calls))]:.2f} ms); lost by the search in "
        f"all, blocks of {options.block} in turn: {statistics.mean(lost):.1f} ms (median "
        f"{middle:.1f}, quartiles {low:.1f} to {high:.1f}); bar {BAR_MS:g} ms"
    )
    writer = children.ru_utime + children.ru_stime
    print(
        f"processor time per logged trial: {1e3 * busy / len(calls):.1f} ms of this process, "
        f"{1e3 * writer / len(calls):.1f} ms of others, their start included"
    )
    print(f"once: {opening:.1f} s to start MLflow and make its store, beside the search")
    print(f"MLflow was {behind:.1f} s behind at most; figures and report took {drawing:.1f} s")
    print("; ".join(f"{name} {len(data) / 1e3:.0f} kB" for name, data in files.items()))
    return int(max(statistics.mean(calls), statistics.mean(lost)) > BAR_MS)


if __name__ == "__main__":
    sys.exit(main())
